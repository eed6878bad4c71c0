"""Figures show what they are given, change nothing, and never interpret what somebody typed."""

import base64
import io
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mcd_edu.data import QUESTION_TYPES
from mcd_edu.evaluation import averages, bootstrap
from mcd_edu.inference import Reply
from mcd_edu.media import Segments
from mcd_edu.samples.scenes import Player, Scene
from mcd_edu.visual import (
    COLORS,
    MODEL_COLORS,
    TYPES,
    Asked,
    Look,
    clue_rows,
    compare_clues,
    envelope,
    escape,
    frame_strip,
    plot_board,
    plot_clues,
    plot_history,
    plot_scene,
    plot_timeline,
    plot_types,
    scene_rows,
    spectrogram,
    stacked,
    wrapped,
)

EVIL = ["<b>bold</b>", "<a href='https://example.org'>link</a>", "<img src=x onerror=alert(1)>",
        "x<br>y", "<sup>2</sup>", "$\\frac{1}{2}$", "&lt;b&gt;", "<span style='color:red'>", "%{x}"]


def segments(t=4, n=16_000) -> Segments:
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 255, (t, 4, 16, 16, 3)).astype(np.uint8)
    waveform = generator.normal(scale=.1, size=(t, n)).astype(np.float32)
    return Segments(frames, waveform, np.arange(t), float(t))


def reply(question="Is there a violin?", t=4, **changes) -> Reply:
    visual, audio = np.eye(t)[1], np.full(t, 1 / t)
    made = Reply(question, "yes", .8, (("no", .2),), (1,), (0, 1), tuple(visual), tuple(audio),
                 tuple(range(t)), ())
    return replace(made, **changes)


def scene(*players) -> Scene:
    return Scene("x", 0, "indoor", players)


def player(name="violin", place="left", onset=2, end=7, level=-8.) -> Player:
    return Player(name, 0, 0, place, "near", onset, end, level, 2.5)


def texts(fig) -> str:
    """All of a figure as text, images left out."""
    figure = json.loads(fig.to_json())
    figure["layout"].pop("images", None)
    figure["layout"].pop("template", None)
    return json.dumps(figure, ensure_ascii=False)


def history(*vals):
    return [dict(epoch=i, total=2. - i, ce=1. - i / 10, av=.5, qv=.4, qa=.3, val=val)
            for i, val in enumerate(vals)]


table = {name: 50. for name in (*TYPES, "micro (all questions)")}

def asked(text="Is there a violin?", streams=4, heads=2, words=3, objects=1, t=4, **changes):
    """A question with made-up attention: each look of a word sums to 1, as the two of an object."""
    generator = torch.Generator().manual_seed(0)
    def look(shape): return 3 * torch.randn(*shape, t, generator=generator)
    clues = look((streams, heads, words)).softmax(-1)
    jointly = look((2, 2, heads, objects)).permute(1, 2, 3, 0, 4).flatten(3).softmax(-1)
    jointly = jointly.unflatten(3, (2, t)).permute(3, 0, 1, 2, 4).flatten(0, 1)      # s h m t
    names = tuple(f"word{i}" for i in range(words)), tuple(f"thing{i}" for i in range(objects))
    return replace(Asked("MCD", reply(text, t=t), *names, clues, jointly), **changes)


