"Tests of mcd_edu.samples.sample_set: splits, schema, layout, and builds that are stopped."
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from mcd_edu.data import AVQADataset, Vocabulary, read_annotations
from mcd_edu.encoders import AudioEncoder, VisualEncoder, save_encoders
from mcd_edu.features import read_feature
from mcd_edu.media import read_segments, save_array, write_json
from mcd_edu.samples.questions import TEMPLATES, Candidate, candidates
from mcd_edu.samples.sample_set import (
    ClipJob,
    SampleSetConfig,
    annotation,
    build_sample_set,
    by_question,
    held_back_pairs,
    make_clip,
    split_scenes,
    write_annotations,
)
from mcd_edu.samples.scenes import Scene, sample_scene

TINY = SampleSetConfig(num_train=6, num_val=2, num_test=2, num_videos=4)
SMALL = SampleSetConfig(num_train=120, num_val=20, num_test=60)
SPLITS = ("train", "val", "test")
KEYS = ["video_id", "question_id", "type", "question_content", "templ_values", "question_deleted",
        "anser"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    "A folder with encoders of random weights"
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    save_encoders(folder, VisualEncoder().eval(), AudioEncoder().eval())
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, encoders):
    "A tiny sample set, made in this process"
    folder = tmp_path_factory.mktemp("set") / "music_avqa"
    build_sample_set(folder, encoders, TINY, workers=0)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "The annotations of a small set"
    folder = tmp_path_factory.mktemp("small")
    write_annotations(split_scenes(SMALL), folder, SMALL)
    return folder


def load(path): return json.loads(path.read_text(encoding="utf-8"))
def files(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))


def pairs_of(scene):
    return {tuple(sorted((a.instrument, b.instrument)))
            for a, b in combinations(scene.players, 2) if a.instrument != b.instrument}


# ---- splits

def test_scenes_are_numbered_through_and_disjoint():
    scenes = split_scenes(SMALL)
    assert [len(scenes[split]) for split in SPLITS] == [120, 20, 60]
    ids = [scene.video_id for split in SPLITS for scene in scenes[split]]
    assert ids == [f"{i:08d}" for i in range(200)]
    assert len({scene.seed for split in SPLITS for scene in scenes[split]}) == 200


@pytest.mark.parametrize("seed", (0, 3))
def test_held_back_pairs_play_in_test_clips_alone(seed):
    config = SampleSetConfig(num_train=300, num_val=40, num_test=120, seed=seed)
    secret, scenes = held_back_pairs(config), split_scenes(config)
    assert len(secret) == 46 and all(a < b for a, b in secret)
    trained = {pair for split in ("train", "val") for s in scenes[split] for pair in pairs_of(s)}
    assert not trained & secret
    several = [scene for scene in scenes["test"] if len(scene.kinds) > 1]
    assert len(several) > 60 and all(pairs_of(scene) & secret for scene in several)
    seen_kinds = {kind for scene in scenes["train"] for kind in scene.kinds}
    assert all(scene.kinds <= seen_kinds for scene in scenes["test"])


def test_seeds_give_other_scenes_and_pairs():
    one, two = SampleSetConfig(seed=0), SampleSetConfig(seed=1)
    assert held_back_pairs(one) == held_back_pairs(SampleSetConfig(num_test=5))
    assert held_back_pairs(one) != held_back_pairs(two)


def test_default_scenes_are_the_same_everywhere():
    scenes = split_scenes(SampleSetConfig())
    text = json.dumps([s.to_json() for split in SPLITS for s in scenes[split]])
    assert hashlib.sha256(text.encode()).hexdigest().startswith("773469e45527e888")


