"""The explorer shows what the model used, keeps the last good state, and never obeys a text."""

import json
import shutil
from pathlib import Path
from time import process_time

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from mcd_edu import explorer as module
from mcd_edu.data import read_annotations
from mcd_edu.datasets import load_splits
from mcd_edu.explorer import (
    MAX_PLAYER,
    PLOTLY,
    SHIPPED,
    Explorer,
    LiveHistory,
    Studio,
    carry_over,
    interactive,
    make_player,
    note_html,
    open_clip,
    sample_clips,
    true_scene,
)
from mcd_edu.inference import Answerer
from mcd_edu.models import config_for
from mcd_edu.samples.choices import read_scenes
from mcd_edu.training import TrainingConfig, train
from mcd_edu.visual import COLORS, Look, clue_rows

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data_samples" / "music_avqa"
CLIP, OTHER = (DATA / "videos" / f"{number}.mp4" for number in ("00002611", "00002600"))
EVIL = "<img src=x onerror=alert(1)> <b>bold</b> $x^2$ &lt;"


@pytest.fixture(scope="module")
def shipped():
    return Answerer.load()


@pytest.fixture
def explorer(shipped):
    return Explorer(DATA, CLIP, models={SHIPPED: shipped})


@pytest.fixture
def pair(explorer):
    """The explorer comparing two annotated questions."""
    return explorer.ask(*list(explorer.clip.questions)[:2])


def board(explorer) -> dict:
    """The figure that the widget shows."""
    (output,) = explorer.controls.board.outputs
    return output["data"][PLOTLY]


def heats(explorer) -> list:
    return [trace["z"] for trace in board(explorer)["data"] if trace["type"] == "heatmap"]


def status(explorer) -> str:
    return explorer.controls.status.value


def good(explorer):
    """All that must outlast a mistake."""
    return explorer.clip, explorer.asked, json.dumps(board(explorer)), explorer.controls.player.children


# ---- what is known about a clip

def test_sample_clips_come_with_their_test_questions_and_their_truth():
    clips = sample_clips(DATA)
    assert len(clips) >= 40 and clips[0].stem == "00002600"             # test clips first
    clip = open_clip(CLIP, DATA)
    annotated = {q.text: q.answer for q in read_annotations(DATA / "json" / "avqa-test.json")
                 if q.video_id == CLIP.stem}
    assert clip.questions == annotated and len(annotated) > 3
    (scene,) = [s for s in read_scenes(DATA / "truth" / "test.json") if s.video_id == CLIP.stem]
    assert clip.scene == scene == true_scene(DATA, CLIP.stem)


def test_nothing_is_known_about_another_clip(tmp_path):
    copy = shutil.copy(CLIP, tmp_path)                                  # the same name elsewhere
    clip = open_clip(copy, DATA)
    assert clip.questions == {} and clip.scene is None
    assert sample_clips(tmp_path) == [] and true_scene(tmp_path, CLIP.stem) is None


def test_only_the_picture_is_told_the_truth(explorer, monkeypatch):
    """Without the truth the model says and looks the same."""
    before = explorer.asked
    monkeypatch.setattr(module, "true_scene", lambda *_: None)
    blind = Explorer(DATA, CLIP, models=explorer.studio.models)
    assert blind.clip.scene is None and blind.asked[0].reply == before[0].reply
    assert torch.equal(blind.asked[0].clues, before[0].clues)
    assert len(heats(blind)) == len(heats(explorer)) - 1


# ---- the weights are those of the pass that answered

def test_drawn_weights_are_those_of_the_forward_pass(pair, monkeypatch):
    answerer, looked = pair.studio.models[SHIPPED], []
    attn, boxes = answerer.model.aggregator.attns[0], answerer.model.fusion.boxes
    for layer in (attn, *boxes):
        layer.register_forward_hook(lambda layer, args, output: looked.append((layer, output[1])))
    question = next(text for text in pair.clip.questions if answerer.prepare(text).objects[0])
    pair.ask(question)
    (one,) = pair.asked
    streams = torch.stack([weights[0] for layer, weights in looked if layer is attn])   # s h l t
    assert torch.equal(one.clues, streams) and len(streams) == 4
    seen, heard = (weights[0] for layer, weights in looked if layer in boxes)           # h m (2 t)
    t = len(pair.segments)
    parts = torch.stack([seen[..., :t], heard[..., :t], seen[..., t:], heard[..., t:]])
    assert torch.equal(one.object_clues, parts)
    pair.controls.head.value = "each"
    np.testing.assert_allclose(heats(pair)[0], torch.cat([streams[0].mean(1), streams[2].mean(1)]),
                               atol=6e-4)
    pair.controls.cards[0].who.value = ("objects", 0)
    np.testing.assert_allclose(heats(pair)[1], torch.cat([parts[1, :, 0], parts[3, :, 0]]), atol=6e-4)


