"""Results average over seeds, question by question; tables refuse what is not comparable and show where the reference loses."""

from dataclasses import replace

import numpy as np
import pytest

from mcd_edu.evaluation import ROWS, Predictions, averages, compare, score
from mcd_edu.results import (
    MICRO,
    Result,
    behind,
    by_dataset,
    by_title,
    cost,
    cost_table,
    gains,
    learning_curve,
    overview_table,
    score_datasets,
    summary,
)
from mcd_edu.variants import Run


def fake(variant, seed, right, clips=None, videos=None, **record) -> Result:
    """A result whose answers are right where they are told to be."""
    number = len(right)
    truth = Predictions(np.asarray(right, int), np.ones(number, int), np.arange(number) % 9,
                        np.arange(number) // 4 if videos is None else videos, np.arange(number))
    return Result(Run(variant, seed, clips), truth, replace(truth, predicted=1 - truth.predicted),
                  clips or 99, {"train_questions": 8 * (clips or 99), **record})


def records(seconds=10., epochs=2, timed=2):
    return dict(parameters=1000, training=dict(epochs=epochs), cpu_seconds=seconds, timed_epochs=timed,
                answers_per_second=500)


def test_costs_leave_out_what_was_resumed():
    right = np.ones(9)
    group = [fake("MCD", 0, right, **records(10.)), fake("MCD", 1, right, **records(20.)),
             fake("MCD", 2, right, **records(1., timed=1))]
    assert cost(group) == (1000, 15., 500.)
    assert np.isnan(cost(group[2:]).seconds) and "| – |" in cost_table({"MCD": group[2:]})


def test_a_table_shows_where_the_reference_is_beaten():
    good, bad = np.arange(180) % 4 > 0, np.arange(180) % 4 > 2
    results = [fake(variant, seed, right, **records()) for seed in (0, 1)
               for variant, right in (("MCD", bad), ("AVST-style", good), ("question only", bad))]
    table = by_dataset(results)["music_avqa"]
    assert list(table) == ["MCD", "question only", "AVST-style"]          # the order of VARIANTS
    found = gains(table)
    assert list(found) == ["question only", "AVST-style"]
    assert found["AVST-style"] == compare(*([r.test for r in table[name]] for name in ("MCD", "AVST-style")))
    lost = behind(found)
    assert {variant for variant, *_ in lost} == {"AVST-style"} and MICRO in [row for _, row, _ in lost]
    assert behind(found, rows=[MICRO]) == [("AVST-style", MICRO, found["AVST-style"][MICRO])]
    lines = cost_table(table).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "| -50.0 (" in lines[-1] and "1,000" in lines[-1]
    overview = overview_table(score_datasets(results))
    assert "| **75.0** (" in overview.splitlines()[-1] and overview.count("**") == 2
    assert gains({"AVST-style": table["AVST-style"]}) == {}


def test_one_table_holds_one_size_of_training_set():
    right = np.ones(9)
    with pytest.raises(ValueError, match="clips differs"):
        by_dataset([fake("MCD", 0, right), fake("AVST-style", 0, right, clips=3)])


def test_a_summary_averages_over_seeds():
    generator = np.random.default_rng(0)
    results = [fake(variant, seed, generator.random(90) < .5)
               for seed in (2, 0, 1) for variant in ("MCD", "question only")]
    assert [r.run.seed for r in by_title(results)["MCD"]] == [0, 1, 2]
    table = summary(results)
    assert list(table) == ["MCD", "question only"] and tuple(table["MCD"]) == ROWS
    group = [r.test for r in results if r.run.variant == "MCD"]
    each = [averages(p.right, p.types) for p in group]
    for row in ROWS:
        assert table["MCD"][row].value == pytest.approx(np.mean([values[row] for values in each]))
    assert table["MCD"] == score(group)
    control = summary(results, "shuffled")
    assert control["MCD"][MICRO].value == pytest.approx(100 - table["MCD"][MICRO].value)


def test_seeds_do_not_narrow_what_the_clips_leave_open():
    """Ten seeds with the same answers are as uncertain as one."""
    right = np.repeat(np.arange(20) % 2, 4)
    one = summary([fake("MCD", 0, right)])["MCD"][MICRO]
    assert summary([fake("MCD", seed, right) for seed in range(10)])["MCD"][MICRO] == pytest.approx(one)


def test_seeds_twice_or_other_settings_are_not_averaged():
    right = np.ones(9)
    with pytest.raises(ValueError, match="twice"):
        summary([fake("MCD", 0, right), fake("MCD", 0, right)])
    other = fake("MCD", 1, right)
    other = replace(other, run=replace(other.run, training=dict(epochs=3)))
    with pytest.raises(ValueError, match="different settings"):
        summary([fake("MCD", 0, right), other])


def test_a_learning_curve_has_a_point_for_each_number_of_clips():
    generator = np.random.default_rng(0)
    results = [fake("MCD", seed, generator.random(90) < share, clips)
               for clips, share in ((None, .9), (10, .3), (30, .6)) for seed in (0, 1)]
    results += [fake("question only", 0, np.ones(90))]
    points = learning_curve(results, row="Visual (all)")
    assert [(p["clips"], p["seeds"], p["questions"]) for p in points] == [(10, 2, 80), (30, 2, 240), (99, 2, 792)]
    wanted = summary(results)["MCD, 30 clips"]["Visual (all)"]
    assert points[1]["score"] == wanted
    with pytest.raises(ValueError, match="no runs of 'MCD' with types=True"):
        learning_curve(results, types=True)