def test_second_split_shares_videos_and_no_questions():
    records = [{"video_id": str(i // 16), "question_id": i} for i in range(1600)]
    parts = by_question(records, seed=1)
    assert [len(parts[split]) for split in SPLITS] == [1120, 160, 320]
    ids = [{r["question_id"] for r in parts[split]} for split in SPLITS]
    assert set.union(*ids) == set(range(1600)) and sum(map(len, ids)) == 1600
    assert parts == by_question(records, seed=1) != by_question(records, seed=2)
    videos = [{r["video_id"] for r in parts[split]} for split in SPLITS]
    assert len(videos[0] & videos[2]) > 90


# ---- schema

def test_record_is_exactly_a_real_one():
    scene = sample_scene("00000028", 3)
    number = [t.text for t in TEMPLATES].index("Is the <Object> in the video always playing?")
    record = annotation(scene, Candidate(number, ("ukulele",), "yes"), 7)
    assert json.dumps(record) == json.dumps(
        {"video_id": "00000028", "question_id": 7, "type": '["Audio-Visual", "Existential"]',
         "question_content": "Is the <Object> in the video always playing?",
         "templ_values": '["ukulele"]', "question_deleted": 0, "anser": "yes"})


def test_every_record_has_the_real_schema(written):
    for folder in ("json", "json_by_question"):
        for split in SPLITS:
            for record in load(written / folder / f"avqa-{split}.json"):
                assert list(record) == KEYS
                assert isinstance(record["video_id"], str) and record["question_deleted"] == 0
                assert isinstance(record["question_id"], int)
                modality, kind = json.loads(record["type"])
                values = json.loads(record["templ_values"])
                assert all(isinstance(value, str) for value in values)
                assert record["question_content"].count("<") == len(values)
                assert any((t.modality, t.kind, t.text) == (modality, kind, record[KEYS[3]])
                           for t in TEMPLATES)


def test_full_width_question_mark_stays_readable(written):
    text = (written / "json" / "avqa-train.json").read_text(encoding="utf-8")
    assert "？" in text and "\\uff1f" not in text


def test_answers_are_true_of_the_scenes(written):
    number = {t.text: i for i, t in enumerate(TEMPLATES)}
    for split in SPLITS:
        scenes = {r["video_id"]: Scene.from_json(r) for r in load(written / f"truth/{split}.json")}
        assert list(scenes.values()) == split_scenes(SMALL)[split]
        for r in load(written / "json" / f"avqa-{split}.json"):
            values = tuple(json.loads(r["templ_values"]))
            asked = Candidate(number[r["question_content"]], values, r["anser"])
            assert asked in candidates(scenes[r["video_id"]])


def test_the_reader_reads_it(written):
    read = {split: read_annotations(written / "json" / f"avqa-{split}.json") for split in SPLITS}
    ids = [q.question_id for split in SPLITS for q in read[split]]
    assert ids == list(range(len(ids)))
    videos = [{q.video_id for q in read[split]} for split in SPLITS]
    assert not videos[0] & videos[1] and not videos[0] & videos[2] and not videos[1] & videos[2]
    assert len({q.question_type for q in read["test"]}) == 9
    per_video = Counter(q.video_id for q in read["train"])
    assert max(per_video.values()) == 16 and len(per_video) == 120


def test_second_split_never_holds_a_test_clip(written):
    test_clips = {r["video_id"] for r in load(written / "json" / "avqa-test.json")}
    second = [r for split in SPLITS for r in load(written / f"json_by_question/avqa-{split}.json")]
    assert not test_clips & {r["video_id"] for r in second}
    first = [r for split in SPLITS[:2] for r in load(written / "json" / f"avqa-{split}.json")]
    assert sorted(map(str, second)) == sorted(map(str, first))


def test_two_builds_give_the_same_bytes(written, tmp_path):
    write_annotations(split_scenes(SMALL), tmp_path, SMALL)
    assert files(tmp_path) == files(written) and len(files(written)) == 9
    assert all((tmp_path / f).read_bytes() == (written / f).read_bytes() for f in files(written))


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, [{"a": 1}])
    with pytest.raises(TypeError): write_json(path, [{"a": object()}])
    assert load(path) == [{"a": 1}] and files(tmp_path) == ["deep/x.json"]
    write_json(path, [])
    assert load(path) == []


# ---- clips and builds

def test_layout_is_the_real_one(built):
    ids = [f"{i:08d}" for i in range(10)]
    kept = ["00000000", "00000008", "00000009"]          # a train clip and both test clips
    assert files(built) == sorted([
        "made_from.json",
        *(f"{folder}/avqa-{split}.json" for folder in ("json", "json_by_question")
          for split in SPLITS),
        *(f"truth/{split}.json" for split in SPLITS),
        *(f"feats/small_{kind}/{video}.npy" for kind in ("visual", "audio") for video in ids),
        *(f"videos/{video}.mp4" for video in kept)])


def test_features_are_a_second_a_row(built):
    for kind, dim in (("visual", 192), ("audio", 128)):
        for path in (built / "feats" / f"small_{kind}").iterdir():
            assert read_feature(path, dim).shape == (10, dim)
            assert np.load(path).dtype == np.float16


def test_kept_videos_can_be_read(built):
    for path in (built / "videos").iterdir():
        segments = read_segments(path)
        assert segments.frames.shape == (10, 4, 128, 128, 3)
        assert segments.waveform.shape == (10, 16000) and np.abs(segments.waveform).max() > 0.01


def test_the_data_set_opens(built):
    questions = read_annotations(built / "json" / "avqa-train.json")
    feats = built / "feats"
    data = AVQADataset(questions, feats / "small_visual", feats / "small_audio",
                       Vocabulary.build(questions))
    batch = next(iter(data.batches(num_videos=6)))
    assert batch.visual.shape == (6, 10, 192) and batch.audio.shape == (6, 10, 128)
    assert int(batch.question_mask.sum()) == len(questions)


def test_a_second_build_changes_nothing(built, encoders):
    before = {f: (built / f).stat().st_mtime_ns for f in files(built) if f.endswith(("npy", "mp4"))}
    build_sample_set(built, encoders, TINY, workers=0)
    assert before == {f: (built / f).stat().st_mtime_ns for f in before}


@pytest.mark.parametrize("lost, left", [("feats/small_audio/00000004.npy", None), ("videos/00000008.mp4", None),
                                        ("feats/small_visual/00000005.npy", 500), ("feats/small_audio/00000006.npy", 0)])
def test_what_is_missing_or_damaged_is_made_again_alike(built, encoders, lost, left):
    content, before = (built / lost).read_bytes(), files(built)
    if left is None: (built / lost).unlink()
    else: (built / lost).write_bytes(content[:left])
    build_sample_set(built, encoders, TINY, workers=0)
    assert files(built) == before
    if lost.endswith("npy"): assert (built / lost).read_bytes() == content
    else: assert len(read_segments(built / lost)) == 10


def test_processes_give_what_one_process_gives(built, encoders, tmp_path):
    build_sample_set(tmp_path, encoders, TINY, workers=2)
    assert files(tmp_path) == files(built)
    for f in files(built):
        if f.endswith(".json"): assert (tmp_path / f).read_bytes() == (built / f).read_bytes()
        if f.endswith(".npy"):
            np.testing.assert_allclose(np.load(tmp_path / f).astype(float),
                                       np.load(built / f).astype(float), atol=5e-3, rtol=1e-2)


def test_a_killed_build_goes_on_and_leaves_no_broken_file(built, encoders, tmp_path):
    folder = tmp_path / "set"
    code = ("from mcd_edu.samples.sample_set import *; import sys, torch;"
            f"build_sample_set({str(folder)!r}, {str(encoders)!r}, SampleSetConfig("
            "num_train=6, num_val=2, num_test=2, num_videos=4), workers=0)")
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True,
                               env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.rglob("*.npy"))) < 5 and time.monotonic() < deadline: time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = [p for p in folder.rglob("*.*") if not p.name.startswith(".")]
    assert 5 <= sum(p.suffix == ".npy" for p in made) < 20
    for path in made:
        if path.suffix == ".json": load(path)
        if path.suffix == ".npy": read_feature(path)
        if path.suffix == ".mp4": assert len(read_segments(path)) == 10
    build_sample_set(folder, encoders, TINY, workers=0)
    assert files(folder) == files(built)                 # also no draft is left


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError("disk full")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="disk full"): save_array(tmp_path / "x.npy", np.zeros(3))
    assert files(tmp_path) == []