FIGURES = {
    "board": lambda: plot_board(segments(), [asked(), asked("Why?")], scene=scene(player())),
    "board alone": lambda: plot_board(segments(), [asked()]),
    "scene": lambda: plot_scene(scene(player(), player("piano", None, None, None))),
    "timeline": lambda: plot_timeline(segments()),
    "clues": lambda: plot_clues(reply(), segments()),
    "clues without frames": lambda: plot_clues(reply()),
    "compare": lambda: compare_clues([reply(), reply("Why?")]),
    "history": lambda: plot_history(history(.2, .5)),
    "types": lambda: plot_types({"MCD": table}, {"MCD": {name: (40., 60.) for name in table}}),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_each_function_returns_the_same_light_figure(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(go.Figure, "show", lambda *_: pytest.fail("a figure was shown"))
    fig = make()
    assert isinstance(fig, go.Figure) and fig == make()
    assert len(fig.to_json()) < 60_000
    assert fig.layout.template.layout.paper_bgcolor == "white" and 600 <= fig.layout.width <= 760
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_arguments_are_left_as_they_were():
    clip = segments()
    frames, waveform = clip.frames.copy(), clip.waveform.copy()
    plot_timeline(clip, 3)
    plot_clues(reply(), clip)
    assert np.array_equal(frames, clip.frames) and np.array_equal(waveform, clip.waveform)
    entries, rows = history(.2, .5), {"MCD": dict(table)}
    plot_history(entries)
    plot_types(rows)
    assert entries == history(.2, .5) and rows == {"MCD": table}


# ---- text

@pytest.mark.parametrize("text", EVIL)
def test_what_was_typed_is_never_interpreted(text):
    figures = [plot_clues(reply(text, answer=text)), compare_clues([reply(text, answer=text)] * 2),
               plot_scene(scene(player(text))), plot_types({text: table})]
    for fig in figures:
        shown = texts(fig)
        for tag in ("<b>bold", "<a ", "<img", "<sup", "<span", "x<br>y", "$"):
            assert tag not in shown, shown
        assert escape(text).split("…")[0].strip() in shown.replace('\\"', '"').replace("\\\\", "\\")


@pytest.mark.parametrize("text", EVIL)
def test_the_board_holds_no_markup_but_its_own(text):
    def board(typed):
        changes = dict(model=typed, annotated=typed, reply=reply(typed, answer=typed, note=typed))
        one = asked(words=1, **changes)
        return texts(plot_board(segments(), [one, one], scene=scene(player(typed))))
    shown, tags = board(text), re.compile("<[^>]*>")
    assert Counter(tags.findall(shown)) == Counter(tags.findall(board("plain"))) and "$" not in shown
    assert escape(text) in shown.replace('\\"', '"').replace("\\\\", "\\")


@pytest.mark.parametrize("text, shown", [
    ("plain", "plain"), ("a < b & c > d", "a &lt; b &amp; c &gt; d"), ("$x$", "&#36;x&#36;"),
    ("two\nlines\t here ", "two lines here"), ("\x1b[31m\0", "\ufffd[31m\ufffd"),
    ("\udcff", "\ufffd"), ("提琴 é", "提琴 é"), ("'\"", "'\""), ("x" * 95, "x" * 90 + " …"),
    ("x" * 88 + "<b>", "x" * 88 + "&lt;b …")])
def test_escape(text, shown):
    assert escape(text) == shown


@given(st.text())
def test_escaped_text_holds_no_markup(text):
    shown = escape(text)
    assert not set("<>$\n") & set(shown) and shown.isprintable()
    for entity in ("&lt;", "&gt;", "&amp;", "&#36;"): shown = shown.replace(entity, "")
    assert "&" not in shown and len(shown) <= 92


# ---- what is drawn

def test_scene_rows_are_the_sounding_intervals():
    players = player(), player("piano", "middle", None, None), player("flute", None, 0, 10, 0.)
    fig = plot_scene(scene(*players))
    assert [(bar.y[0], bar.base[0], bar.x[0]) for bar in fig.data] == [(0, 2, 5), (2, 0, 10)]
    assert fig.data[0].marker.opacity < fig.data[1].marker.opacity == 1          # louder: darker
    assert fig.data[0].text == "medium, 2.5 notes/s"
    assert fig.layout.annotations[0].text == "silent" and fig.layout.annotations[0].y == 1
    assert list(fig.layout.yaxis.ticktext) == [
        "violin, near left", "piano, near middle", "flute, off-screen"]
    assert plot_scene(scene(player(level=-5.))).data[0].text.startswith("-5 dB")


def test_envelope_against_a_loop():
    waveform = np.random.default_rng(1).normal(size=(3, 103))
    low, high = envelope(waveform, bins=10)
    for second in range(3):
        for i in range(10):
            part = [waveform[second, j] for j in range(10 * i, 10 * i + 10)]
            assert (low[10 * second + i], high[10 * second + i]) == (min(part), max(part))


def test_spectrogram_shows_when_and_how_high():
    time = np.arange(16_000) / 16_000
    tone = np.stack([np.sin(2 * np.pi * hertz * time) for hertz in (300, 3000)])
    picture = spectrogram(np.concatenate([0 * tone[:1], .5 * tone]).astype(np.float32))
    assert picture.shape == (64, 60)
    quiet, low, high = picture[:, 10], picture[:, 30], picture[:, 50]
    assert quiet.max() < low.max() and low.argmax() < high.argmax()
    ticks = plot_timeline(segments(1)).layout.yaxis3
    hertz250, hertz1000, hertz4000 = ticks.tickvals
    assert hertz250 < low.argmax() + .5 < hertz1000 < high.argmax() < hertz4000


@pytest.mark.parametrize("t, per_second, count", [
    (4, 1, 4), (4, 3, 12), (10, 3, 30), (60, 1, 30), (61, 1, 21), (20, 3, 30), (1, 2, 2)])
def test_strip_covers_the_axis_without_overlap(t, per_second, count):
    strip = frame_strip(segments(t, 160), per_second)
    assert len(strip) == count <= 30
    starts, width = [image["x"] for image in strip], strip[0]["sizex"]
    assert starts == pytest.approx([i * width for i in range(count)])
    assert t <= count * width < t + count * width / len(strip) * per_second + 1e-9


def test_strip_shows_the_right_frames():
    clip = segments(2)
    clip = replace(clip, frames=np.zeros((2, 4, 16, 16, 3), np.uint8))
    for second in range(2):
        for i in range(4): clip.frames[second, i] = 100 * second + 30 * i
    shades = []
    for image in frame_strip(clip, per_second=2):
        data = base64.b64decode(image["source"].removeprefix("data:image/jpeg;base64,"))
        shades.append(np.asarray(Image.open(io.BytesIO(data))).mean())
    assert shades == pytest.approx([0, 60, 100, 160], abs=3)


@pytest.mark.parametrize("per_second", [0, 4, -1])
def test_strip_refuses_more_than_three_a_second(per_second):
    with pytest.raises(ValueError, match="choose 1, 2 or 3"): frame_strip(segments(), per_second)


def test_long_videos_are_labelled_with_their_seconds():
    clip = replace(segments(), seconds=np.array([0, 60, 119, 179]))
    assert list(plot_timeline(clip).layout.xaxis.ticktext) == ["0", "60", "119", "179"]
    assert len(plot_timeline(segments(60)).layout.xaxis.ticktext) <= 20


def test_bars_are_the_clues_under_the_frames():
    fig = plot_clues(reply(), segments())
    looks, listens = (bar for bar in fig.data if bar.type == "bar")
    assert list(looks.y) == [0, 1, 0, 0] and list(listens.y) == [.25] * 4
    assert list(looks.x) == [.5, 1.5, 2.5, 3.5] == list(listens.x)
    assert looks.marker.color == COLORS["visual"] and listens.marker.color == COLORS["audio"]
    assert list(looks.marker.opacity) == [.45, 1, .45, .45]
    assert len(fig.layout.images) == 4 and len(plot_clues(reply()).layout.images) == 0
    assert "Is there a violin?" in fig.layout.title.text and "80%" in fig.layout.title.text


def test_rows_of_the_comparison_are_the_questions():
    turned = reply("Why?", visual_clues=(0., 0., 0., 1.))
    looks, listens = compare_clues([reply(), turned]).data
    assert [list(row) for row in looks.z] == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert looks.zmin == listens.zmin == 0 and looks.zmax == listens.zmax == 1


def test_figures_refuse_what_does_not_belong_together():
    with pytest.raises(ValueError, match="5 segments for a reply about 4"):
        plot_clues(reply(), segments(5))
    for replies in ([], [reply(), reply(t=5)]):
        with pytest.raises(ValueError, match="about one video"): compare_clues(replies)


def test_history_marks_the_epoch_that_is_kept():
    fig = plot_history(history(.2, .5, .5, .4))
    *losses, val, best = fig.data
    assert [trace.name for trace in losses] == [
        "total", "answer", "visual–audio", "question–visual", "question–audio"]
    assert list(losses[0].y) == [2, 1, 0, -1] and list(val.y) == [20, 50, 50, 40]
    assert list(best.x) == [3] and list(best.y) == [50]      # of equal ones training keeps the last
    short = plot_history([dict(epoch=0, ce=1., val=.1)])
    assert [trace.name for trace in short.data[:-2]] == ["answer"]
    with pytest.raises(ValueError, match="empty"): plot_history([])


def test_bars_of_types_are_averages_with_their_intervals():
    generator = np.random.default_rng(0)
    right, types, videos = generator.random(600) < .7, np.arange(600) % 9, np.arange(600) // 20
    rows, spans = averages(right, types), bootstrap(right, types, videos, draws=50)
    bar, = plot_types({"MCD": rows}, {"MCD": spans}).data
    names = [*TYPES, "micro (all questions)"]
    assert list(bar.y) == pytest.approx([rows[name] for name in names], abs=.01)
    for i, name in enumerate(names):
        assert bar.y[i] + bar.error_y.array[i] == pytest.approx(spans[name][1], abs=.01)
        assert bar.y[i] - bar.error_y.arrayminus[i] == pytest.approx(spans[name][0], abs=.01)
    assert bar.marker.color == MODEL_COLORS["MCD"]
    assert TYPES == tuple(" ".join(name) for name in QUESTION_TYPES)


def test_models_keep_their_colours():
    one = plot_types({"MCD": table, "mine": table, "question only": table})
    other = plot_types({"question only": table, "MCD": table})
    def colors(fig): return {bar.name: bar.marker.color for bar in fig.data}
    assert all(colors(one)[name] == color for name, color in colors(other).items())
    assert len(set(colors(one).values())) == 3 and len(set(MODEL_COLORS.values())) == 7
    many = plot_types({f"model {i}": table for i in range(12)})
    assert all(bar.marker.color for bar in many.data)


def test_types_without_questions_and_rows_that_are_not_there():
    bar, = plot_types({"MCD": {**table, TYPES[0]: float("nan")}}).data
    assert np.isnan(bar.y[0])
    assert len(plot_types({"MCD": table}, rows=TYPES[:2]).data[0].y) == 2
    with pytest.raises(ValueError, match="MCD has no row 'Audio Comparative'; it has Audio Count"):
        plot_types({"MCD": {TYPES[0]: 1.}})


# ---- the board

def rows_of(one, **look): return clue_rows(one, Look(**look))


def test_rows_are_the_weights_themselves():
    one = asked()
    labels, rows = rows_of(one, head="each", which=2)
    assert labels == ["low 1", "low 2", "high 1", "high 2"]
    for modality in range(2):
        for level in range(2):
            for head in range(2):
                row = rows[modality, 2 * level + head]
                assert torch.equal(row, one.clues[2 * level + modality, head, 2])


@pytest.mark.parametrize("who", ["words", "objects"])
def test_parts_are_means_and_a_whole_look_sums_to_one(who):
    one = asked(words=3, objects=3)
    clues = one.clues if who == "words" else one.object_clues
    _, apart = rows_of(one, who=who)
    torch.testing.assert_close(apart[1, 0], clues[1].mean((0, 1)))
    labels, whole = rows_of(one, who=who, level="both")
    assert labels == ["both"]
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 1))
    torch.testing.assert_close(whole[:, 0], apart.mean(1) * (1 if who == "words" else 2))
    labels, high = rows_of(one, who=who, level="high", head=1, which=0)
    assert labels == ["high 2"] and torch.equal(high[0, 0], clues[2, 1, 0])