def test_the_answer_is_that_of_asking_in_the_ordinary_way(pair, shipped):
    watched = shipped.watch(CLIP)
    for one in pair.asked:
        (reply,) = shipped.ask(watched, one.reply.question, top=4)
        assert one.reply == reply and one.annotated == pair.clip.questions[reply.question]


# ---- what a reader does

def test_two_questions_of_one_clip_are_compared(pair):
    first, second = list(pair.clip.questions)[:2]
    assert [one.reply.question for one in pair.asked] == [first, second]
    assert len(heats(pair)) == 5                                        # 2 · 2 looks, the truth
    pair.controls.cards[1].text.value = ""
    assert len(pair.asked) == 1 and len(heats(pair)) == 3


def test_picking_and_typing_ask(explorer):
    card, before = explorer.controls.cards[0], board(explorer)
    assert [value for _, value in card.pick.options][1:] == list(explorer.clip.questions)
    card.pick.value = list(explorer.clip.questions)[2]
    assert explorer.asked[0].reply.question == card.text.value == card.pick.value
    assert board(explorer) != before
    card.text.value = "Is there a violin?"
    assert explorer.asked[0].reply.question == "Is there a violin?" and card.pick.value == ""


def test_another_clip_brings_its_own_questions(pair):
    old = pair.clip.questions
    pair.controls.samples.value = str(OTHER)
    assert pair.clip.path == OTHER and pair.clip.scene.video_id == OTHER.stem
    asked = [one.reply.question for one in pair.asked]
    assert all(text in pair.clip.questions for text in asked) and asked != list(old)[:2]
    assert [card.text.value for card in pair.controls.cards] == asked
    assert f"{OTHER.name}: answered and drawn in " in status(pair)


def test_a_typed_question_stays_when_the_clip_changes():
    old, new = (open_clip(path, DATA) for path in (CLIP, OTHER))
    theirs = next(text for text in old.questions if text not in new.questions)
    assert carry_over(["Why?", theirs], old, new) == ["Why?", list(new.questions)[1]]


def test_a_clip_of_ones_own(explorer, clip, tmp_path):
    path = tmp_path / "<b>mine é.mp4"
    shutil.copy(clip, path)
    explorer.controls.path.value = f" {path} "
    assert explorer.clip.path == path and len(explorer.segments) == 4
    assert explorer.controls.samples.value == "" and len(heats(explorer)) == 2      # no truth
    assert "&lt;b&gt;mine" in status(explorer) and "<b>" not in status(explorer)
    explorer.controls.samples.value = str(CLIP)
    assert explorer.clip.path == CLIP and explorer.controls.path.value == ""


@pytest.mark.parametrize("level, head, rows", [
    ("each", "mean", 2), ("each", "each", 8), ("low", "each", 4), ("both", "mean", 1), ("high", 3, 1)])
def test_level_and_head_choose_the_rows(explorer, level, head, rows):
    explorer.controls.level.value = level
    explorer.controls.head.value = head
    _, expected = clue_rows(explorer.asked[0], Look(level=level, head=head))
    looks, listens, _ = heats(explorer)
    assert len(looks) == len(listens) == rows
    np.testing.assert_allclose([looks, listens], expected, atol=6e-4)


def test_whose_look_can_be_chosen(explorer):
    who = explorer.controls.cards[0].who
    explorer.ask("Is the accordion louder than the tuba?")
    labels = [label for label, _ in who.options]
    assert labels[1:8] == [f"look of “{word}”" for word in explorer.asked[0].words]
    assert labels[-2:] == ["look of text object “accordion”", "look of text object “tuba”"]
    who.value = ("objects", 1)
    explorer.ask("Is there a voiceover?")                               # has no text object
    assert who.value == ("words", None) and len(heats(explorer)) == 3


def test_the_same_again_changes_nothing_but_is_no_mistake(pair):
    before = good(pair)[2:]
    pair.controls.cards[0].button.click()
    assert good(pair)[2:] == before and "answered" in status(pair)


