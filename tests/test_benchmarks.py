"""The benchmark measures what it says: both ways give the same answers, and the report is whole. Nothing is timed."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def load(name: str):
    """A script of the folder benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = load("model")
epochs = load("epochs")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What a quick run writes."""
    out = tmp_path_factory.mktemp("bench") / "model.json"
    bench.main(["--quick", "--silent", "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8"))


def numbers(values: dict, *names: str) -> list:
    return [values[name] for name in names]


def test_the_report_is_whole(report):
    assert set(report) >= {"machine", "matrix", "copy_bytes_per_second", "rows", "skipped", "same_answers", "extra_question",
                           "parameters", "where_it_goes", "memory", "clips", "targets", "seconds"}
    assert set(report["machine"]) >= {"device", "cpu", "cores", "threads", "memory_gb", "torch", "python"}
    assert {row["part"] for row in report["rows"]} == {"settings", "segments", "questions", "videos", "width", "variants"}
    ways = {(row["model"], row["task"], row["how"]) for row in report["rows"] if row["part"] == "settings"}
    inference = {("inference", how) for how in ("cached", "uncached", "stored")}
    training = {("training", how) for how in ("cached", "uncached")}
    assert ways == {(kind, *way) for kind in ("mcd", "late_fusion") for way in inference | training}


def test_every_figure_is_positive_and_finite(report):
    wanted = ("seconds", "fastest", "slowest", "questions_per_second", "operations", "operations_per_second", "share",
              "share_beside", "matrix_rate_beside")
    found = [x for row in report["rows"] for x in numbers(row, *wanted)]
    found += [report["copy_bytes_per_second"], report["matrix"]["fp32"]["best"], report["clips"]["extract_times_real_time"]]
    assert all(math.isfinite(x) and x > 0 for x in found)
    assert all(row["fastest"] <= row["seconds"] <= row["slowest"] for row in report["rows"])
    for row in report["where_it_goes"]:
        assert sum(row["shares"].values()) == pytest.approx(1, abs=0.01)


def test_cached_and_uncached_answers_are_the_same(report):
    for row in report["same_answers"]:
        assert row["cached_uncached"] <= 1e-5 and row["fused_plain"] <= 1e-5, row


def test_every_parameter_receives_a_gradient(report):
    assert [row["without_gradient"] for row in report["parameters"]] == [[], []]
    assert all(sum(row["parts"].values()) <= row["parameters"] for row in report["parameters"])


def test_an_extra_question_costs_a_tenth_or_the_report_says_so(report):
    rows = [row for row in report["extra_question"] if row["model"] == "mcd"]
    told = [t["met"] for t in report["targets"] if t["target"] == "an extra question, operations, of the first"]
    assert {(row["segments"], row["width"]) for row in rows} == {(60, 512)}
    assert all(0 < row[name] for row in rows for name in ("seconds_ratio", "together_seconds_ratio"))
    assert told == [row["operations_ratio"] <= 0.1 for row in rows] and any(told)


def test_a_target_is_met_where_its_figure_is_on_the_right_side(report):
    for row in report["targets"]:
        sign, wanted = row["wanted"].split()
        assert row["met"] == (row["measured"] >= float(wanted) if sign == "≥" else row["measured"] <= float(wanted)), row


def test_operations_are_those_of_the_matrix_products():
    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8)
    assert bench.operations(lambda: layer(x)) == 2 * 4 * 8 * 16
    assert bench.operations(lambda: layer(x).sum().backward()) == 2 * 2 * 4 * 8 * 16  # x wants no gradient


def test_attention_and_lstm_are_counted():
    x, attend = torch.randn(1, 2, 3, 4), torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        assert bench.operations(lambda: attend(x, x, x)) == 2 * 2 * 2 * 3 * 3 * 4
        lstm = torch.nn.LSTM(4, 6)
        assert bench.operations(lambda: lstm(torch.randn(5, 1, 4))) == 2 * 5 * 4 * 6 * (4 + 6)


def test_an_encoded_video_is_not_encoded_again():
    setting = replace(bench.TOY, questions=4)
    model, batch = bench.make_model("mcd", setting, "cpu"), bench.make_batch(setting, "cpu")
    state, alone = bench.encode(model, batch), bench.one_a_row(batch)
    counts = {"video": lambda: bench.encode(model, batch), "cached": lambda: bench.answer(model, batch),
              "stored": lambda: bench.answer_stored(model, batch, state), "uncached": lambda: bench.answer(model, alone)}
    counts = {name: bench.operations(step) for name, step in counts.items()}
    assert counts["cached"] == counts["video"] + counts["stored"]
    assert counts["uncached"] == 4 * counts["video"] + counts["stored"]


def test_the_batch_of_one_question_a_row_asks_the_same():
    batch = bench.make_batch(bench.TOY, "cpu")
    alone = bench.one_a_row(batch)
    assert alone.tokens.shape == (10, 1, bench.WORDS[1]) and alone.visual.shape[0] == 10
    assert alone.video_ids.tolist() == [0] * 5 + [1] * 5
    torch.testing.assert_close(alone.tokens.flatten(), batch.tokens.flatten())
    torch.testing.assert_close(alone.visual[7], batch.visual[1])


def test_what_fails_to_compile_is_skipped_with_its_reason(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler here\nand a long story")
    monkeypatch.setattr(torch, "compile", broken)
    rates = {"fp32": {"best": 1e9}}
    rows, skipped = bench.variants(bench.TOY, ["plain", "compiled"], 1, "cpu", rates)
    assert {row["variant"] for row in rows} == {"plain"}
    assert skipped == [{"variant": "compiled", "reason": "RuntimeError: no compiler here"}]


def test_the_shipped_report_is_of_this_benchmark():
    shipped = json.loads((ROOT / "benchmarks/model.json").read_text(encoding="utf-8"))
    assert not shipped["quick"] and {row["part"] for row in shipped["rows"]} >= {"settings", "segments", "width"}
    assert {(row["segments"], row["questions"]) for row in shipped["rows"] if row["part"] == "settings"} >= {
        (t, k) for t in (10, 60) for k in (1, 5, 20)}


# A whole training ------------------------------------------------------------------------------

def test_a_whole_training_is_timed_and_bounded(tmp_path):
    epochs.main(["--quick", "--silent", "--device", "cpu", "--precision", "bfloat16", "--out", str(tmp_path / "epochs.json")])
    found = json.loads((tmp_path / "epochs.json").read_text(encoding="utf-8"))
    size, floors = found["size"], found["floor_of_an_epoch"]
    assert found["met"] is None and found["precision"] == "bfloat16" and found["resident"] and found["processes"] == 1
    assert len(found["epoch_seconds"]) == size["epochs"] and found["seconds"] == pytest.approx(sum(found["epoch_seconds"]))
    assert found["share"] == pytest.approx(floors["operations"] * size["epochs"] / found["seconds"] / found["matrix_rate"])
    assert all(0 < floors[name] < 60 for name in ("matrix_products", "optimizer", "layout_of_batches")) and floors["steps"] == 3


def test_the_made_up_dataset_has_the_shapes_of_the_real_one():
    full = epochs.Size()
    assert (full.videos, full.questions, full.segments, full.width, full.epochs) == (9288, 31_927, 60, 512, 30)
    data = epochs.MadeUp(replace(epochs.TOY, videos=7, questions=30))
    assert len(data) == 30 and data.visual.shape == (7, 6, 16) and set(data.video.tolist()) == set(range(7))
    batches = list(data.batches(3, 16, seed=1))
    assert sorted(x for b in batches for x in b.question_ids[b.question_mask].tolist()) == list(range(30))


def test_the_operations_of_an_epoch_are_those_of_its_batches():
    """All batches counted, and two of three scaled up: the same within what questions differ."""
    data = epochs.MadeUp(epochs.TOY)
    team = epochs.Team(torch.device("cpu"))
    feed, config = epochs.Feed(data, team), epochs.TrainingConfig(num_videos=8)
    step = epochs.Step(epochs.build(epochs.model_config(epochs.TOY)), team)
    few, every = (epochs.epoch_operations(step, feed, config, batches) for batches in (2, 99))
    assert few == pytest.approx(every, rel=.2) and every > 0