def test_the_whole_look_is_what_the_reply_says():
    from mcd_edu.inference import clue_maps
    one = asked()
    expected = clue_maps(one.clues[None], torch.ones(1, 3, dtype=bool))[0]
    torch.testing.assert_close(rows_of(one, level="both")[1][:, 0], expected)


def test_padding_is_not_shown():
    one = asked(words=5)
    cut = replace(one, words=one.words[:3])
    torch.testing.assert_close(clue_rows(cut)[1], clue_rows(replace(cut, clues=one.clues[:, :, :3]))[1])


@pytest.mark.parametrize("streams, labels", [(1, ["low"]), (2, ["low"]), (4, ["low", "high"])])
def test_models_with_fewer_looks_have_fewer_rows(streams, labels):
    found, rows = clue_rows(asked(streams=streams))
    assert found == labels and rows.shape == (2, len(labels), 4)
    assert clue_rows(asked(streams=1))[1][0].equal(clue_rows(asked(streams=1))[1][1])


@pytest.mark.parametrize("changes, look, reason", [
    ({}, dict(head=7), "this model has 2 heads"),
    (dict(clues=None), {}, "this model shows no attention of its words"),
    (dict(object_clues=None), dict(who="objects"), "this model shows no attention of its objects"),
    (dict(objects=()), dict(who="objects"), "no text object in this question")])
