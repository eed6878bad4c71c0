"""Predictions depend on question and video alone; every number of the table has an oracle."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.data import ANSWERS, QUESTION_TYPES, Question
from mcd_edu.datasets import load_splits
from mcd_edu.evaluation import (
    ROWS,
    SHORT,
    Predictions,
    Score,
    averages,
    bootstrap,
    compare,
    markdown_table,
    mean_right,
    other_clips,
    predict,
    question_prior,
    score,
    to_predictions,
)
from mcd_edu.model import MCD, MCDConfig
from mcd_edu.training import make_toy_set

MICRO, GROUPS, TYPES = ROWS[-3:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    make_toy_set(path, num_train=70, num_val=2, num_test=12, per_video=7)
    return path


@pytest.fixture(scope="module")
def splits(folder):
    return load_splits(folder)


@pytest.fixture(scope="module")
def model(splits):
    data = splits["train"]
    torch.manual_seed(0)
    model = MCD(MCDConfig(len(data.vocabulary), visual_dim=37, audio_dim=18, embed_dim=16, num_heads=2,
                          num_blocks=1, shared_dim=8))
    model.fit_features(data.visual, data.audio, data.mask)
    return model


def made(right, types, videos=None) -> Predictions:
    """Predictions that are right where they are told to be."""
    right, types = np.asarray(right, int), np.asarray(types)
    videos = np.arange(len(types)) if videos is None else np.asarray(videos)
    return Predictions(right, np.ones_like(right), types, videos, np.arange(len(types)))


# Predictions -----------------------------------------------------------------------------------

def one_by_one(model, data, video_of):
    """The oracle: each question alone, before the video that `video_of` names."""
    rows = []
    with torch.inference_mode():
        for i in range(len(data)):
            v, words = video_of(int(data.video[i])), data.tokens[i][data.tokens[i] != 0]
            state = model.encode_video(data.visual[v][None], data.audio[v][None])
            logits = model.answer(state, words[None, None], data.objects[i][None, None]).logits
            rows.append((int(data.question_ids[i]), int(logits.argmax())))
    return [answer for _, answer in sorted(rows)]


@pytest.mark.parametrize("num_videos", [1, 5, 64])
def test_predictions_are_those_of_single_questions(model, splits, num_videos):
    data = splits["test"]
    found = predict(model.eval(), data, num_videos=num_videos)
    assert found.predicted.tolist() == one_by_one(model, data, lambda v: v)
    assert found.question_ids.tolist() == sorted(q.question_id for q in data.questions)
    by_id = {q.question_id: q for q in data.questions}
    for i, number in enumerate(found.question_ids):
        question = by_id[number]
        assert ANSWERS[found.answers[i]] == question.answer
        assert QUESTION_TYPES[found.types[i]] == question.question_type
        assert data.videos[found.videos[i]] == question.video_id


@pytest.mark.parametrize("num_videos", [1, 5, 64])
def test_shuffled_predictions_are_those_before_the_video_before(model, splits, num_videos):
    data = splits["test"]
    found = predict(model, data, shuffle_videos=True, num_videos=num_videos)
    wanted = one_by_one(model, data, lambda v: v - 1 if v else len(data.videos) - 1)
    assert found.predicted.tolist() == wanted
    assert (found.answers == predict(model, data).answers).all()


def test_logits_do_not_depend_on_batch_or_order(model, splits):
    data = splits["test"]

    def logits(*how):
        found = {}
        with torch.inference_mode():
            for batch in data.batches(*how):
                state = model.eval().encode_video(batch.visual, batch.audio, batch.mask)
                out = model.answer(state, batch.tokens, batch.objects).logits
                found |= zip(batch.question_ids[batch.question_mask].tolist(),
                             out[batch.question_mask])
        return torch.stack([found[key] for key in sorted(found)])

    wanted = logits(64)
    for how in ((1, 1), (3, 2), (5, 16, 1), (12, 3, 2)):
        torch.testing.assert_close(logits(*how), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_videos, num_questions", [(64, 16), (1, 16), (1, 2), (5, 3), (7, 1), (4, 2)])
def test_no_question_ever_sees_its_own_clip(splits, num_videos, num_questions):
    """Not with a batch of one video, and not where a video fills several rows of a batch."""
    for data in splits.values():
        for batch in data.batches(num_videos, num_questions):
            shown = other_clips(batch, data)
            for i, video in enumerate(batch.video_ids.tolist()):
                seen = [v for v in range(len(data.videos))
                        if torch.equal(shown.visual[i], data.visual[v])
                        and torch.equal(shown.audio[i], data.audio[v])]
                assert seen == [(video - 1) % len(data.videos)]
            assert shown.tokens is batch.tokens and shown.answers is batch.answers


def test_a_shorter_clip_brings_its_own_mask(splits):
    data = splits["val"]
    copy = object.__new__(type(data))
    copy.__dict__.update(data.__dict__)
    copy.mask = data.mask.clone()
    copy.mask[0, 6:] = False
    batch = next(iter(copy.batches(64)))
    assert other_clips(batch, copy).mask.sum(1).tolist() == [10, 6]


def test_one_video_cannot_be_shuffled(folder, model):
    data = load_splits(folder, clips=1)["train"]
    with pytest.raises(ValueError, match="one video"):
        predict(model, data, shuffle_videos=True)


def test_predict_leaves_no_dropout_and_no_gradient(model, splits):
    model.train()
    first, second = predict(model, splits["test"]), predict(model, splits["test"])
    assert (first.predicted == second.predicted).all() and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_words_become_predictions_in_the_order_of_predict(model, splits):
    data = splits["test"]
    found = predict(model, data)
    answer = dict(zip(found.question_ids.tolist(), found.predicted))
    questions = data.questions[::-1]
    again = to_predictions([ANSWERS[answer[q.question_id]] for q in questions], questions)
    for name in ("predicted", "answers", "types", "videos", "question_ids"):
        assert (getattr(again, name) == getattr(found, name)).all(), name


def test_ids_that_occur_twice_keep_one_order(model, splits):
    """The original labels of MUSIC-AVQA repeat some ids."""
    data = object.__new__(type(splits["test"]))
    data.__dict__.update(splits["test"].__dict__)
    data.questions = [replace(q, question_id=q.question_id // 3) for q in data.questions]
    data.question_ids = torch.tensor([q.question_id for q in data.questions])
    found = predict(model, data, num_videos=5)
    again = to_predictions([q.answer for q in data.questions], data.questions)
    for name in ("answers", "types", "videos", "question_ids"):
        assert (getattr(again, name) == getattr(found, name)).all(), name


@pytest.mark.parametrize("answers, message", [(["yes"], "1 answers to 2 questions"),
                                              (["yes", "kazoo"], "'kazoo'")])
def test_bad_words_are_refused(answers, message):
    questions = [Question(i, "v", "Is it?", QUESTION_TYPES[0], (), "yes") for i in range(2)]
    with pytest.raises(ValueError, match=message):
        to_predictions(answers, questions)


# Averages --------------------------------------------------------------------------------------

def averages_by_hand(right, types) -> list[float]:
    """Plain loops over the questions."""
    def rate(wanted):
        found = [float(r) for r, t in zip(right, types) if wanted(*QUESTION_TYPES[t])]
        return 100 * sum(found) / len(found) if found else float("nan")

    def mean(values):
        there = [value for value in values if value == value]
        return sum(there) / len(there)

    kinds = [rate(lambda m, k, name=name: (m, k) == name) for name in QUESTION_TYPES]
    groups = [rate(lambda m, k, name=name: m == name) for name in ("Audio", "Visual", "Audio-Visual")]
    return [*kinds, *groups, rate(lambda m, k: True), mean(groups), mean(kinds)]


@given(st.lists(st.tuples(st.sampled_from([-1., 0., 1 / 3, .5, 1.]), st.integers(0, 8)), min_size=1))
def test_averages_are_the_plain_loops(rows):
    right, types = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    found = averages(right, types)
    assert tuple(found) == ROWS
    np.testing.assert_allclose(list(found.values()), averages_by_hand(right, types), atol=1e-9)


def test_the_three_averages_of_the_worked_example():
    types = [0] * 3 + [1] + [2] * 2 + [4] * 4 + [8] * 10
    right = [1] * 4 + [1, 0] + [1] * 4 + [1] * 3 + [0] * 7
    found = averages(np.array(right), np.array(types))
    assert found[MICRO] == pytest.approx(60)
    assert found[GROUPS] == pytest.approx(200 / 3)
    assert found[TYPES] == pytest.approx(76)
    assert np.isnan(found["Visual Location"])


@pytest.mark.parametrize("change, message", [
    (dict(types=np.array([0, 9])), "question type 9"), (dict(types=np.array([-1, 0])), "question type -1"),
    (dict(types=np.array([0])), r"\[2, 1"), (dict(right=np.array([]), types=np.array([], int)), "at least one"),
    (dict(right=np.array([1, np.nan])), "no numbers"),
])
def test_bad_rows_are_refused(change, message):
    rows = dict(right=np.array([1, 0]), types=np.array([0, 1])) | change
    with pytest.raises(ValueError, match=message) as error:
        averages(**rows)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError):
        bootstrap(**rows, videos=np.arange(len(rows["right"])))


# Bootstrap -------------------------------------------------------------------------------------

def bootstrap_by_hand(right, types, videos, draws, seed):
    """Draw videos, join their questions, make the table; 95 % of it by sorting."""
    generator, unique, tables = np.random.default_rng(seed), sorted(set(videos.tolist())), []
    for _ in range(draws):
        rows = []
        for i in generator.integers(len(unique), size=len(unique)):
            rows += [j for j in range(len(right)) if videos[j] == unique[i]]
        tables.append(averages_by_hand(right[rows], types[rows]))
    return np.nanpercentile(np.array(tables), (2.5, 97.5), axis=0).T


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), clips=st.integers(1, 8), values=st.sampled_from([2, 3, "difference"]))
def test_bootstrap_is_the_plain_loops(seed, clips, values):
    generator = np.random.default_rng(seed)
    videos = generator.integers(clips, size=40) * 7 + 3
    types = generator.permutation(np.r_[np.arange(9), generator.integers(9, size=31)])
    if values == "difference":
        right = generator.integers(-1, 2, size=40).astype(float)
    else:
        right = generator.integers(values, size=40) / (values - 1)
    found = bootstrap(right, types, videos, draws=20, seed=seed)
    wanted = bootstrap_by_hand(right, types, videos, 20, seed)
    assert tuple(found) == ROWS
    np.testing.assert_allclose(np.array(list(found.values())), wanted, atol=1e-9)


def test_bootstrap_is_fast():
    generator = np.random.default_rng(0)
    columns = generator.integers(2, size=5000), generator.integers(9, size=5000), np.arange(5000) // 16
    start = time.process_time()
    bootstrap(*columns, draws=1000)
    assert time.process_time() - start < 2


def test_bootstrap_is_the_same_each_time_and_in_any_order():
    generator = np.random.default_rng(0)
    right, types, videos = (generator.integers(n, size=200) for n in (2, 9, 20))
    order = generator.permutation(200)
    first = bootstrap(right, types, videos)
    assert first == bootstrap(right, types, videos) != bootstrap(right, types, videos, seed=1)
    shuffled = bootstrap(right[order], types[order], videos[order])
    np.testing.assert_allclose(list(first.values()), list(shuffled.values()))


def test_whole_videos_are_drawn():
    """Twelve questions that stand or fall together are one witness, not twelve."""
    right = np.repeat(np.arange(20) % 2, 12)
    types, videos = np.zeros(240, int), np.repeat(np.arange(20), 12)
    low, high = bootstrap(right, types, videos)[MICRO]
    assert high - low > 35                       # about 4 · 50 / √20
    low, high = bootstrap(right, types, np.arange(240))[MICRO]
    assert high - low < 14


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator, hits = np.random.default_rng(0), 0
    for i in range(200):
        understood = generator.random(60) < .6
        right = generator.random((60, 5)) < np.where(understood, .9, .2)[:, None]
        low, high = bootstrap(right.ravel(), np.zeros(300, int), np.arange(300) // 5, 200, i)[MICRO]
        hits += low <= 100 * (.6 * .9 + .4 * .2) <= high
    assert .88 < hits / 200 <= 1


def test_rows_that_were_not_asked_have_no_interval():
    found = bootstrap(np.ones(4), np.zeros(4, int), np.arange(4), draws=10)
    assert found["Audio Counting"] == (100, 100) and all(np.isnan(found["Visual Counting"]))
    with pytest.raises(ValueError, match="draws=0"):
        bootstrap(np.ones(4), np.zeros(4, int), np.arange(4), draws=0)


# Scores and comparisons ------------------------------------------------------------------------

def random_predictions(seed, share=.5, number=400):
    generator = np.random.default_rng(seed)
    types, videos = np.arange(number) % 9, np.arange(number) // 8
    return made(generator.random(number) < share, types, videos)


def test_a_score_is_average_and_bootstrap():
    one = random_predictions(0)
    found = score(one, draws=50, seed=3)
    intervals = bootstrap(one.right, one.types, one.videos, 50, 3)
    for row, value in averages(one.right, one.types).items():
        assert found[row] == Score(value, *intervals[row])
    assert all(low <= value <= high for value, low, high in found.values())


def test_seeds_are_averaged_question_by_question():
    seeds = [random_predictions(seed) for seed in range(3)]
    wanted = [sum(p.right[i] for p in seeds) / 3 for i in range(400)]
    np.testing.assert_allclose(mean_right(seeds), wanted)
    single = [averages(p.right, p.types)[MICRO] for p in seeds]
    assert score(seeds)[MICRO].value == pytest.approx(np.mean(single))
    assert score([seeds[0]]) == score(seeds[0])
    with pytest.raises(ValueError, match="no predictions"):
        mean_right([])


def test_a_comparison_is_paired():
    first = random_predictions(0)
    better = replace(first, predicted=np.where(np.arange(400) % 10 == 0, 1, first.predicted))
    gain = compare(better, first)
    assert gain[MICRO].value == pytest.approx(100 * (better.right.mean() - first.right.mean()))
    assert gain[MICRO].low > 0, "never worse, and often better"
    apart = [score(p)[MICRO] for p in (better, first)]
    assert gain[MICRO].high - gain[MICRO].low < .5 * (apart[0].high - apart[0].low)
    assert apart[0].low < apart[1].high, "the single intervals overlap"
    zero = compare(first, first)
    assert all(value == (0, 0, 0) for value in zero.values())
    back = compare(first, better)
    np.testing.assert_allclose([-back[MICRO].value, -back[MICRO].high], gain[MICRO][:2])


def test_a_comparison_is_the_bootstrap_of_the_difference():
    first, second = ([random_predictions(s, share) for s in seeds]
                     for share, seeds in ((.6, (0, 1)), (.5, (2, 3, 4))))
    difference = mean_right(first) - mean_right(second)
    intervals = bootstrap(difference, first[0].types, first[0].videos, 100, 5)
    assert {row: value[1:] for row, value in compare(first, second, 100, 5).items()} == intervals


@pytest.mark.parametrize("name", ["question_ids", "answers", "types", "videos"])
def test_different_test_sets_are_not_compared(name):
    first = random_predictions(0)
    column = getattr(first, name).copy()
    column[3] += 1
    second = replace(first, **{name: column})
    for attempt in (lambda: compare(first, second), lambda: score([first, second])):
        with pytest.raises(ValueError, match=f"{name} differ"):
            attempt()


def test_markdown_tables():
    scores = {"MCD": score(random_predictions(0)), "other": score(made([1, 0], [0, 0]), draws=10)}
    lines = markdown_table(scores).splitlines()
    assert len(lines) == 2 + len(ROWS) and lines[0] == "|  | MCD | other |"
    assert lines[1] == "| --- | ---: | ---: |"
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == list(ROWS)
    assert lines[-3] == f"| {MICRO} | {scores['MCD'][MICRO].text()} | 50.0 (0.0 to 100.0) |"
    assert lines[-4].endswith("| – |")
    short = markdown_table(scores, short=True).splitlines()
    assert len(short) == 4 and short[0] == f"|  | {' | '.join(SHORT)} |" and len(SHORT) == len(ROWS)
    assert short[2].startswith("| MCD | ") and short[2].count("|") == len(ROWS) + 2
    assert Score(1.25, -.5, 3).text(signed=True, digits=0) == "+1 (-0 to +3)"


# The question prior ----------------------------------------------------------------------------

def ask(text, answer, kind=0, values=()) -> Question:
    return Question(0, "v", text, QUESTION_TYPES[kind], values, answer)


def test_the_prior_goes_from_question_to_form_to_all():
    train = [ask("Is the flute loud?", "yes", 0, ("flute",)), ask("Is the flute loud?", "yes", 0, ("flute",)),
             ask("Is the flute loud?", "no", 0, ("flute",)), ask("Is the tuba loud?", "no", 0, ("tuba",)),
             ask("Is the tuba loud?", "no", 0, ("tuba",)), ask("How many?", "two", 2),
             ask("Where?", "left", 3), ask("Where?", "left", 3), ask("Where?", "left", 3),
             ask("Where?", "left", 3)]
    test = [ask("Is the flute loud?", "no", 0, ("flute",)), ask("Is the cello loud?", "no", 0, ("cello",)),
            ask("How many?", "one", 2), ask("Why?", "no", 5)]
    assert question_prior(train, test) == ["yes", "no", "two", "left"]
    with pytest.raises(ValueError, match="no training questions"):
        question_prior([], test)


def test_the_prior_is_the_plain_count(splits):
    train, test = splits["train"].questions, splits["test"].questions
    for question, answer in zip(test, question_prior(train, test)):
        same = Counter(q.answer for q in train if q.text == question.text)
        if same:
            assert same[answer] == max(same.values())