# ---- two models

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint trained for a moment, of another size."""
    folder = tmp_path_factory.mktemp("small") / "model"
    data = load_splits(DATA, clips=6)
    config = config_for("mcd", data["train"], embed_dim=16, num_heads=2, num_blocks=1)
    train(config, data["train"], data["val"], folder, TrainingConfig(epochs=1), show_progress=False)
    return folder


def test_two_models_answer_one_question_side_by_side(explorer, small):
    question = explorer.asked[0].reply.question
    explorer.controls.checkpoint.value = str(small)
    explorer.controls.load.click()
    first, second = explorer.asked
    assert first.reply.question == second.reply.question == question
    assert first.model == SHIPPED and second.model == f"{small.parent.name}/model"
    assert second.clues.shape[1] == 2 and not torch.equal(first.clues.mean(1), second.clues.mean(1))
    alone = Answerer.load(small)
    (reply,) = alone.ask(alone.watch(CLIP), question, top=4)
    assert second.reply == reply
    explorer.controls.head.value = 3                                    # the small one has two
    assert "this model has 2 heads" in json.dumps(board(explorer))
    assert [card.model.value for card in explorer.controls.cards] == [SHIPPED, second.model]


def test_a_model_is_not_confused_with_one_loaded_before(small, shipped, clip):
    studio = Studio({SHIPPED: shipped})
    name = studio.load(str(small))
    studio.watch(name, clip)
    studio.load(str(small))
    assert all(key[0] != name for key in studio.watched)                # what the old one watched


# ---- mistakes

@pytest.mark.parametrize("where, wrong, message", [
    ("path", "no/such/clip.mp4", "no/such/clip.mp4: no such file; give the path of a video"),
    ("path", str(ROOT / "settings.ini"), "not a video that can be read"),
    ("path", str(ROOT), "no such file"), ("path", "a\0b", "a"), ("path", "x" * 5000, "name too long"),
    ("path", "~nobody-has-this-name/x.mp4", "no"),
    ("question", "  ", "has no words; ask something like"), ("question", "?!", "has no words"),
    ("checkpoint", "no/such/folder", "no checkpoint there")])
def test_a_mistake_is_said_and_costs_nothing(pair, where, wrong, message):
    before = good(pair)
    controls = pair.controls
    control = controls.cards[0].text if where == "question" else getattr(controls, where)
    control.value = wrong
    assert message in status(pair) and COLORS["training"] in status(pair)
    assert "\n" not in status(pair) and "\0" not in status(pair) and len(status(pair)) < 700
    assert good(pair) == before
    if where == "path": assert controls.samples.value == str(CLIP)
    controls.cards[0].text.value = "Is there a violin?"                 # and it goes on
    assert pair.asked[0].reply.question == "Is there a violin?" and "answered" in status(pair)


def test_a_broken_sample_is_said_and_the_menu_goes_back(explorer, clip, tmp_path):
    (tmp_path / "videos").mkdir()
    shutil.copy(clip, tmp_path / "videos" / "a.mp4")
    (tmp_path / "videos" / "b.mp4").write_bytes(b"no video")
    explorer = Explorer(tmp_path, models=explorer.studio.models)
    explorer.controls.samples.value = str(tmp_path / "videos" / "b.mp4")
    assert "not a video" in status(explorer) and explorer.clip.path.name == "a.mp4"
    assert explorer.controls.samples.value == str(tmp_path / "videos" / "a.mp4")


def test_loading_nothing_is_said(explorer):
    explorer.controls.load.click()
    assert "type the folder of a checkpoint first" in status(explorer)


def test_wrong_arguments(tmp_path, shipped):
    models = {SHIPPED: shipped}
    with pytest.raises(ValueError, match="holds no sample clips; give a clip"):
        Explorer(tmp_path, models=models)
    with pytest.raises(ValueError, match="3 questions; two can be compared"):
        Explorer(DATA, CLIP, ["a", "b", "c"], models)
    with pytest.raises(ValueError, match="no such file"):
        Explorer(DATA, tmp_path / "no.mp4", models=models)


# ---- text stays text

def test_what_was_typed_is_never_markup(explorer):
    explorer.ask(EVIL)
    assert explorer.asked[0].reply.question == EVIL                     # all of it was asked
    shown = json.dumps(board(explorer)["layout"]["annotations"])
    assert "<img" not in shown and "<b>bold" not in shown and "$" not in shown and "&lt;img" in shown
    explorer.controls.path.value = f"{EVIL}.mp4"
    assert status(explorer).count("<") == 2 and "&lt;img src=x onerror" in status(explorer)


def test_no_text_of_others_reaches_a_widget_that_reads_markup(explorer):
    """HTML widgets hold notes and headings; everything else shows plain text by itself."""
    explorer.ask(EVIL, EVIL)
    explorer.controls.checkpoint.value = EVIL
    found, todo = [], [explorer.controls.view]
    while todo:
        one = todo.pop()
        todo += getattr(one, "children", ())
        found.append(one)
        assert EVIL not in str(getattr(one, "description", ""))
        if type(one).__name__ in ("HTML", "HTMLMath", "Label", "Button"):
            assert "<img" not in str(getattr(one, "value", "")) + str(getattr(one, "tooltip", ""))
    assert {type(one).__name__ for one in found} == {
        "HTML", "HBox", "VBox", "Box", "Text", "Dropdown", "Button", "Video", "Output"}


def test_a_note_is_one_short_line_of_text():
    made = note_html("two\nlines <i>" + "x" * 1000, bad=True)
    assert made.count("<") == 2 and "two lines &lt;i&gt;" in made and len(made) < 650


# ---- the player

def test_the_player_holds_the_file(explorer):
    (player,) = explorer.controls.player.children
    assert player.value == CLIP.read_bytes() and player.format == "mp4"
    before = explorer.controls.player.children
    explorer.ask("Is there a violin?")
    assert explorer.controls.player.children is before                  # it plays on


def test_what_cannot_be_played_is_said(tmp_path):
    (tmp_path / "x.avi").write_bytes(b"x")
    with (tmp_path / "x.mp4").open("wb") as file: file.truncate(MAX_PLAYER + 1)
    assert "may not play this kind of file" in make_player(tmp_path / "x.avi").value
    assert "48 MB are too many" in make_player(tmp_path / "x.mp4").value


# ---- fast, and watched once

def test_a_question_on_a_watched_clip_is_instant(pair):
    texts = list(pair.clip.questions)[2:7]
    def seconds(text):
        start = process_time()                  # of the processor: other tests run beside this one
        pair.controls.cards[0].text.value = text
        return process_time() - start
    assert min(seconds(text) for text in texts) < 0.5


def test_a_clip_is_watched_once_by_each_model_and_anew_when_it_changes(shipped, clip, tmp_path):
    path, calls = Path(shutil.copy(clip, tmp_path)), []
    class Counting:
        def watch(self, path):
            calls.append(path)
            return shipped.watch(path)
    studio = Studio({"one": Counting(), "two": Counting()}, keep=2)
    first = studio.watch("one", path)
    assert studio.watch("one", path) is first and studio.watch("two", path) is not first
    assert len(calls) == 2
    shutil.copy(CLIP, path)
    assert len(studio.watch("one", path)[0]) == 10 and len(calls) == 3 and len(studio.watched) == 2


# ---- without a person

def run(*sources) -> list[list]:
    """The outputs of cells, run as nbconvert and papermill run them."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    nbformat.validate(notebook)
    return [cell.outputs for cell in notebook.cells]