def test_what_cannot_be_shown_is_said_on_the_board(changes, look, reason):
    one = replace(asked(), **changes)
    with pytest.raises(ValueError, match=reason): rows_of(one, **look)
    fig = plot_board(segments(), [one, asked("Why?")], [Look(**look), Look()])
    assert [note.text for note in fig.layout.annotations].count(reason) == 2
    assert len([trace for trace in fig.data if trace.type == "heatmap"]) == 4


def heats(fig): return [trace for trace in fig.data if trace.type == "heatmap"]


def test_the_board_draws_what_it_was_given():
    first, second = asked(), asked("Why?", words=2)
    truth = scene(player(onset=1, end=3), player("piano", None, None, None))
    fig = plot_board(segments(), [first, second], scene=truth)
    looks, listens, *others, last = heats(fig)
    np.testing.assert_allclose(looks.z, clue_rows(first)[1][0], atol=6e-4)
    np.testing.assert_allclose(listens.z, clue_rows(first)[1][1], atol=6e-4)
    np.testing.assert_allclose(others[1].z, clue_rows(second)[1][1], atol=6e-4)
    assert np.array_equal(np.array(last.z) > 0, [[0, 1, 1, 0], [0, 0, 0, 0]])
    assert len({heat.zmax for heat in (looks, listens, *others)}) == 1          # one scale
    assert looks.colorscale[1][1] == COLORS["visual"] and listens.colorscale[1][1] == COLORS["audio"]
    bars = [trace for trace in fig.data if trace.type == "bar"]
    assert [list(bar.x) for bar in bars] == [[.8, .2]] * 2 and "<b>yes</b> 80%" in bars[0].text[0]
    assert len(fig.layout.images) == 5                                          # frames, spectrogram


