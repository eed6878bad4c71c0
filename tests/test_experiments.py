"""A run leaves a file that is kept, checked and read back; a grid does so for many; a search leaves test alone."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

from mcd_edu import experiments
from mcd_edu.data import DataError
from mcd_edu.datasets import load_splits
from mcd_edu.evaluation import compare, predict
from mcd_edu.experiments import (
    answers_per_second,
    folder_of,
    hold_back,
    make_features,
    missing_runs,
    pack,
    question_digest,
    read_record,
    read_splits,
    read_truth,
    run_grid,
    run_one,
    try_one,
    unpack,
)
from mcd_edu.models import MODELS, config_for
from mcd_edu.results import (
    by_dataset,
    cost,
    cost_table,
    learning_curve,
    load_results,
    search_table,
)
from mcd_edu.samples import action_set
from mcd_edu.training import TrainingConfig, load_checkpoint, make_toy_set
from mcd_edu.variants import VARIANTS, Run

BRIEF = dict(epochs=2, num_videos=4)


def untimed(record):
    return {key: value for key, value in record.items() if "second" not in key and key != "timed_epochs"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    make_toy_set(path, num_train=6, num_val=2, num_test=5, per_video=4)
    return path


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """Models that train in no time; worker processes do not know of it."""
    small = dict(embed_dim=16, num_heads=2, num_blocks=1, shared_dim=8, hidden_dim=16)

    def config(kind, **options):
        known = {field.name for field in fields(MODELS[kind][0])}
        return config_for(kind=kind, **{k: v for k, v in small.items() if k in known}, **options)
    monkeypatch.setattr(experiments, "config_for", config)


@pytest.fixture
def go(data, tmp_path):
    def go(*args, **options):
        run = Run(*args, **{"training": BRIEF, **options})
        return run, run_one(run, data, tmp_path / "results", tmp_path / "work")
    return go


# Runs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", [name for name in VARIANTS if "music_avqa" in VARIANTS[name].datasets])
def test_every_variant_runs(go, data, variant):
    run, file = go(variant, clips=3)
    record = json.loads(file.read_text())
    assert file.name == f"{run.name}.json" and record["run"] == asdict(run)
    assert record["training"] == asdict(TrainingConfig(epochs=2, num_videos=4))
    assert record["model"].items() >= VARIANTS[variant].options.items()
    assert len(record["history"]) == 2 and record["train_questions"] == 12
    assert all(len(unpack(record["predicted"][name])) == 20 for name in ("test", "shuffled"))
    assert record["timed_epochs"] == 2 and record["answers_per_second"] > 0 and record["parameters"] > 0


def test_the_file_holds_what_the_checkpoint_says(go, data, tmp_path):
    run, file = go("MCD", types=True)
    model, *_ = load_checkpoint(tmp_path / "work" / run.name)
    test, record = load_splits(data, types=True)["test"], json.loads(file.read_text())
    assert (unpack(record["predicted"]["test"]) == predict(model, test).predicted).all()
    assert (unpack(record["predicted"]["shuffled"]) == predict(model, test, shuffle_videos=True).predicted).all()


def test_what_is_there_is_kept(go, monkeypatch):
    _, file = go("MCD")
    before = file.read_bytes()
    monkeypatch.setattr(experiments, "train", lambda *args, **kw: pytest.fail("trained again"))
    assert go("MCD")[1] == file and file.read_bytes() == before


def test_another_run_of_the_same_name_is_refused(go):
    _, file = go("MCD")
    before = file.read_bytes()
    with pytest.raises(DataError, match="other settings.*epochs") as error:
        go("MCD", training=dict(BRIEF, epochs=3))
    assert str(file) in str(error.value) and file.read_bytes() == before


def test_a_run_that_was_stopped_goes_on(go, tmp_path, monkeypatch):
    _, file = go("MCD")
    whole = json.loads(file.read_text())
    file.unlink()
    real = experiments.predict
    monkeypatch.setattr(experiments, "predict", lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go("MCD")
    assert not file.exists() and not list(file.parent.glob(".*"))
    monkeypatch.setattr(experiments, "predict", real)
    again = json.loads(go("MCD")[1].read_text())
    assert untimed(again) == untimed(whole)


# Grids -----------------------------------------------------------------------------------------

class Now:
    """In place of worker processes: everything at once, here, and in reverse order."""
    def __init__(self, *args, **kw): self.jobs = []
    def __enter__(self): return self
    def __exit__(self, *args): pass

    def submit(self, function, *args):
        from concurrent.futures import Future
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def test_a_grid_returns_files_in_the_order_of_its_runs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Now)
    runs = [Run("MCD", s, clips=c, training=BRIEF) for s in (1, 0) for c in (3, 2)]
    files = run_grid(runs, data, tmp_path / "results", tmp_path / "work")
    assert [file.stem for file in files] == [run.name for run in runs]
    times = [file.stat().st_mtime_ns for file in files]
    more = run_grid([*runs, Run("MCD", 2, clips=2, training=BRIEF)], str(data), str(tmp_path / "results"),
                    str(tmp_path / "work"))
    assert more[:4] == files and [file.stat().st_mtime_ns for file in files] == times


def test_a_failure_is_reported_after_the_others_are_done(data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Now)
    runs = [Run("MCD", aside=.01, training=BRIEF), Run("MCD", 1, clips=2, training=BRIEF)]
    with pytest.raises(DataError, match="aside=0.01"):
        run_grid(runs, data, tmp_path / "results", tmp_path / "work")
    assert [file.stem for file in (tmp_path / "results").iterdir()] == [runs[1].name]


def test_a_grid_is_refused_before_anything_is_trained(data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", lambda *args, **kw: pytest.fail("began"))
    with pytest.raises(ValueError, match="MCD-clipsall-seed0 is there twice"):
        run_grid([Run("MCD"), Run("MCD", training=BRIEF)], data, tmp_path, tmp_path)
    (tmp_path / f"{Run('MCD').name}.json").write_text("{")
    with pytest.raises(DataError, match="not a result file"):
        run_grid([Run("MCD")], data, tmp_path, tmp_path)


def test_worker_processes_give_the_same_bits(data, tmp_path, monkeypatch):
    """One real worker, with a model of the usual size."""
    monkeypatch.undo()
    run = Run("question only", clips=2, training=dict(epochs=1))
    there, = run_grid([run], data, tmp_path / "there", tmp_path / "work there", workers=1)
    here = run_one(run, data, tmp_path / "here", tmp_path / "work here")
    first, second = (json.loads(file.read_text()) for file in (there, here))
    assert untimed(first) == untimed(second)


# Teachers and students -------------------------------------------------------------------------

STUDENTS = "student (feature KD)", "student (logit KD)"


@pytest.fixture
def taught(data, tmp_path, monkeypatch):
    """A grid of both students of a teacher who stands behind them, and the order of the trainings."""
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Now)
    order, real = [], experiments.train

    def train(config, learn, val, folder, *args, **options):
        history = real(config, learn, val, folder, *args, **options)
        if options["on_epoch"].__self__: order.append(folder.name)      # it did train
        return history
    monkeypatch.setattr(experiments, "train", train)
    runs = [Run(name, clips=3, training=BRIEF) for name in (*STUDENTS, "graph teacher")]

    def go(runs=runs): return run_grid(runs, data, tmp_path / "results", tmp_path / "work")
    return go, runs, order


def test_a_teacher_is_trained_first_and_once(taught, data):
    go, runs, order = taught
    files = go()
    assert [file.stem for file in files] == [run.name for run in runs]
    assert order == [runs[2].name, runs[0].name, runs[1].name]
    first, second, teacher = (json.loads(file.read_text()) for file in files)
    assert first["model"]["distillation"] == "feature" and second["model"]["distillation"] == "logit"
    assert teacher["model"]["num_layers"] == 4 and first["model"]["num_layers"] == 1
    alone = json.loads(run_one(replace(runs[0], variant="graph student"), data, files[0].parent / "x",
                               files[0].parent / "y").read_text())
    assert alone["history"] != first["history"] != second["history"]


def test_a_teacher_who_is_not_in_the_list_leaves_no_result(taught, tmp_path):
    go, runs, order = taught
    go(runs[:1])
    assert order == [runs[2].name, runs[0].name]
    assert [file.stem for file in (tmp_path / "results").iterdir()] == [runs[0].name]
    go()                                                 # grows: the teacher is not trained again
    assert order == [runs[2].name, runs[0].name, runs[1].name]


def test_a_teacher_whose_checkpoint_is_gone_comes_back(taught, tmp_path):
    import shutil
    go, runs, order = taught
    files = go()
    before = files[0].read_text()
    files[0].unlink()
    shutil.rmtree(tmp_path / "work")
    order.clear()
    assert missing_runs(runs, tmp_path / "results") == runs[:1]
    assert go() == files and order == [runs[2].name, runs[0].name]
    assert untimed(json.loads(files[0].read_text())) == untimed(json.loads(before))


def test_students_of_one_seed_alone_need_no_grid(go, tmp_path):
    run, file = go(STUDENTS[0], clips=3)
    assert file.is_file() and (tmp_path / "work" / run.teacher.name / "model.safetensors").is_file()


def test_a_teacher_that_fails_fails_its_student(taught, tmp_path):
    go, runs, _ = taught
    go(runs[2:])
    with pytest.raises(ValueError, match="other settings"):
        go([replace(runs[0], training=dict(BRIEF, epochs=3))])


# Other datasets --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """A few silent clips."""
    folder = tmp_path_factory.mktemp("silent")
    action_set.build_action_set(folder, "msvd_qa", SMALL_SET, workers=0)
    return folder


SMALL_SET = action_set.ActionSetConfig(num_train=8, num_val=3, num_test=4, num_videos=0)


@pytest.fixture
def both(data, silent):
    return {"music_avqa": data, "msvd_qa": silent}


@pytest.fixture
def two_sets(both, tmp_path):
    """Result files of two datasets, in one folder."""
    for dataset in both:
        for variant in ("MCD", "AVST-style"):
            run_one(Run(variant, training=BRIEF, dataset=dataset), both, tmp_path / "results", tmp_path / "work")
    return load_results(tmp_path / "results", both)


def test_results_of_several_datasets_are_kept_apart(two_sets, both, tmp_path):
    tables = by_dataset(two_sets)
    assert {name: list(table) for name, table in tables.items()} == {
        name: ["MCD", "AVST-style"] for name in ("music_avqa", "msvd_qa")}
    for name, table in tables.items():
        splits = load_splits(both[name], name)
        for group in table.values():
            result, = group
            model, *_ = load_checkpoint(tmp_path / "work" / result.run.name)
            wanted = predict(model, splits["test"])
            assert result.test.schema == splits["test"].schema and result.test.schema.name == name
            assert (result.test.predicted == wanted.predicted).all() and result.test.right.sum() == wanted.right.sum()
            assert result.clips == len(splits["train"].videos)
    assert len(learning_curve(two_sets)) == len(learning_curve(two_sets, dataset="msvd_qa")) == 1
    with pytest.raises(ValueError, match="avqa"):
        learning_curve(two_sets, dataset="avqa")
    with pytest.raises(ValueError, match="different test sets"):
        compare(tables["music_avqa"]["MCD"][0].test, tables["msvd_qa"]["MCD"][0].test)


def test_results_are_read_without_features(two_sets, both, silent, tmp_path):
    import shutil
    bare = tmp_path / "bare"
    shutil.copytree(silent, bare, ignore=shutil.ignore_patterns("feats", "video"))
    again = load_results(tmp_path / "results", {**both, "msvd_qa": bare})
    assert [r.run for r in again] == [r.run for r in two_sets]
    assert all((a.test.right == b.test.right).all() for a, b in zip(again, two_sets))


def test_a_dataset_without_a_folder_or_with_that_of_another_is_refused(two_sets, data, silent, tmp_path):
    for folders, message in (({"music_avqa": data}, "no folder given for msvd_qa"),
                             ({"music_avqa": data, "msvd_qa": data}, "_qa.json"), (data, "_qa.json"),
                             ({"music_avqa": silent, "msvd_qa": silent}, "avqa-t")):
        with pytest.raises(DataError, match=message):
            load_results(tmp_path / "results", folders)
    assert folder_of("x", "avqa") == folder_of({"avqa": "x"}, "avqa")
    file = tmp_path / "results" / f"{two_sets[0].run.name}.json"
    record = json.loads(file.read_text())
    record["schema"]["name"] = "avqa"
    file.write_text(json.dumps(record))
    with pytest.raises(DataError, match="answers of avqa"):
        load_results(tmp_path / "results", {"music_avqa": data, "msvd_qa": silent})


def test_missing_features_are_made(silent, tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(action_set, "ACTION_SETS", {"msvd_qa": SMALL_SET})
    bare = tmp_path / "msvd_qa"
    shutil.copytree(silent, bare, ignore=shutil.ignore_patterns("feats"))
    make_features(tmp_path, "msvd_qa")                   # not a sample set: left alone
    make_features(bare, "msvd_qa", workers=0)
    for file in silent.glob("feats/*/*.npy"):
        assert file.read_bytes() == (bare / file.relative_to(silent)).read_bytes()
    monkeypatch.setattr(experiments, "build_action_set", lambda *args, **kw: pytest.fail("made again"))
    make_features(bare, "msvd_qa")


def test_files_of_the_first_form_are_read(go, data, tmp_path):
    """They name no dataset, no schema, no speed."""
    _, file = go("MCD")
    record = json.loads(file.read_text())
    for key in ("schema", "answers_per_second", "timed_epochs"): del record[key]
    del record["run"]["dataset"]
    new, = load_results(tmp_path / "results", data)
    file.write_text(json.dumps(record))
    old, = load_results(tmp_path / "results", data)
    assert old.run == new.run and (old.test.right == new.test.right).all() and old.test.schema == new.test.schema
    assert cost([old]).seconds == record["cpu_seconds"] and np.isnan(cost([old]).answers_per_second)
    assert not missing_runs([old.run], tmp_path / "results") and "| – |" in cost_table({"MCD": [old]})


def test_speed_is_counted_in_answers(data):
    from mcd_edu.models import build
    part = load_splits(data)["test"]
    assert answers_per_second(build(config_for("late_fusion", part)), part, passes=1) > 1


# Reading results -------------------------------------------------------------------------------

def test_results_are_rebuilt(go, data, tmp_path):
    run, _ = go("MCD", seed=1, clips=4)
    go("question only")
    found = load_results(tmp_path / "results", data)
    assert [result.run.variant for result in found] == ["MCD", "question only"]
    assert found[0].run == run and found[0].clips == 4 and found[1].clips == 6
    model, *_ = load_checkpoint(tmp_path / "work" / run.name)
    test = load_splits(data, clips=4)["test"]
    for result, shuffle in ((found[0].test, False), (found[0].shuffled, True)):
        wanted = predict(model, test, shuffle_videos=shuffle)
        for name in ("predicted", "answers", "types", "videos", "question_ids"):
            assert (getattr(result, name) == getattr(wanted, name)).all()


def test_files_without_a_digest_are_read(go, data, tmp_path):
    _, file = go("MCD")
    record = json.loads(file.read_text())
    assert record.pop("test_questions") == question_digest(load_splits(data)["test"].questions)
    file.write_text(json.dumps(record))
    assert len(load_results(tmp_path / "results", data)) == 1


def test_each_split_has_its_own_questions(go, data, tmp_path):
    go("MCD")
    go("MCD", annotations="json_by_question")
    second, first = load_results(tmp_path / "results", data)  # by name
    assert first.run.annotations == "json" and second.run.annotations == "json_by_question"
    assert not np.array_equal(first.test.question_ids, second.test.question_ids)


@pytest.mark.parametrize("spoil", [
    lambda text: text[:-10], lambda text: "[]", lambda text: "{}", lambda text: '{"run": 3}',
    lambda text: text.replace('"variant": "MCD"', '"variant": "M"'),
    lambda text: text.replace('"shuffled"', '"shuffle"'),
])
def test_broken_files_are_refused(go, data, tmp_path, spoil):
    _, file = go("MCD")
    file.write_text(spoil(file.read_text()))
    with pytest.raises(DataError, match="not a result file") as error:
        load_results(tmp_path / "results", data)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


PLAIN = {"run": {"variant": "MCD", "seed": 0}, "training": {"seed": 0, "epochs": 1}, "history": [],
         "predicted": {"test": [0] * 20, "shuffled": [0] * 20}}
CHOICES = {"name": "music_avqa", "answers": [], "question_types": [["Audio", "Counting"]], "num_choices": 4}
COLUMN = "holds something other than whole numbers from 0"


def changed(**parts):
    """A small result file, with other entries in its parts."""
    return {**PLAIN, **{key: {**PLAIN.get(key, {}), **part} if isinstance(part, dict) else part for key, part in parts.items()}}


@pytest.mark.parametrize("parts, message", [
    *(({"predicted": {"test": [number] * 20}}, COLUMN) for number in (10**30, 1e999, -1, .5, "1", True, None, [0])),
    ({"predicted": {"test": 3}}, "'test' of 'predicted' of the file is of kind int"), ({"predicted": [0]}, "of kind list"),
    *(({"run": {"clips": clips}}, "clips is of kind") for clips in ("x", [1], 1.5, True)), ({"run": {"clips": 0}}, "clips=0"),
    ({"run": {"annotations": ["json"]}}, "annotations is of kind list"),
    *(({"run": {"annotations": name}}, "plain name of a folder") for name in ("../data/json", "/x", "..", "", "\x1b[2J", "x\n")),
    ({"run": {"types": "x"}}, "types is of kind str"), ({"run": {"options": [1]}}, "options is of kind list"),
    ({"run": {"variant": ["MCD"]}}, "variant is of kind list"), ({"run": {"seed": 1.}}, "seed is of kind float"),
    ({"run": {"variant": "repeated videos", "training": {"num_questions": [1]}}}, "training is not made of names"),
    ({"schema": CHOICES}, "does not fit the answers of music_avqa"), ({"schema": 3}, "its schema is none"),
    ({"measured": "x"}, "'measured' of the file is of kind str"), ({"measured": {"pointing": 3}}, "of kind int"),
    ({"measured": {"pointing": {"words, sound": {"all": "x"}}}}, "'all' of 'words, sound'"),
    ({"measured": {"parts": {"test": {"loss": "x"}}}}, "'loss' of 'test' of 'parts'"),
    ({"measured": {"parts": {"test": 1}}}, "'test' of 'parts' of 'measured' of the file is of kind int"),
    ({"measured": {"parts": {"test": {"reliability": [[.5, "x", 1]]}}}}, "1 of 0 of 'reliability'"),
    ({"measured": {"disturbed": {"audio, noise": 1e999}}}, "out of range"),
    ({"measured": {"diversity": {"x": 10**400}}}, "out of range"),
    ({"cpu_seconds": "x"}, "'cpu_seconds' of the file"), ({"parameters": [1]}, "'parameters'"), ({"history": 3}, "'history'"),
])
def test_results_of_other_kinds_are_refused(data, tmp_path, parts, message):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(changed(**parts)))
    with pytest.raises(DataError, match=message) as error:
        load_results(tmp_path, data)
    assert str(error.value).startswith(f"{file}: ") and str(error.value).isprintable()


def test_the_smallest_result_file_is_read(data, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(changed(measured={"diversity": {"words, sound": float("nan")}}, more=[{}])))
    found = load_results(tmp_path, data)
    assert found[0].run == Run("MCD") and "| – | – | – |" in cost_table(by_dataset(found)["music_avqa"])
    with pytest.raises(DataError, match="not a result file"):
        search_table(tmp_path)                           # of a search there is a history


@pytest.mark.parametrize("folder", ["all_models", "claims", "precision", "sample_set", "search"])
def test_results_that_are_kept_here_are_still_read(folder):
    files = list((Path(__file__).parent.parent / "results" / folder).rglob("*.json"))
    for file in files:
        record = read_record(file, tested=folder != "search")
        assert Run(**record["run"]).name == file.stem
    assert files


def test_results_of_another_test_set_are_refused(go, tmp_path):
    go("MCD")
    for name, sizes in (("more", dict(num_test=6)), ("other", dict(num_test=5, seed=3))):
        make_toy_set(tmp_path / name, num_train=2, num_val=2, per_video=4, **sizes)
        with pytest.raises(DataError, match="another test set"):
            load_results(tmp_path / "results", tmp_path / name)
    with pytest.raises(DataError, match="no result files"):
        load_results(tmp_path, tmp_path / "other")


def test_the_digest_sees_questions_and_answers_and_not_their_order(data):
    questions = load_splits(data)["test"].questions
    assert question_digest(questions) == question_digest(questions[::-1])
    for change in (dict(answer="tuba"), dict(question_id=99), dict(video_id="x")):
        assert question_digest([replace(questions[0], **change), *questions[1:]]) != question_digest(questions)


# What is shown, set aside, measured; a search --------------------------------------------------

@pytest.mark.parametrize("name, keywords, kinds", [
    ("no text objects", False, 0), ("types only, oracle", False, 1), ("predicted types only", False, 1),
    ("keywords and types, oracle", True, 1), ("keywords and predicted types", True, 1), ("MCD", True, 0)])
def test_what_a_variant_is_shown(data, name, keywords, kinds):
    test = read_splits(Run(name), data)["test"]
    words = test.vocabulary.words
    for q, row in zip(test.questions, test.objects.tolist()):
        seen = {words[i] for i in row if i}
        known = {v.lower() for v in q.values} & set(words)
        assert seen >= known or not keywords
        if not keywords and not kinds:
            assert not seen
        assert any(w in seen for w in ("audio", "visual")) == bool(kinds)
    assert (test.types == load_splits(data)["test"].types).all()


def test_questions_are_set_aside_in_every_video_and_by_nothing_but_their_ids(data):
    train = load_splits(data)["train"]
    kept, aside = hold_back(train, .25)
    assert sorted([*kept, *aside]) == list(range(len(train)))
    assert np.bincount(train.video[aside]).tolist() == [1] * 6
    few, same = hold_back(train, .25, per_video=2)
    assert (same == aside).all() and set(few) <= set(kept) and np.bincount(train.video[few]).tolist() == [2] * 6
    splits, fewer = (read_splits(Run("MCD", clips=clips, aside=.25), data) for clips in (None, 3))
    ids = set(splits["seen"].question_ids.tolist())
    assert not ids & set(splits["train"].question_ids.tolist()) and set(fewer["seen"].question_ids.tolist()) < ids
    assert set(splits["seen"].video.tolist()) == set(splits["train"].video.tolist())
    assert "seen" not in read_splits(Run("MCD", per_video=1), data)
    with pytest.raises(DataError, match="0 set aside"):
        hold_back(train, .01)


@pytest.mark.parametrize("numbers, kind", [
    ([], "u1"), ([0, 255], "u1"), ([256], "u2"), ([70_000, 1], "u4"), ([True, False], "u1")])
def test_packed_columns_come_back(numbers, kind):
    packed = pack(numbers)
    assert packed.startswith(kind + ":") and unpack(packed).tolist() == [int(x) for x in numbers]
    assert unpack([int(x) for x in numbers]).tolist() == [int(x) for x in numbers]


@pytest.mark.parametrize("broken", ["", "u3:abc", "u1:%%%", "u1:aGVsbG8=", "u2:" + pack([1]).partition(":")[2], None, 7])
def test_broken_columns_are_refused(broken):
    with pytest.raises(ValueError):
        unpack(broken)


def test_what_is_measured_is_what_the_model_does(go, data):
    run, file = go("late gate, matched", aside=.25)
    record = json.loads(file.read_text())
    parts, measured = record["measured"]["parts"], record["measured"]
    assert set(parts) == {"train", "test", "seen"} and set(measured) == {"parts", "disturbed", "diversity", "pointing"}
    model, *_ = load_checkpoint(file.parent.parent / "work" / run.name)
    for name, part in read_splits(run, data).items():
        if name == "val":
            continue
        said = predict(model, part)
        assert parts[name]["accuracy"] == said.right.mean() and parts[name]["questions"] == len(part)
        sure, right, share = np.array(parts[name]["reliability"]).T
        assert share.sum() == pytest.approx(1, abs=1e-4) and share @ right == pytest.approx(said.right.mean(), abs=1e-4)
        assert share @ abs(sure - right) == pytest.approx(parts[name]["calibration_error"], abs=1e-4)
        assert 0 < parts[name]["loss"] and 0 <= parts[name]["calibration_error"] <= 1
    assert set(measured["disturbed"]) == {f"{s}, {n}" for s in ("visual", "audio") for n in ("noise", "missing")}
    assert file.stat().st_size < 8_000 and load_results(file.parent, data)[0].record["measured"] == measured
    truth = read_truth(data)
    assert set(truth) == set(load_splits(data)["test"].videos)
    assert measured["pointing"]["words, sound"]["all"][0] > 0


def test_truth_that_is_broken_or_not_there(data, tmp_path):
    assert read_truth(tmp_path) == {}
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "test.json").write_text('[{"video_id": "a"}]')
    with pytest.raises(DataError, match="make the samples again"):
        read_truth(tmp_path)


def test_a_search_sees_val_and_not_test(data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "predict", lambda *args, **options: pytest.fail("test was asked"))
    for label, options in ("wide", {"ffn_mult": 3}), ("narrow", {"ffn_mult": 1}):
        for seed in 0, 1:
            run = Run("MCD", seed, label=label, options=options, training=BRIEF)
            file = try_one(run, data, tmp_path / "search", tmp_path / "work", show_progress=False)
    record = json.loads(file.read_text())
    assert record["model"]["ffn_mult"] == 1 and "predicted" not in record and "measured" not in record
    lines = search_table(tmp_path / "search").splitlines()
    assert len(lines) == 4 and {line.split(" | ")[0] for line in lines[2:]} == {"| MCD, wide", "| MCD, narrow"}
    values = [float(line.split(" | ")[2]) for line in lines[2:]]
    assert values == sorted(values, reverse=True)
    before = file.stat().st_mtime_ns
    assert try_one(run, data, tmp_path / "search", tmp_path / "work", show_progress=False) == file
    assert file.stat().st_mtime_ns == before
    for work in (try_one, run_one):
        with pytest.raises(ValueError, match="device 'meta' cannot be used here"):
            work(replace(run, seed=7), data, tmp_path / "nowhere", tmp_path / "work", "meta", show_progress=False)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(DataError, match="run a search first"):
        search_table(tmp_path)
    with pytest.raises(DataError, match="not a result file"):
        run_one(run, data, tmp_path / "search", tmp_path / "work", show_progress=False)