def test_a_program_gets_a_figure_and_live_curves_stay_in_one_place(monkeypatch):
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype+png")
    _, (shown,), (curve,) = run(
        "from mcd_edu.explorer import Explorer, LiveHistory\nlive = LiveHistory()",
        f"Explorer('data_samples/music_avqa', '{CLIP.relative_to(ROOT)}')",
        "for n in (1, 2, 3): live([dict(epoch=i, ce=1., val=.5) for i in range(n)])")
    assert set(shown.data) >= {PLOTLY, "image/png"} and not any("widget" in key for key in shown.data)
    assert "accordion" in json.dumps(shown.data[PLOTLY])
    assert curve.data[PLOTLY]["data"][0]["x"] == [1, 2, 3]


def test_a_person_gets_widgets(explorer, monkeypatch):
    assert not interactive()
    assert not any("widget" in key for key in explorer._repr_mimebundle_())
    monkeypatch.setattr(module, "interactive", lambda: True)
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


@pytest.mark.parametrize("content, expected", [
    ({"allow_stdin": True}, True), ({"allow_stdin": False}, False), ({}, False)])
def test_who_may_be_asked_back_is_a_person(monkeypatch, content, expected):
    class Shell:
        class kernel:
            get_parent = staticmethod(lambda channel: {"content": content})
    monkeypatch.setattr(module, "get_ipython", Shell)
    assert interactive() is expected


def test_live_history_updates_what_it_showed(monkeypatch):
    shown, updated = [], []
    class Handle:
        def update(self, bundle, raw): updated.append(bundle)
    monkeypatch.setattr(module, "display", lambda bundle, raw, display_id: shown.append(bundle) or Handle())
    monkeypatch.setattr(go.Figure, "_repr_mimebundle_", lambda fig: {"points": len(fig.data[0].x)})
    live = LiveHistory()
    for n in (1, 2, 3): live([dict(epoch=i, ce=1., val=.5) for i in range(n)])
    assert shown == [{"points": 1}] and updated == [{"points": 2}, {"points": 3}]