def test_a_clip_that_is_not_kept_leaves_no_video(encoders, tmp_path):
    job = ClipJob(sample_scene("one", 1), tmp_path, None, encoders, keep_video=False)
    make_clip(job)
    assert files(tmp_path) == ["feats/small_audio/one.npy", "feats/small_visual/one.npy"]


# ---- wrong input

def test_sets_of_other_origin_are_not_mixed(built, encoders, tmp_path):
    before = {f: (built / f).read_bytes() for f in files(built) if f.endswith(".json")}
    with pytest.raises(ValueError, match="made from other scenes"):
        build_sample_set(built, encoders, SampleSetConfig(6, 2, 2, num_videos=4, seed=1), workers=0)
    torch.manual_seed(1)
    save_encoders(tmp_path, VisualEncoder(), AudioEncoder())
    with pytest.raises(ValueError, match="made from other encoders"):
        build_sample_set(built, tmp_path, TINY, workers=0)
    assert before == {f: (built / f).read_bytes() for f in before}


def test_more_questions_or_videos_of_the_same_clips_are_fine(encoders, tmp_path):
    one = SampleSetConfig(2, 1, 1, per_video=4, num_videos=0)
    build_sample_set(tmp_path, encoders, one, workers=0)
    assert not list(tmp_path.rglob("*.mp4"))
    build_sample_set(tmp_path, encoders, SampleSetConfig(2, 1, 1, num_videos=4), workers=0)
    assert len(list(tmp_path.rglob("*.mp4"))) == 2
    assert len(read_annotations(tmp_path / "json" / "avqa-train.json")) > 8


def test_errors_come_before_anything_is_written(encoders, tmp_path):
    with pytest.raises(ValueError, match="train it with"):
        build_sample_set(tmp_path / "new", tmp_path / "nowhere", TINY, workers=0)
    for share in (0, 0.9, -1):
        with pytest.raises(ValueError, match="held_back"):
            build_sample_set(tmp_path / "new", encoders, SampleSetConfig(held_back=share))
    assert not (tmp_path / "new").exists()
