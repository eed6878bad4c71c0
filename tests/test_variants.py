"""Variants differ from each other, and a run is its settings: its name holds them, and what makes no sense is refused."""

import json

import numpy as np
import pytest

from mcd_edu.data import group_by_video
from mcd_edu.datasets import DATASETS, load_splits
from mcd_edu.experiments import encoders_of
from mcd_edu.models import config_for
from mcd_edu.training import TrainingConfig, make_toy_set
from mcd_edu.variants import ABLATIONS, VARIANTS, Run, find_variant


def test_names_of_files_and_rows():
    run = Run("late fusion", 2, 300, True, "json_by_question")
    assert run.name == "late_fusion-clips300-types-json_by_question-seed2"
    assert run.title == "late fusion, 300 clips, oracle type, json_by_question"
    assert Run("MCD").name == "MCD-clipsall-seed0" and Run("MCD", 5).title == "MCD"
    other = Run("student (feature KD)", 1, dataset="msvd_qa")
    assert (other.name, other.title) == ("msvd_qa-student_feature_KD-clipsall-seed1", "student (feature KD), msvd_qa")
    assert other.teacher == Run("graph teacher", 1, dataset="msvd_qa") and other.teacher.teacher is None
    runs = [Run(v, s, c, t, dataset=d) for v in VARIANTS for d in VARIANTS[v].datasets
            for s in (0, 1) for c in (None, 9) for t in (False, True)]
    assert {run.dataset for run in runs} == set(DATASETS)
    assert len({run.name for run in runs}) == len(runs) == 2 * len({run.title for run in runs})


def test_names_of_runs_with_more_settings():
    run = Run("no L_av", 1, 600, aside=.125, per_video=4, label="wide one", options={"embed_dim": 8})
    assert run.name == "no_L_av-wide_one-clips600-aside12_5-per4-seed1"
    assert run.title == "no L_av, wide one, 600 clips, 12.5 % aside, 4 questions a video"
    config = TrainingConfig(3, num_videos=32, num_questions=2, together=4)    # what makes the variant stays
    assert Run("repeated videos", training={"num_videos": 4, "epochs": 3}).config == config
    assert encoders_of(Run("pixels + spectrum, late")) == ["pixels", "spectrum"] and encoders_of(Run("MCD")) == []


@pytest.mark.parametrize("options, message", [
    (dict(variant="video only"), "choose one of MCD"), (dict(training=dict(epoch=3)), "epoch"),
    (dict(training=dict(seed=3)), "seed"), (dict(training=dict(epochs=0)), "epochs=0"),
    (dict(dataset="msvd"), "choose one of music_avqa, avqa, msvd_qa, msrvtt_qa"),
    (dict(variant="audio only", dataset="msvd_qa"), "for music_avqa, avqa"),
    (dict(variant="motion only", dataset="avqa"), "for msvd_qa, msrvtt_qa"),
    (dict(variant="no text objects", dataset="avqa"), "for music_avqa"),
    (dict(variant="predicted types only", types=True), "leave out types"),
    (dict(aside=1.), "aside=1.0"), (dict(aside=-.1), "below 1"), (dict(per_video=-1), "at least one question"),
    (dict(options={"embed_dim": 8}), "a name of letters"), (dict(label="../x"), "label '../x'"),
    (dict(clips=0), "clips=0"), (dict(clips=np.int64(3)), "clips is of kind int64; give int"),
    (dict(seed=True), "seed is of kind bool"), (dict(types=1), "types is of kind int; give bool"),
    (dict(aside="x"), "give float"), (dict(label=None), "label is of kind None"), (dict(training=[1]), "give dict"),
    (dict(annotations="../data/json"), "annotations '../data/json'; give the plain name"),
    (dict(label="x", options={1: 2}), "options is not made of names"), (dict(label="x", options={"head": [1]}), "options is not"),
])
def test_runs_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Run(**{"variant": "MCD", **options})
    assert "\n" not in str(error.value)


def test_every_ablation_is_a_model_of_its_own_and_its_files_have_names_of_their_own(tmp_path):
    make_toy_set(tmp_path, num_train=2, num_val=2, num_test=2)
    train = load_splits(tmp_path)["train"]
    configs = {}
    for name in ABLATIONS:
        variant = find_variant(name)
        assert variant.options or variant.shows or variant.training, name
        configs[name] = (json.dumps(variant.options, sort_keys=True), str(variant.shows), str(variant.training))
        config_for("mcd", train, **variant.options)      # not refused
    assert len(set(configs.values())) == len(ABLATIONS) and not set(ABLATIONS) & set(VARIANTS)
    runs = [Run(name, dataset=find_variant(name).datasets[0]) for name in VARIANTS | ABLATIONS]
    assert len({run.name for run in runs}) == len(runs)
    with pytest.raises(ValueError, match="choose one of MCD"):
        find_variant("MCD2")


def copies(config, seed=0):
    """The share of rows of a batch whose video is there in another row, too: 600 videos, 14 questions each."""
    video = np.repeat(np.arange(600), 14)
    rows = [video[group[0]] for group in group_by_video(video, config.num_questions, seed, config.together)]
    batches = [rows[i:i + config.num_videos] for i in range(0, len(rows), config.num_videos)]
    return np.mean([batch.count(row) > 1 for batch in batches for row in batch])


def test_videos_repeat_in_the_variants_that_say_so_and_nowhere_else():
    names = [name for name, variant in (VARIANTS | ABLATIONS).items() if variant.training]
    assert names == ["repeated videos", "repeated videos, not masked"]
    for name in names: assert copies(Run(name).config) > .95
    assert copies(Run("MCD").config) == 0 and copies(Run("MCD", training={"num_questions": 8}).config) < .05