def test_panels_of_the_board_lie_above_each_other():
    fig = plot_board(segments(), [asked(), asked("Why?")], scene=scene(player(), player()))
    domains = sorted((axis.domain for axis in fig.select_yaxes() if axis.anchor == "x"), reverse=True)
    assert len(domains) == 8
    assert all(lower[1] < upper[0] for upper, lower in zip(domains, domains[1:]))
    assert domains[-1][0] == 0 and fig.layout.xaxis.domain[0] > .1


def test_a_right_answer_is_ticked_and_a_wrong_one_is_not():
    def head(annotated): return plot_board(segments(), [asked(annotated=annotated)]).layout.annotations[0].text
    assert "annotation: yes ✓" in head("yes") and "annotation: no ✗" in head("no")
    assert "annotation" not in head("")


def test_the_board_refuses_other_numbers_of_questions():
    for wrong in ([], [asked()] * 3):
        with pytest.raises(ValueError, match="give one, or two to compare"): plot_board(segments(), wrong)
    with pytest.raises(ValueError, match="4 segments for a question about 5 others"):
        plot_board(segments(), [asked(t=5)])


def test_truth_is_shown_at_the_seconds_that_were_read():
    labels, shades, texts = scene_rows(scene(player(onset=3, end=7), player("piano", None, None, None)), [0, 3, 6, 9])
    assert [shade > 0 for shade in shades[0]] == [False, True, True, False] and not any(shades[1])
    assert texts == [["", "medium", "", ""], ["silent", "", "", ""]]
    assert labels == ["violin, near left", "piano, off-screen"]


def test_truth_between_the_seconds_that_were_read_is_said_to_be_unseen():
    _, (shades,), (texts,) = scene_rows(scene(player(onset=1, end=3)), [0, 5, 9])
    assert not any(shades) and texts[0] == "not in these seconds"


@given(st.text(), st.integers(5, 40))
def test_wrapped_text_is_plain_and_short(text, width):
    lines = wrapped(text, width).split("<br>")
    assert len(lines) <= 2
    for line in lines:
        assert "<" not in line and len(line.replace("&lt;", "<").replace("&gt;", ">")
                                       .replace("&amp;", "&").replace("&#36;", "$")) <= width


def test_stacked_against_hand():
    assert stacked([10, 20], [10, 5], top=3) == (48, [(.75, 1.), (0., .5)])
