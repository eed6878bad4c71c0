"""Claims become numbers and verdicts; the notebook runs with no results, some results and through the command line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from notebooks import read_parameters, run_notebook

from mcd_edu.claims import (
    CLAIMS,
    CLUE,
    LATE,
    MEASURES,
    TOPICS,
    Claim,
    Judged,
    by_seed,
    by_size,
    claim_runs,
    claims_table,
    counted,
    curve,
    forest,
    gain,
    headline,
    holm,
    judge,
    pointing_above_chance,
    reference_table,
)
from mcd_edu.cli import main
from mcd_edu.data import MUSIC_AVQA
from mcd_edu.evaluation import Predictions
from mcd_edu.measures import Paired
from mcd_edu.results import Result, load_results
from mcd_edu.training import make_toy_set
from mcd_edu.variants import ABLATIONS, VARIANTS, Run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "experiments" / "claims.ipynb"


def made_up(variant, seed, right, clips=None, loss=None, **run):
    """A result with so many right answers of a hundred."""
    zeros = np.zeros(100, int)
    said = Predictions((np.arange(100) >= right).astype(int), zeros, zeros, np.arange(100) // 10, np.arange(100), MUSIC_AVQA)
    measured = {"parts": {"test": {"loss": loss, "accuracy": right / 100}}} if loss is not None else {"parts": {}}
    return Result(Run(variant, seed, clips, **run), said, said, 1, {"measured": measured})


def table(better, other, names=("MCD", "no LEF")):
    return {name: [made_up(name, seed, right) for seed, right in values.items()]
            for name, values in zip(names, (better, other))}


def test_every_claim_has_its_runs_and_its_topic():
    runs = claim_runs(2)
    trained = {run.variant for run in runs}
    assert {name for claim in CLAIMS for name in (claim.better, claim.than) if name} <= trained
    assert {claim.topic for claim in CLAIMS} == set(TOPICS) and len(set(CLAIMS)) == len(CLAIMS)
    assert set(ABLATIONS) <= trained and len({run.name for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert runs[0].variant == "MCD" and len(claim_runs(5)) * 2 == len(runs) * 5
    assert {run.variant for run in claim_runs(1, variants=["no LEF"])} == {"no LEF"}


def test_other_sizes_of_the_training_set_are_learned_for_about_as_many_steps():
    """A smaller set is shown at most four times as often; of more videos there are fewer questions."""
    def steps(run):                                                      # 14 of 16 questions are not aside
        rows = run.clips * math.ceil((run.per_video or 14) / run.config.num_questions)
        return rows / run.config.num_videos * run.config.epochs
    first, *others = claim_runs(1, variants=[CLUE])
    assert {round(run.clips / first.clips, 2): round(steps(run) / steps(first), 2) for run in others} == {
        .1: .4, .25: 1, .5: 1, 2: 1, 4: 1}
    asked = {run.clips: run.clips * (run.per_video or 14) * run.config.epochs / steps(run) for run in (first, *others)}   # a step
    assert all(.8 < number / asked[first.clips] < 1.05 for number in asked.values())


def test_gain_pairs_the_seeds_and_knows_which_way_is_better():
    claim = Claim("parts", "accuracy", "MCD", "no LEF")
    assert gain(claim, table({0: 70, 1: 72, 5: 99}, {1: 60, 0: 65, 2: 1})) == [5, 12]
    assert gain(claim, table({0: 70}, {1: 60})) == [] == gain(claim, {})
    lower = Claim("overfitting", "test loss", "MCD", "no LEF")
    losses = {name: [made_up(name, 0, 50, loss=loss)] for name, loss in (("MCD", 1.), ("no LEF", 1.5))}
    assert gain(lower, losses) == [.5]
    assert by_seed([made_up("MCD", 0, 50)], "test loss") == {}   # early files hold no such number
    alone = Claim("pointing", "accuracy", "MCD")
    assert gain(alone, table({0: 70, 1: 50}, {})) == [70, 50]


def test_verdicts_and_tables():
    claims = [Claim("parts", "accuracy", "MCD", "no LEF"), Claim("parts", "accuracy", "no LEF", "MCD"),
              Claim("parts", "accuracy", "MCD", "no residual"), Claim("parts", "accuracy", "MCD", "N = 0")]
    results = {**table({0: 70, 1: 71, 2: 72}, {0: 60, 1: 60, 2: 61}),
               "N = 0": [made_up("N = 0", seed, right) for seed, right in enumerate((60, 80, 71))]}
    judged = judge(claims, results)
    assert [one.verdict for one in judged] == ["holds", "does not hold", "not measured yet", "undecided on this data"]
    lines = claims_table(judged).splitlines()
    assert len(lines) == 6 and "**holds**" in lines[2] and "| 3 |" in lines[2] and "| – | – | 0 | not measured yet" in lines[4]
    row = next(line for line in headline(judged).splitlines() if line.startswith(f"| {TOPICS['parts']}"))
    assert row.endswith("| 4 | 1 | 1 | 1 | 1 |")
    assert counted(judged) == "Of 3 lines, 1 (1 after Holm's correction) hold and 1 (1 after Holm's correction) do not."
    assert len(forest(judged, "x").data[0].x) == 3 and forest(judge(claims, {}), "x") is None


def test_holm_by_hand():
    judged = [Judged(None, None if p is None else Paired(1, 0, 2, p, 3), "") for p in (.01, None, .04, .03, float("nan"), .5)]
    np.testing.assert_allclose(holm(judged), [.04, np.nan, .09, .09, np.nan, .5])
    assert holm([]) == []


def test_the_controls_take_away_what_does_not_come_from_the_clip():
    result = made_up("MCD", 0, 50)
    right = replace(result.test, answers=np.arange(100) % 2)                     # ten questions of a clip, two answers
    told = replace(result, test=replace(right, predicted=right.answers), shuffled=replace(right, predicted=right.answers))
    assert MEASURES["told apart"](told) == 100 and MEASURES["told apart by the clip"](told) == 0
    told = replace(told, shuffled=replace(right, predicted=0 * right.answers))
    assert MEASURES["told apart by the clip"](told) == 100
    row = [9, .5, 1., .3, .2, .45, .9]           # questions, mass, hit, even, elsewhere, mates, chance of a hit
    result.record["measured"]["pointing"] = {"words, sound": {"all": row}}
    assert pointing_above_chance(result, "words, sound") == pytest.approx(5)
    result.record["measured"]["pointing"] = {"words, sound": {"all": row[:5]}}       # early files
    assert by_seed([result], "pointing: words, sound") == {}


def test_other_training_settings_stand_in_another_table():
    results = [made_up("MCD", 0, 50, training={"epochs": 5}), made_up("no LEF", 0, 50, training={"epochs": 1}),
               made_up("N = 0", 0, 50, training={"epochs": 5})]
    assert set(reference_table(results)) == {"MCD", "N = 0"}


def test_only_one_setting_stands_in_a_table():
    plain = dict(clips=9, aside=.5)
    results = [made_up("MCD", seed, 50, **plain) for seed in range(3)]
    results += [made_up("MCD", 0, 60, 4), made_up("no LEF", 0, 40, **plain)]
    found = reference_table(results)
    assert {name: len(group) for name, group in found.items()} == {"MCD": 3, "no LEF": 1}
    runs = [result.run for result in results[:2]]
    assert [r.run.seed for r in reference_table(results, runs)["MCD"]] == [0, 1] and reference_table([], runs) == {}
    sizes = by_size(results, [result.run for result in results])
    assert {size: {name: len(group) for name, group in sized.items()} for size, sized in sizes.items()} == {
        (4, 0): {"MCD": 1}, (9, 0): {"MCD": 3, "no LEF": 1}} and list(sizes) == sorted(sizes)
    points = curve(results, [result.run for result in results], "MCD", "accuracy")
    assert [(clips, each, p.value, p.seeds) for clips, each, p in points] == [(4, 0, 60, 1), (9, 0, 50, 3)]


@pytest.mark.parametrize("wrong, message", [(lambda: Claim("parts", "beauty", "MCD"), "choose one of accuracy"),
                                            (lambda: claim_runs(variants=["video only"]), "choose one of MCD")])
def test_wrong_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# The whole chain ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A toy set and results of a tiny grid, made by the command line."""
    folder = tmp_path_factory.mktemp("claims")
    make_toy_set(folder / "data", num_train=6, num_val=2, num_test=5, per_video=8)
    where = [word for name in ("data", "results", "work") for word in (f"--{name}", str(folder / name))]
    main(["experiments", "run", "MCD", "no LEF", "hard association", "--seeds", "1", "--clips", "4", "--epochs", "1",
          "--workers", "1", *where])
    return folder


