"""Measures against hand-made cases: certainty, many questions, pointing, disturbance, seeds."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.data import MUSIC_AVQA, Question
from mcd_edu.datasets import load_splits
from mcd_edu.evaluation import Predictions, predict
from mcd_edu.measures import (
    FAILS,
    HOLDS,
    LOOKS,
    UNDECIDED,
    Evidence,
    all_right,
    asked_about,
    calibration_error,
    collect_maps,
    decisive_seconds,
    disturbed,
    diversity,
    diversity_of,
    examine,
    jensen_shannon,
    mean_surprise,
    over_seeds,
    point,
    pointing_of,
    reliability,
    separability,
    some_questions,
    verdict,
)
from mcd_edu.models import build, config_for
from mcd_edu.samples.scenes import Player, Scene
from mcd_edu.training import make_toy_set

SMALL = dict(embed_dim=16, num_heads=2, num_blocks=1, shared_dim=8)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy_set(folder, num_train=6, num_val=2, num_test=5, per_video=6)
    return load_splits(folder)


def model_for(splits, kind="mcd", **options):
    torch.manual_seed(0)
    model = build(config_for(kind, splits["train"], **(SMALL if kind == "mcd" else {}), **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.fit_features(splits["train"].visual, splits["train"].audio, splits["train"].mask)
    return model.eval()


def evidence(right, sure):
    right, sure = np.array(right, bool), np.array(sure, float)
    return Evidence(right, sure, -np.log(np.where(right, sure, (1 - sure) / 3)))


# ---- how sure

def test_examine_agrees_with_predict_and_with_a_loop(splits):
    model, test = model_for(splits), splits["test"]
    found, said = examine(model, test), predict(model, test)
    assert (found.right == said.right).all() and len(found.right) == len(test)
    other = examine(model, test, num_videos=2)
    np.testing.assert_allclose(other.confidence, found.confidence, atol=1e-5)
    rows = {q: i for i, q in enumerate(said.question_ids.tolist())}
    for batch in test.batches(2):
        with torch.no_grad():
            logits = model.answer(model.encode_video(batch.visual, batch.audio, batch.mask),
                                  batch.tokens, batch.objects).logits
        for b, k in batch.question_mask.nonzero().tolist():
            p, i = logits[b, k].softmax(-1), rows[int(batch.question_ids[b, k])]
            assert abs(found.confidence[i] - p.max()) < 1e-5
            assert abs(found.surprise[i] + p[batch.answers[b, k]].log()) < 1e-4


def test_answers_that_the_model_cannot_give_are_wrong_and_not_in_the_loss(splits):
    test = some_questions(splits["test"], range(4))
    test.answers = torch.tensor([-1, *test.answers[1:].tolist()])
    found = examine(model_for(splits), test)
    assert not found.right[0] and math.isinf(found.surprise[0])
    assert mean_surprise(found) == pytest.approx(found.surprise[1:].mean())


def test_calibration_by_hand():
    found = evidence([1, 0, 1, 1], [.9, .8, .31, .32])  # bins of a half: 0.5 off by .35, 1.0 by .685
    assert calibration_error(found, bins=2) == pytest.approx((abs(.85 - .5) + abs(.315 - 1)) / 2)
    assert [round(row[2], 2) for row in reliability(found, bins=2)] == [.5, .5]
    assert reliability(evidence([1], [1.]))[0] == (1., 1., 1.)  # the last bin holds its end


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(.05, 1)), min_size=1, max_size=40), st.integers(1, 20))
def test_calibration_is_a_share_and_order_does_not_matter(rows, bins):
    right, sure = zip(*rows)
    found = calibration_error(evidence(right, sure), bins)
    assert 0 <= found <= 1
    assert found == pytest.approx(calibration_error(evidence(right[::-1], sure[::-1]), bins))
    assert found >= abs(np.mean(right) - np.mean(sure)) - 1e-9  # bins can only add


# ---- many questions

def said(right, videos, answers=None, predicted=None, types=None):
    n = len(videos)
    answers = np.zeros(n, int) if answers is None else np.array(answers)
    predicted = np.where(right, answers, answers + 1) if predicted is None else np.array(predicted)
    types = np.zeros(n, int) if types is None else np.array(types)
    return Predictions(predicted, answers, types, np.array(videos), np.arange(n), MUSIC_AVQA)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
def test_all_right_counts_the_draws(videos, k):
    found = said([x for rows in videos for x in rows], [i for i, rows in enumerate(videos) for _ in rows])
    draws = [np.mean([all(draw) for draw in combinations(rows, k)]) for rows in videos if len(rows) >= k]
    if draws:
        assert all_right(found, k) == pytest.approx(np.mean(draws))
    else:
        assert math.isnan(all_right(found, k))
    assert all_right(found) == pytest.approx(np.mean([all(rows) for rows in videos]))


def test_separability_by_hand():
    found = said(None, [0, 0, 0, 1, 1], [1, 2, 2, 3, 3], [1, 1, 5, 7, 8], [0, 0, 1, 0, 0])
    assert separability(found) == .5  # 1|2 said alike, 1|2 said apart; equal answers do not count
    assert separability(found, same_type=True) == 0
    assert math.isnan(separability(said([1], [0])))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_divergence_is_a_distance_in_bits(seed, t):
    p, q = np.random.default_rng(seed).dirichlet(np.full(t, .3), size=(2, 3))
    found = jensen_shannon(p, q)
    assert ((found >= -1e-12) & (found <= 1 + 1e-12)).all() and np.allclose(found, jensen_shannon(q, p))
    assert np.allclose(jensen_shannon(p, p), 0)


def test_diversity_is_the_mean_over_pairs():
    maps = np.eye(3)[[0, 0, 1]]
    assert diversity(maps) == pytest.approx(2 / 3) and np.isnan(diversity(maps[:1]))


# ---- pointing

def player(instrument, place, onset, end, level=0.):
    return Player(instrument, 0, 0, place, "near", onset, end, level, 1.)


SCENE = Scene("v", 0, "indoor", (player("cello", "left", 2, 6), player("tuba", "middle", 4, 10, -8.),
                                player("cello", "right", None, None), player("piano", None, 0, 3, -16.)))


def question(text, kind, *values):
    return Question(0, "v", text, kind, values, "yes")


@pytest.mark.parametrize("text, kind, values, names, seconds", [
    ("Is the tuba louder than the cello?", ("Audio", "Comparative"), ("tuba", "cello"), ["cello", "tuba"], range(2, 10)),
    ("Is there a piano sound?", ("Audio", "Counting"), ("piano",), ["piano"], range(3)),
    ("Is there a violin sound?", ("Audio", "Counting"), ("violin",), [], None),
    ("What is the first instrument that comes in?", ("Audio-Visual", "Temporal"), ("first",), ["piano"], range(3)),
    ("What is the third instrument that comes in?", ("Audio-Visual", "Temporal"), ("third",), ["tuba"], range(4, 10)),
    ("Where is the first sounding instrument?", ("Audio-Visual", "Temporal"), ("first",), ["cello"], range(2, 6)),
    ("What is the left instrument of the last sounding instrument?", ("Audio-Visual", "Location"), ("left", "last"),
     ["tuba"], range(4, 10)),
    ("Which cello makes the sound first?", ("Audio-Visual", "Temporal"), ("cello", "first"), ["cello"], range(2, 6)),
    ("Where is the lowest instrument?", ("Audio-Visual", "Location"), ("lowest",), ["tuba"], range(4, 10)),
    ("Is the instrument on the left louder than the instrument on the right?", ("Audio-Visual", "Comparative"),
     ("left", "right"), ["cello"], range(2, 6)),
    ("How many instruments are sounding in the video?", ("Audio-Visual", "Counting"), (), [], None),
    ("What is the instrument on the left of tuba?", ("Visual", "Location"), ("left", "tuba"), [], None)])
def test_who_is_asked_about(text, kind, values, names, seconds):
    q = question(text, kind, *values)
    assert sorted(p.instrument for p in asked_about(q, SCENE)) == sorted(names)
    found = decisive_seconds(q, SCENE, 10)
    if seconds is None:
        assert found is None
    else:
        assert np.flatnonzero(found).tolist() == list(seconds)


def test_a_source_that_always_sounds_decides_nothing():
    scene = Scene("v", 0, "indoor", (player("cello", "left", 0, 10),))
    assert decisive_seconds(question("Is there a cello sound?", ("Audio", "Counting"), "cello"), scene, 10) is None


def test_point_by_hand():
    truth, other = np.array([[1, 1, 0, 0], [0, 1, 0, 0]], bool), np.array([[0, 0, 1, 0], [0, 0, 0, 1]], bool)
    maps = np.array([[.4, .2, .4, 0], [.1, .2, .7, 0]])
    mates, peaks = np.array([[.1, .1, .4, .4], [.3, .3, .4, 0]]), np.array([[.5, 0, 0, .5], [0, .25, .75, 0]])
    found = point(maps, truth, other, mates, peaks)
    masses, guesses = [(.5 + .25) / 2, (.4 + 0) / 2, (.2 + .3) / 2], [(0 + 0) / 2, (.5 + .25) / 2, 2 / 2]
    assert found == pytest.approx((2, (.6 + .2) / 2, .5, *masses, max(guesses)))
    even = np.full((2, 4), .25)
    found = point(even, truth, other, even, even)
    assert found.mass == pytest.approx(found.even) == pytest.approx(found.mates)


def test_the_chance_of_a_hit_is_the_best_guess():
    truth, other = np.eye(4, dtype=bool), np.roll(np.eye(4, dtype=bool), 1, 0)
    maps, nowhere = np.eye(4)[[0, 1, 3, 3]], np.zeros((4, 4))
    assert point(maps, truth, other, nowhere, nowhere).hit_chance == .25             # any second
    assert point(maps, truth, maps > 0, nowhere, nowhere).hit_chance == 1.           # another clip's seconds
    assert point(maps, truth, other, nowhere, np.eye(4)[[0, 1, 2, 0]]).hit_chance == .75     # as the clip's others


@pytest.mark.parametrize("blind", ["any source", "number of sources", "always early"])
def test_attention_that_does_not_hear_the_question_points_at_nothing(blind):
    """Two sources of a clip at different times, a question about each, one map for both."""
    scenes, maps, asked = {}, {}, []
    for i in range(6):
        clip, late = str(i), i % 3
        scenes[clip] = Scene(clip, i, "indoor", (player("cello", "left", 0, 3 + late), player("tuba", "right", 2 + late, 8)))
        for name in ("cello", "tuba"):
            asked.append(Question(len(asked), clip, f"Is there a {name} sound?", ("Audio", "Counting"), (name,), "yes"))
        sounding = sum(decisive_seconds(q, scenes[clip], 10).astype(float) for q in asked[-2:])
        weights = {"any source": sounding > 0, "number of sources": sounding, "always early": np.arange(10) < 2}[blind]
        maps |= {q.question_id: np.tile(weights / weights.sum(), (4, 1)) for q in asked[-2:]}
    for look in pointing_of(maps, asked, scenes).values():
        found = look["all"]
        assert found.mass <= max(found.even, found.elsewhere, found.mates) + 1e-9
        assert found.hit <= found.hit_chance + 1e-9


def test_maps_of_a_model_sum_to_one_and_are_those_of_the_answer(splits):
    model, test = model_for(splits), splits["test"]
    maps = collect_maps(model, test)
    assert set(maps) == set(test.question_ids.tolist())
    objects = {q: bool(o.any()) for q, o in zip(test.question_ids.tolist(), test.objects)}
    assert {True, False} == set(objects.values())
    for q, x in maps.items():
        assert x.shape == (len(LOOKS), 10)
        np.testing.assert_allclose(x[:2].sum(-1), 1, atol=1e-6)
        np.testing.assert_allclose(x[2:].sum(-1), float(objects[q]), atol=1e-6)
    found = diversity_of(maps, test.questions)
    assert set(found) == set(LOOKS) and all(0 < x <= 1 for x in found.values())
    without = diversity_of(collect_maps(model_for(splits, element_fusion=False), test), test.questions)
    assert set(without) == set(LOOKS[:2])


def test_pointing_of_attention_that_knows_the_truth_and_of_one_that_does_not(splits):
    scenes = {v: Scene(v, i, "indoor", (player("cello", "left", i, i + 4), player("tuba", "right", 0, 10)))
              for i, v in enumerate("abcd")}
    names = {**dict(zip("abcd", range(4))), "unknown": 9}
    asked = [Question(i, v, "Is there a cello sound?", ("Audio", "Counting"), ("cello",), "yes") for v, i in names.items()]
    knows, even = ({q.question_id: np.zeros((4, 10)) for q in asked} for _ in "ab")
    for q in asked[:4]:
        knows[q.question_id][:2] = decisive_seconds(q, scenes[q.video_id], 10) / 4
        even[q.question_id][:2] = .1
    found = pointing_of(knows, asked, scenes)
    assert list(found) == list(LOOKS[:2]) and list(found[LOOKS[0]]) == ["all", "Audio Counting"]
    one = found[LOOKS[1]]["all"]
    assert (one.questions, one.mass, one.hit, one.even) == pytest.approx((4, 1, 1, .4)) and one.elsewhere == .5
    one = pointing_of(even, asked, scenes)[LOOKS[0]]["all"]
    assert one.mass == pytest.approx(one.even) == pytest.approx(one.elsewhere)


# ---- disturbance, parts

@pytest.mark.parametrize("stream, other", [("visual", "audio"), ("audio", "visual")])
def test_one_stream_is_disturbed(splits, stream, other):
    test, train = splits["test"], splits["train"]
    before = getattr(test, stream).clone()
    noisy, gone = disturbed(test, train, stream, 1.), disturbed(test, train, stream, None)
    for worse in noisy, gone:
        assert getattr(worse, other) is getattr(test, other) and not torch.equal(getattr(worse, stream), before)
    assert torch.equal(getattr(test, stream), before)
    assert torch.equal(getattr(noisy, stream), getattr(disturbed(test, train, stream, 1.), stream))
    torch.testing.assert_close(getattr(disturbed(test, train, stream, 0.), stream), before)
    learned = getattr(train, stream)[train.mask]
    spread = (getattr(noisy, stream) - before).flatten(0, 1).std(0) / learned.std(0, correction=0)
    assert (spread - 1).abs().max() < .5
    assert getattr(gone, stream).flatten(0, 1).std(0).max() < 1e-5
    model = model_for(splits, modalities=other)
    assert (predict(model, gone).predicted == predict(model, test).predicted).all()


def test_some_questions(splits):
    test = splits["test"]
    part = some_questions(test, [3, 0, 7])
    ids = [test.questions[i].question_id for i in (3, 0, 7)]
    assert [q.question_id for q in part.questions] == part.question_ids.tolist() == ids
    whole, some = predict(model_for(splits), test), predict(model_for(splits), part)
    places = {q: i for i, q in enumerate(whole.question_ids.tolist())}
    assert all(whole.predicted[places[q]] == p for q, p in zip(some.question_ids.tolist(), some.predicted))
    assert len(test) == len(test.questions) == len(test.tokens)


# ---- seeds

def test_over_seeds_against_printed_tables():
    for values, half in ([1., 3.], 12.706), ([1., 2., 3.], 4.303 / 3 ** .5), ([1, 2, 3, 4, 5.], 2.776 * (2.5 / 5) ** .5):
        found = over_seeds(values)
        assert [found.high - found.value, found.value - found.low] == pytest.approx([half, half], rel=2e-3)
    t = over_seeds([.4, 1.2, .2, 1.6, .8])  # t = 3.29, four degrees: between 0.02 (3.747) and 0.05 (2.776)
    assert .02 < t.p < .05 and t.seeds == 5
    assert over_seeds([-x for x in (.4, 1.2, .2, 1.6, .8)]).p == pytest.approx(t.p)
    assert over_seeds([0., 0.]).p == 1 and over_seeds([2., 2.])[:4] == pytest.approx((2, 2, 2, 0), abs=1e-9)
    assert math.isnan(over_seeds([1.]).low)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5, width=16), min_size=3, max_size=7))
def test_interval_p_and_verdict_say_the_same(values):
    found = over_seeds(values)
    if abs(found.p - .05) > 1e-3:
        assert (verdict(found) != UNDECIDED) == (found.p < .05)
    assert {HOLDS: FAILS, FAILS: HOLDS, UNDECIDED: UNDECIDED}[verdict(found)] == verdict(over_seeds([-x for x in values]))


def test_two_seeds_decide_nothing():
    assert verdict(over_seeds([3., 3.])) == UNDECIDED == verdict(over_seeds([3.]))
    assert verdict(over_seeds([3., 3., 3.])) == HOLDS and verdict(over_seeds([-3., -3., -3.])) == FAILS


@pytest.mark.parametrize("wrong, message", [
    (lambda: over_seeds([]), "at least one"), (lambda: over_seeds([1, math.nan]), "finite"),
    (lambda: reliability(evidence([], [])), "0 questions"), (lambda: reliability(evidence([1], [1]), 0), "0 bins"),
    (lambda: point(*np.ones((5, 0, 4))), "at least one question"),
    (lambda: point(np.ones((2, 4)), np.ones((2, 3)), *np.ones((3, 2, 4))), "n t")])
def test_wrong_input(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_wrong_disturbances(splits):
    for args, message in ((("smell", 1.), "visual or audio"), (("visual", -1.), "0 or more")):
        with pytest.raises(ValueError, match=message):
            disturbed(splits["test"], splits["train"], *args)
    with pytest.raises(ValueError, match="keep at least one"):
        some_questions(splits["test"], [])
