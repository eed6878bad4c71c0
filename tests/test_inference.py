"""From a file and a sentence to a reply: the same reply in any company, or a clear refusal."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcd_edu.data import ANSWERS, Vocabulary, fill_placeholders, read_annotations, tokenize
from mcd_edu.encoders import encode_segments
from mcd_edu.inference import (
    MAX_OBJECTS,
    WEIGHTS,
    Answerer,
    check_fit,
    clue_maps,
    join_names,
    make_reply,
    prepare,
)
from mcd_edu.media import MediaError, Segments, write_video
from mcd_edu.model import MCD, MCDConfig
from mcd_edu.samples.questions import TEMPLATES, candidates, choose_questions
from mcd_edu.samples.scenes import FPS, render_frames, render_waveform, sample_scene
from mcd_edu.samples.sounds import load_bank
from mcd_edu.training import CheckpointError, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ["Is there a violin sound?", "How many instruments are sounding in the video?",
             "Is the piano on the left louder than the tuba on the right?", "Where?"]


@pytest.fixture(scope="module")
def answerer(untrained):
    return Answerer.load(untrained / "model", untrained / "encoders")


@pytest.fixture(scope="module")
def watched(answerer, clip):
    return answerer.watch(clip)


def close(one, other):
    """Whether two replies are the same but for rounding."""
    flat = [torch.tensor([r.probability, *(p for _, p in r.alternatives), *r.visual_clues,
                          *r.audio_clues]) for r in (one, other)]
    return ([one.answer, *(a for a, _ in one.alternatives)]
            == [other.answer, *(a for a, _ in other.alternatives)]
            and torch.allclose(*flat, atol=1e-5, rtol=0))


# ---- words

@pytest.mark.parametrize("text, joined", [
    ("an acoustic guitar", ["an", "acoustic_guitar"]), ("guitar", ["guitar"]), ("", []),
    ("acoustic guitar acoustic guitar", ["acoustic_guitar"] * 2),
    ("electric bass acoustic", ["electric_bass", "acoustic"]),
    ("acoustic_guitar", ["acoustic_guitar"])])
def test_names_of_two_words_are_joined(text, joined):
    known = {"acoustic_guitar", "electric_bass", "guitar"}
    assert join_names(text.split(), known) == joined


@given(st.lists(st.sampled_from(["a", "b", "a_b", "c"])))
def test_joining_keeps_every_letter(words):
    joined = join_names(words, {"a_b"})
    assert "_".join(joined) == "_".join(words)
    assert not any(pair == ("a", "b") for pair in pairwise(joined))


def test_keywords_are_those_that_the_annotation_would_name(answerer):
    words = answerer.vocabulary.words
    for seed in range(40):
        for candidate in candidates(sample_scene("x", seed)):
            text = fill_placeholders(TEMPLATES[candidate.template].text, candidate.values)
            read = answerer.prepare(text)
            found = [words[number] for number in read.objects if number]
            assert found == [value.lower() for value in candidate.values], text
            assert [words[number] for number in read.tokens if number] == tokenize(text)
            assert read.unknown == () and read.note == ""


@pytest.mark.parametrize("question", ["", "   ", "?!…", "<>", "\n\t", "¿ ?"])
def test_a_question_without_words_is_refused(answerer, watched, question):
    with pytest.raises(ValueError, match="has no words; ask something like") as error:
        answerer.ask(watched, [QUESTIONS[0], question])
    assert "\n" not in str(error.value)


def test_a_long_question_is_cut_and_the_reply_says_so(answerer, watched):
    long = "is there a violin " * 500
    cut, plain = answerer.ask(watched, [long, " ".join(long.split()[:20])])
    assert cut.note == "only the first 20 of 2,000 words were read" and plain.note == ""
    assert cut.question == long and close(cut, plain)


def test_words_never_seen_are_named_once_in_order(answerer, watched):
    reply, = answerer.ask(watched, "Is the Zither or the theremin or the zither a violin?")
    assert reply.unknown == ("zither", "or", "theremin")


def test_more_keywords_than_fit_are_cut():
    vocabulary = Vocabulary(["violin"])
    read = prepare("violin " * 12, vocabulary, {"violin"}, max_tokens=20)
    assert read.objects == [vocabulary.index["violin"]] * MAX_OBJECTS
    assert read.tokens == [vocabulary.index["violin"]] * 12 + [0] * 8


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    vocabulary = Vocabulary(["is", "violin", "pad", "unknown"])
    try: read = prepare(text, vocabulary, {"violin"}, max_tokens=5)
    except ValueError: assert not tokenize(text)
    else:
        assert len(read.tokens) == 5 and len(read.objects) == MAX_OBJECTS and read.tokens[0] > 0
        assert all(0 <= number < len(vocabulary) for number in (*read.tokens, *read.objects))


# ---- clues

def clue_maps_by_hand(clues, mask):
    k, _, h, l, t = clues.shape
    maps = torch.zeros(k, 2, t, dtype=clues.dtype)
    for q in range(k):
        words = [w for w in range(l) if mask[q, w]]
        for stream in range(4):
            for head in range(h):
                for word in words:
                    maps[q, stream % 2] += clues[q, stream, head, word] / (2 * h * len(words))
    return maps


def test_clue_maps_against_a_loop():
    clues = torch.rand(3, 4, 2, 5, 6, dtype=torch.float64).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    maps = clue_maps(clues, mask)
    torch.testing.assert_close(maps, clue_maps_by_hand(clues, mask))
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    noisy = torch.where(mask[:, None, None, :, None], clues, 9.)
    torch.testing.assert_close(clue_maps(noisy, mask), maps)
    assert clue_maps(clues, torch.zeros_like(mask)).isfinite().all()
    both = clue_maps(clues[:, :1], mask)  # a model that looks once at picture and sound together
    torch.testing.assert_close(both[:, 0], both[:, 1])
    torch.testing.assert_close(both, clue_maps(clues[:, :1].expand(-1, 2, -1, -1, -1), mask))


def test_clues_of_a_reply_are_the_attention_that_the_model_used(answerer, watched):
    used, forward = [], answerer.model.aggregator.forward
    def note(*arguments):
        found = forward(*arguments)
        used.append(found[1])
        return found
    answerer.model.aggregator.forward = note
    try: replies = answerer.ask(watched, QUESTIONS)
    finally: del answerer.model.aggregator.forward
    (clues,) = used                                   # computed once, and not again for the map
    mask = torch.arange(clues.shape[4]) < torch.tensor([[len(tokenize(q))] for q in QUESTIONS])
    by_hand = clue_maps_by_hand(clues[0], mask)
    for reply, maps in zip(replies, by_hand):
        torch.testing.assert_close(torch.tensor([reply.visual_clues, reply.audio_clues]), maps)
        assert sum(reply.visual_clues) == pytest.approx(1) == sum(reply.audio_clues)
        assert len(reply.visual_clues) == len(reply.audio_clues) == len(reply.seconds) == 4
        for named, clue in ((reply.looks_at, maps[0]), (reply.listens_to, maps[1])):
            assert list(named) == sorted(range(4), key=lambda s: -clue[s])[:3]  # noqa: B023


def test_a_reply_names_seconds_of_the_video_and_sorts_them():
    probabilities = torch.zeros(len(ANSWERS))
    probabilities[3], probabilities[7] = .6, .4
    clues = torch.tensor([[.1, .2, .7], [.25, .5, .25]])
    reply = make_reply("Why?", ANSWERS, probabilities, clues, np.array([0, 60, 119]), 2, ("why",), "cut")
    assert (reply.answer, reply.alternatives[0][0]) == (ANSWERS[3], ANSWERS[7])
    assert reply.probability == pytest.approx(.6)
    assert reply.looks_at == (119, 60) and reply.listens_to == (60, 0)   # a tie: the earlier first
    assert reply.seconds == (0, 60, 119) and reply.unknown == ("why",) and reply.note == "cut"


# ---- company

def test_an_answer_is_the_same_in_any_company(answerer, watched):
    together = answerer.ask(watched, QUESTIONS)
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        for reply, i in zip(answerer.ask(watched, [QUESTIONS[i] for i in order]), order):
            assert close(reply, together[i])
    for question, reply in zip(QUESTIONS, together):
        assert close(answerer.ask(watched, question)[0], reply)
        assert close(answerer.ask(watched, [question, "violin " * 300, question])[2], reply)


def test_different_questions_differ(answerer, watched):
    replies = answerer.ask(watched, QUESTIONS)
    assert not any(close(one, other) for one, other in pairwise(replies))


def test_asking_twice_gives_the_same(answerer, watched):
    assert answerer.ask(watched, QUESTIONS) == answerer.ask(watched, QUESTIONS)


def test_questions_do_not_touch_the_video_again(answerer, watched, monkeypatch):
    def forbidden(*_): raise AssertionError("the video was encoded again")
    monkeypatch.setattr(answerer.model, "encode_video", forbidden)
    monkeypatch.setattr(answerer.model.association, "forward", forbidden)
    assert len(answerer.ask(watched, QUESTIONS)) == 4


def test_one_question_may_come_as_text_and_none_gives_none(answerer, watched):
    assert answerer.ask(watched, QUESTIONS[0]) == answerer.ask(watched, [QUESTIONS[0]])
    assert answerer.ask(watched, []) == []


@pytest.mark.parametrize("top, named, seconds", [(1, 0, 1), (5, 4, 4), (99, len(ANSWERS) - 1, 4)])
def test_top(answerer, watched, top, named, seconds):
    reply, = answerer.ask(watched, QUESTIONS[0], top)
    assert len(reply.alternatives) == named and len(reply.looks_at) == seconds
    assert reply.probability >= max([p for _, p in reply.alternatives], default=0)


def test_questions_are_text_and_top_is_positive(answerer, watched):
    for wrong in (None, [1], b"how", [b"how"], 7):
        with pytest.raises(ValueError, match="is no text; give a string, or several in a list"): answerer.ask(watched, wrong)
    with pytest.raises(ValueError, match="top=0"): answerer.ask(watched, QUESTIONS[0], 0)


def test_a_reply_is_plain_data(answerer, watched):
    for reply in answerer.ask(watched, QUESTIONS):
        back = json.loads(json.dumps(dataclasses.asdict(reply)))
        assert back["answer"] == reply.answer and tuple(back["seconds"]) == reply.seconds


def test_the_text_of_a_question_is_never_interpreted(answerer, watched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strange = ["__import__('os').system('touch here')", "$(touch here)", "{0.__class__} %s %n",
               "<script>x</script>", "../../etc/passwd", "<pad> <unknown>", "\x1b[2J violin \0"]
    replies = answerer.ask(watched, strange)
    assert [reply.question for reply in replies] == strange
    assert list(tmp_path.iterdir()) == []


# ---- videos

def test_a_short_and_a_long_video(answerer, tmp_path):
    for seconds, starts in ((1, [0]), (45, [0, 5, 10, 15, 20, 24, 29, 34, 39, 44])):
        path = tmp_path / f"{seconds}.mp4"
        sound = np.zeros(seconds * 16_000, np.float32)
        write_video(path, np.zeros((seconds, 32, 32, 3), np.uint8), sound, fps=1)
        reply, = answerer.ask(answerer.watch(path), QUESTIONS[0])
        assert list(reply.seconds) == starts
        assert sum(reply.visual_clues) == pytest.approx(1, abs=1e-5)


def test_a_file_that_is_no_video_is_refused(answerer, tmp_path):
    with pytest.raises(MediaError, match="no such file"): answerer.watch(tmp_path / "none.mp4")


def test_segments_come_back_with_the_state(answerer, watched):
    segments, state = watched
    assert isinstance(segments, Segments) and len(segments) == 4
    assert state.low[0].shape == (1, 4, 32)


# ---- checkpoints

@pytest.fixture
def parts(answerer):
    return dict(where="folder", model=answerer.model, vocabulary=answerer.vocabulary,
                about={"keywords": ["violin"]}, encoders=answerer.encoders)


def other(answerer, **changes):
    return MCD(dataclasses.replace(answerer.model.config, **changes))


@pytest.mark.parametrize("changes, message", [
    (dict(visual_dim=64), "visual features of width 64, here it is 192"),
    (dict(audio_dim=64), "audio features of width 64, here it is 128"),
    (dict(vocab_size=7), "a vocabulary of size 7, here it is"),
    (dict(num_answers=5), "a list of answers of length 5, here it is 42")])
def test_parts_that_do_not_fit_are_refused(answerer, parts, changes, message):
    check_fit(**parts)
    with pytest.raises(CheckpointError, match="^folder: .*" + message) as error:
        check_fit(**{**parts, "model": other(answerer, **changes)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("about", [{}, {"keywords": None}, {"keywords": "violin"}, [],
                                   {"keywords": [1]}])
def test_a_checkpoint_without_keywords_is_refused(parts, about):
    with pytest.raises(CheckpointError, match='no list of "keywords"'):
        check_fit(**{**parts, "about": about})


def test_a_checkpoint_for_other_features_is_refused_when_it_is_loaded(untrained, tmp_path):
    model = MCD(MCDConfig(3, visual_dim=2048, embed_dim=8, num_heads=2))
    save_checkpoint(tmp_path, model, Vocabulary(["violin"]), {"keywords": ["violin"]})
    with pytest.raises(CheckpointError, match="width 2048, here it is 192; use the encoders"):
        Answerer.load(tmp_path, untrained / "encoders")


def test_a_missing_part_is_named(untrained, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        Answerer.load(tmp_path, untrained / "encoders")
    with pytest.raises(ValueError, match="no encoder there"):
        Answerer.load(untrained / "model", tmp_path)


# ---- what is shipped

def test_the_weights_lie_in_the_package():
    assert WEIGHTS == ROOT / "mcd_edu" / "weights"


SAMPLES = ROOT / "data_samples" / "music_avqa"


@pytest.fixture(scope="module")
def shipped():
    return Answerer.load()


def test_the_shipped_model_answers_about_the_shipped_test_clips(shipped):
    """From the mp4 and the words alone: no annotation, no cached feature, no question type."""
    questions = {}
    for question in read_annotations(SAMPLES / "json" / "avqa-test.json"):
        if (SAMPLES / "videos" / f"{question.video_id}.mp4").is_file():
            questions.setdefault(question.video_id, []).append(question)
    assert len(questions) >= 20
    right = []
    for video, asked in sorted(questions.items()):
        watched = shipped.watch(SAMPLES / "videos" / f"{video}.mp4")
        replies = shipped.ask(watched, [question.text for question in asked])
        right += [reply.answer == question.answer for reply, question in zip(replies, asked)]
        assert not any(reply.unknown or reply.note for reply in replies)
    assert np.mean(right) > 0.65


def test_features_of_a_shipped_clip_are_those_that_were_stored(shipped):
    path = sorted((SAMPLES / "videos").glob("*.mp4"))[-1]
    segments, _ = shipped.watch(path)
    for kind, feature in zip(("visual", "audio"), encode_segments(shipped.encoders, segments)):
        stored = np.load(SAMPLES / "feats" / f"small_{kind}" / f"{path.stem}.npy")
        np.testing.assert_allclose(feature, stored, atol=0.02 * np.abs(stored).max())


def test_the_shipped_model_answers_about_clips_rendered_anew(shipped, tmp_path):
    bank, right = load_bank(), []
    for seed in range(900_000_000, 900_000_010):
        scene, path = sample_scene("new", seed), tmp_path / f"{seed}.mp4"
        write_video(path, render_frames(scene), render_waveform(scene, bank), FPS)
        (chosen,) = choose_questions([scene])
        texts = [fill_placeholders(TEMPLATES[c.template].text, c.values) for c in chosen]
        replies = shipped.ask(shipped.watch(path), texts)
        right += [reply.answer == c.answer for reply, c in zip(replies, chosen)]
    assert len(right) >= 100 and np.mean(right) > 0.6