def test_the_command_line_reads_what_it_made(chain, capsys):
    where = ["--results", str(chain / "results"), "--data", str(chain / "data")]
    results = load_results(chain / "results", chain / "data")
    assert {result.run.variant for result in results} == {"MCD", "no LEF", "hard association"}
    assert all(set(by_seed([result], name)) == {0} for result in results for name in MEASURES
               if "pointing" not in name and "objects" not in name)
    main(["experiments", "table", *where])
    assert "1 seeds   no LEF, 4 clips, 12.5 % aside" in capsys.readouterr().out
    main(["experiments", "table", *where, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 and all(row["seeds"] == 1 for row in rows.values())
    main(["experiments", "table", *where, "--claims"])
    out = capsys.readouterr().out.splitlines()
    line = next(line for line in out if line.endswith("accuracy: MCD better than no LEF"))
    assert len(out) == len(CLAIMS) and line.startswith("undecided on this data") and "(one seed)" in line
    main(["experiments", "table", *where, "--claims", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert {one["verdict"] for one in said} == {"undecided on this data", "not measured yet"}
    (one,) = [one for one in said if one["claim"] == "MCD better than no LEF"]
    assert one["seeds"] == 1 and np.isfinite(one["gain"]) and one["from"] is one["to"] is one["p"] is None


@pytest.mark.parametrize("words, message", [
    (["run"], "name some variants, or give --all"), (["run", "MCD", "--all"], "name some"),
    (["run", "MCD2"], "choose one of MCD"), (["table"], "no result files")])
def test_the_command_line_refuses(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["experiments", *words, "--results", str(tmp_path), "--data", str(tmp_path)])
    assert message in capsys.readouterr().err


@pytest.fixture
def show(tmp_path, monkeypatch):
    """Run the notebook; all that it shows, as one text."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")

    def show(folder, **options) -> str:
        where = {name: str(folder / name) for name in ("data", "results", "work")}
        brief = {**where, "seeds": 1, "clips": 4, "epochs": 1, **options}
        found = run_notebook(NOTEBOOK, tmp_path / "out.ipynb", brief, 200)
        outputs = [output for cell in found.cells for output in cell.get("outputs", [])]
        return "\n".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)
    return show


def test_the_notebook_says_what_is_missing(show, tmp_path):
    text = show(tmp_path)
    assert f"{len(claim_runs(1, 4, 1))} runs, 0 of them done" in text and "MCD-clips4-aside12_5-seed0" in text
    assert "make claims" in text
    assert text.count("not measured yet") >= len(CLAIMS) and not (tmp_path / "results").exists()


def test_the_notebook_shows_what_is_there(show, chain):
    text = show(chain)
    assert "3 of them done" in text and "\n| no LEF | " in text and "\n| hard association | " in text
    assert "| accuracy | MCD better than no LEF | " in text and "undecided on this data" in text
    assert "\n| MCD, above chance" in text


def test_the_parameters_that_train_everything():
    assert read_parameters(ROOT / "params" / "claims.yaml") == {"train_missing": True}
    assert replace(claim_runs(1)[0], seed=3).name == claim_runs(4, variants=["MCD"])[3].name
    assert CLUE in ABLATIONS and set(LATE) <= set(ABLATIONS) and "MCD" in VARIANTS
