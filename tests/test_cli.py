"""The command line: results on standard output, every expected error one line that helps."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mcd_edu import __version__
from mcd_edu.cli import describe, main, printable, score_table
from mcd_edu.data import Vocabulary
from mcd_edu.inference import WEIGHTS, Answerer, Reply
from mcd_edu.media import write_video
from mcd_edu.model import MCD, MCDConfig
from mcd_edu.samples import provide, sample_set
from mcd_edu.samples.choices import build_choice_set
from mcd_edu.samples.sample_set import SampleSetConfig, split_scenes, write_annotations
from mcd_edu.training import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "How many instruments are sounding in the video?"


@pytest.fixture
def call(capfd):
    """Run a command line in this process: exit code, standard output, standard error."""
    def run(*arguments):
        capfd.readouterr()
        try: main([str(argument) for argument in arguments])
        except SystemExit as stop: code = stop.code
        else: code = 0
        return code, *capfd.readouterr()
    return run


@pytest.fixture
def shipped(monkeypatch, untrained):
    """Let the untrained parts stand in for the shipped ones."""
    load = Answerer.load.__func__
    def stand_in(cls, checkpoint=untrained / "model", encoders=untrained / "encoders"):
        return load(cls, checkpoint, encoders)
    monkeypatch.setattr(Answerer, "load", classmethod(stand_in))


# ---- answers

def test_answer_for_a_person(call, shipped, clip):
    code, out, err = call("answer", clip, QUESTION, "Is there a zither?", "violin " * 500)
    assert code == 0 and err == ""
    first, second, third = out.strip().split("\n\n")
    assert first.startswith(f"Q: {QUESTION}\nA: ") and "; then " in first
    assert "looks at second " in first and "listens to second " in first
    assert "words never seen in training: zither" in second and "note" not in second
    assert third.endswith("note: only the first 20 of 500 words were read")
    assert max(map(len, out.splitlines())) < 250


def test_answer_for_a_program(call, shipped, clip, untrained):
    code, out, err = call("answer", clip, QUESTION, "Où est le violon \x1b[0m?", "--json",
                          "--top", 2)
    assert code == 0 and err == ""
    answerer = Answerer.load(untrained / "model", untrained / "encoders")
    replies = answerer.ask(answerer.watch(clip), [QUESTION, "Où est le violon \x1b[0m?"], top=2)
    assert json.loads(out) == json.loads(json.dumps([asdict(reply) for reply in replies]))
    assert out.isascii()


def test_a_terminal_is_not_touched_by_what_was_typed(call, shipped, clip):
    code, out, _ = call("answer", clip, "Is\nthere \x1b[2J\x07 a \udcffviolin?")
    assert code == 0 and "Q: Is there ?[2J? a ?violin?\n" in out
    assert "\x1b" not in out and "\x07" not in out


@pytest.mark.parametrize("name", [
    "with space.mp4", "Ström 提琴 🎻.mp4", "a:b%03d.mp4", "'q\"&;$x.mp4", "two\nlines.mp4",
    "noextension", "concat:x|y"])
def test_a_video_may_have_any_name(call, shipped, clip, tmp_path, monkeypatch, name):
    shutil.copy(clip, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    code, out, err = call("answer", name, QUESTION)
    assert code == 0 and err == "" and QUESTION in out


def test_the_shipped_model_answers(call):
    videos = sorted((ROOT / "data_samples" / "music_avqa" / "videos").glob("*.mp4"))
    code, out, err = call("answer", videos[-1], QUESTION, "Is there a violin sound?", "--json")
    assert code == 0 and err == "", err
    count, sound = json.loads(out)
    assert count["answer"] in ("zero", "one", "two", "three", "four", "five")
    assert sound["answer"] in ("yes", "no") and not sound["unknown"]


def test_describe_leaves_out_what_is_not_there():
    reply = Reply("Why?", "yes", 1., (), (3,), (0,), (1.,), (1.,), (3,), ())
    assert describe(reply) == "Q: Why?\nA: yes (100%)\n   looks at second 3; listens to second 0"
    assert "note: cut" in describe(replace(reply, note="cut"))
    assert len(describe(replace(reply, question="x" * 5000, unknown=("y" * 5000,)))) < 600


@pytest.mark.parametrize("text, shown", [
    ("a\nb\r\n c", "a b c"), ("\x1b[1m\0", "?[1m?"), ("é提\u202e", "é提?"),
    ("x" * 30, "x" * 9 + " ...")])
def test_printable(text, shown):
    assert printable(text, longest=9 if text[0] == "x" else 100) == shown


# ---- help, version, usage

def test_help_and_version(call):
    code, out, err = call("--help")
    assert code == 0 and err == "" and out == call()[1]
    assert all(name in out for name in ("answer", "samples", "train", "evaluate", "--version"))
    assert call("--version") == (0, f"mcd-edu {__version__}\n", "")
    for name in ("answer", "samples", "train", "evaluate"):
        code, out, _ = call(name, "--help")
        assert code == 0 and "--debug" in out


@pytest.mark.parametrize("line", [
    "ansver x.mp4 Why?", "answer", "answer x.mp4", "answer x.mp4 Why? --top 0", "samples",
    "answer x.mp4 Why? --top many", "answer x.mp4 Why? --nope", "samples --out x --clips 3",
    "--nope", "train x", "train x --out y --epochs 0", "evaluate"])
def test_wrong_usage_is_one_line_and_exit_code_2(call, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*line.split())
    assert code == 2 and out == "" and list(tmp_path.iterdir()) == []
    assert err.startswith("error: ") and err.endswith(" (see mcd-edu --help)\n")
    assert err.count("\n") == 1


def test_help_loads_nothing_heavy():
    check = "import sys, mcd_edu.cli; print({'torch', 'av', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True,
                          cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


# ---- bad input

def write_tracks(path, picture=True, sound=True, frames=8):
    """An mp4 that may lack a track."""
    with av.open(str(path), "w") as container:
        if picture: video = container.add_stream("libx264", rate=4)
        if sound: audio = container.add_stream("aac", rate=16_000, layout="mono")
        if picture: video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()                     # else a file without frames is not written
        if picture:
            black = np.zeros((32, 32, 3), np.uint8)
            for _ in range(frames):
                container.mux(video.encode(av.VideoFrame.from_ndarray(black, "rgb24")))
            container.mux(video.encode())
        if sound:
            for i in range(frames * 4):
                silence = np.zeros((1, 1000), np.float32)
                samples = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
                samples.sample_rate, samples.pts = 16_000, 1000 * i
                container.mux(audio.encode(samples))
            container.mux(audio.encode())


def write_checkpoint(folder, **changes):
    """A checkpoint of a tiny model with another configuration."""
    vocabulary = Vocabulary(["violin"])
    sizes = {"vocab_size": len(vocabulary), "embed_dim": 8, "num_heads": 2}
    config = MCDConfig(**{**sizes, **changes})
    save_checkpoint(folder, MCD(config), vocabulary, {"keywords": ["violin"]})


@pytest.fixture(scope="module")
def bad(tmp_path_factory, untrained, clip):
    """A folder of things that people type."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.mp4").write_text("not a film")
    (folder / "empty.mp4").touch()
    (folder / "half.mp4").write_bytes(clip.read_bytes()[:clip.stat().st_size // 2])
    (folder / "folder").mkdir()
    (folder / "line\nbreak.mp4").write_text("not a film")
    write_tracks(folder / "mute.mp4", sound=False)
    write_tracks(folder / "blind.mp4", picture=False)
    write_tracks(folder / "zero.mp4", frames=0)
    for name in ("no_weights", "no_config", "cut", "not_json", "list", "swapped", "no_keywords"):
        shutil.copytree(untrained / "model", folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "no_config" / "config.json").unlink()
    weights = (untrained / "model" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[:1000])
    (folder / "not_json" / "config.json").write_text("{")
    (folder / "list" / "config.json").write_text("[1, 2]")
    config = json.loads((untrained / "model" / "config.json").read_text())
    (folder / "no_keywords" / "config.json").write_text(json.dumps({**config, "about": {}}))
    write_checkpoint(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder / "swapped")
    write_checkpoint(folder / "wide", visual_dim=2048)
    write_checkpoint(folder / "answers", num_answers=7)
    write_checkpoint(folder / "words", vocab_size=9)
    return folder


BAD_INPUT = {   # arguments behind `answer` → what the error must say
    "no such file": (["none.mp4", QUESTION], "none.mp4: no such file; give"),
    "a folder": (["folder", QUESTION], "folder"),
    "a text file": (["text.mp4", QUESTION], "text.mp4: not a video that can be read"),
    "an empty file": (["empty.mp4", QUESTION], "empty.mp4: "),
    "a truncated file": (["half.mp4", QUESTION], "copy"),
    "no sound": (["mute.mp4", QUESTION], "mute.mp4: has no sound track"),
    "no picture": (["blind.mp4", QUESTION], "blind.mp4: has no picture track"),
    "no frames": (["zero.mp4", QUESTION], "zero.mp4: has no"),
    "no frames allowed": (["zero.mp4", QUESTION, "--allow-missing"], "zero.mp4: has"),
    "a line break in the name": (["line\nbreak.mp4", QUESTION], "line break.mp4: not a video"),
    "an address": (["https://example.org/x.mp4", QUESTION], "no such file"),
    "an empty question": (["CLIP", ""], "has no words; ask something like"),
    "one of two questions empty": (["CLIP", QUESTION, " ?"], "question ' ?' has no words"),
    "no checkpoint": (["CLIP", QUESTION, "--checkpoint", "none"], "none: no checkpoint there"),
    "a checkpoint that is a file": (["CLIP", QUESTION, "--checkpoint", "text.mp4"],
                                    "text.mp4: no checkpoint there"),
    "no weights": (["CLIP", QUESTION, "--checkpoint", "no_weights"], "model.safetensors is miss"),
    "no configuration": (["CLIP", QUESTION, "--checkpoint", "no_config"], "config.json is missing"),
    "cut weights": (["CLIP", QUESTION, "--checkpoint", "cut"], "cut/model.safetensors: unreadable"),
    "configuration no JSON": (["CLIP", QUESTION, "--checkpoint", "not_json"], "not_json"),
    "configuration a list": (["CLIP", QUESTION, "--checkpoint", "list"], "list"),
    "weights of another": (["CLIP", QUESTION, "--checkpoint", "swapped"], "another configuration"),
    "no keywords": (["CLIP", QUESTION, "--checkpoint", "no_keywords"], 'no list of "keywords"'),
    "other encoders": (["CLIP", QUESTION, "--checkpoint", "wide"], "width 2048, here it is 192"),
    "other answers": (["CLIP", QUESTION, "--checkpoint", "answers"], "answers of length 7"),
    "other words": (["CLIP", QUESTION, "--checkpoint", "words"], "a vocabulary of size 9"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(call, shipped, bad, clip, monkeypatch, arguments, message):
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob("*"))
    code, out, err = call("answer", *(clip if a == "CLIP" else a for a in arguments))
    assert code == 1 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert message in err and "Traceback" not in err and len(err) < 300
    assert sorted(bad.rglob("*")) == before                    # nothing half-written stays


def test_debug_shows_where_an_error_came_from(shipped, bad):
    with pytest.raises(ValueError, match="not a video"):
        main(["answer", str(bad / "text.mp4"), QUESTION, "--debug"])


def test_a_mistake_of_ours_stays_loud(shipped, clip, monkeypatch):
    def broken(*_): raise RuntimeError("ours")
    monkeypatch.setattr(Answerer, "ask", broken)
    with pytest.raises(RuntimeError, match="ours"): main(["answer", str(clip), QUESTION])


def test_ctrl_c_is_no_traceback(call, shipped, clip, monkeypatch):
    def stopped(*_): raise KeyboardInterrupt
    monkeypatch.setattr(Answerer, "ask", stopped)
    code, out, err = call("answer", clip, QUESTION)
    assert code == 130 and out == "" and err.strip() == "error: stopped"


@pytest.mark.parametrize("name", ["mute.mp4", "blind.mp4"])
def test_a_missing_track_can_be_allowed(call, shipped, bad, name):
    code, out, err = call("answer", bad / name, QUESTION, "--allow-missing")
    assert code == 0 and err == "" and QUESTION in out


@pytest.mark.parametrize("seconds, starts", [(1, [0]), (600, [0, 67, 133, 200, 266, 333, 399, 466,
                                                              532, 599])])
def test_one_second_and_ten_minutes(call, shipped, tmp_path, seconds, starts):
    path, frames = tmp_path / "x.mp4", np.zeros((seconds, 32, 32, 3), np.uint8)
    write_video(path, frames, np.zeros(seconds * 16_000, np.float32), fps=1)
    code, out, err = call("answer", path, QUESTION, "--json")
    assert code == 0 and err == "" and json.loads(out)[0]["seconds"] == starts


def test_the_real_command_line(untrained, clip, bad):
    """In a process of its own, from another folder: an answer, and an error without traceback."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from mcd_edu.cli import main; main()", "answer"]
    def run(*arguments):
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True,
                              cwd=bad, env=environment, timeout=120)
    done = run(clip, QUESTION, "--checkpoint", untrained / "model", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)[0]["question"] == QUESTION
    failed = run("text.mp4", QUESTION, "--checkpoint", untrained / "model")
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith("error: text.mp4: not a video"), failed.stderr
    assert failed.stderr.count("\n") == 1


# ---- samples

def test_samples_passes_its_options_on(call, monkeypatch, tmp_path):
    seen, checked = [], []
    (tmp_path / "z").mkdir()
    monkeypatch.setattr(sample_set, "build_sample_set", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(provide, "check_samples", lambda *arguments: checked.append(arguments))
    code, out, err = call("samples", "--out", tmp_path / "x")
    assert code == 0 and err == ""
    assert out.startswith("2400 clips to train on, 200 to choose on, 400")
    code, *_ = call("samples", "--out", tmp_path / "y", "--clips", 15, "--videos", 2, "--seed", 3,
                    "--workers", 1, "--encoders", tmp_path, "--assets", tmp_path / "z")
    assert code == 0
    assert seen == [(tmp_path / "x", WEIGHTS / "encoders", SampleSetConfig(), None, 2),
                    (tmp_path / "y", tmp_path, SampleSetConfig(12, 1, 2, num_videos=2, seed=3),
                     tmp_path / "z", 1)]
    assert checked == [(tmp_path / "x", "music_avqa-3000")], "another seed is another set"


# ---- train and evaluate

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data set of the real layout with random features."""
    folder = tmp_path_factory.mktemp("data")
    config = SampleSetConfig(num_train=6, num_val=2, num_test=3, per_video=5)
    scenes = split_scenes(config)
    write_annotations(scenes, folder, config)
    generator = np.random.default_rng(0)
    for kind, width in (("visual", 12), ("audio", 8)):
        (folder / "feats" / f"small_{kind}").mkdir(parents=True)
        for clips in scenes.values():
            for scene in clips:
                feature = generator.normal(size=(10, width)).astype(np.float16)
                np.save(folder / "feats" / f"small_{kind}" / f"{scene.video_id}.npy", feature)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    main(["train", str(data), "--out", str(folder), "--epochs", "2"])
    return folder


def test_train_leaves_a_checkpoint(call, data, trained, tmp_path):
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert (config["model"]["visual_dim"], config["model"]["audio_dim"]) == (12, 8)
    assert config["about"]["keywords"] and config["about"]["training"]["epochs"] == 2
    code, out, _ = call("train", data, "--out", tmp_path, "--epochs", 1, "--clips", 2, "--seed", 5,
                        "--option", "modalities=none", "--option", "head=late_fusion")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert code == 0 and f"% right on val; the checkpoint is in {tmp_path}" in out
    assert (config["model"]["modalities"], config["model"]["head"]) == ("none", "late_fusion")
    assert config["about"]["training"]["seed"] == 5


def test_a_training_goes_on_where_it_was(call, data, trained):
    before = load_file(trained / "model.safetensors")
    code, *_ = call("train", data, "--out", trained, "--epochs", 2)
    after = load_file(trained / "model.safetensors")
    assert code == 0 and all(torch.equal(before[name], after[name]) for name in before)


def test_evaluate_for_a_person_and_for_a_program(call, data, trained):
    code, out, err = call("evaluate", data, "--checkpoint", trained)
    assert code == 0 and err == "" and out.startswith("15 questions about 3 videos\n")
    assert "micro (all questions)" in out and "mean of the 9 types" in out
    code, out, err = call("evaluate", data, "--checkpoint", trained, "--json")
    found = json.loads(out)
    assert code == 0 and err == "" and found["questions"] == 15 and found["videos"] == 3
    value, low, high = found["per cent, from, to"]["micro (all questions)"]
    assert 0 <= low <= value <= high <= 100
    _, shuffled, _ = call("evaluate", data, "--checkpoint", trained, "--shuffle-videos", "--json")
    assert json.loads(shuffled)["questions"] == 15
    code, out, _ = call("evaluate", data, "--checkpoint", trained, "--split", "val")
    assert code == 0 and out.startswith("10 questions about 2 videos")


def test_samples_of_the_other_datasets(call, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(provide, "build_action_set", lambda *args, **options: seen.append((*args, options)))
    monkeypatch.setattr(provide, "check_samples", lambda *args: seen.append(args) or 6)
    code, out, _ = call("samples", "--out", tmp_path / "msvd_qa", "--dataset", "msvd_qa", "--workers", 0)
    assert code == 0 and out == f"msvd_qa: {tmp_path / 'msvd_qa'}; 6 files as published\n"
    assert seen == [(tmp_path / "msvd_qa", "msvd_qa", {"workers": 0}), (tmp_path / "msvd_qa", "msvd_qa")]
    code, _, err = call("samples", "--out", tmp_path / "cats", "--dataset", "cats")
    assert code == 1 and "dataset 'cats' is unknown" in err and not (tmp_path / "cats").exists()


@pytest.mark.parametrize("options, message", [
    *((dict(clips=clips), "clips: give a whole number from 15 to 1000000") for clips in (0, -5, 14, 15.0, 10**6 + 1, 10**400)),
    (dict(workers=-1), "workers=-1; give a whole number of processes"), (dict(workers=0.5), "workers=0.5; give")])
@pytest.mark.parametrize("name", ["music_avqa", "msvd_qa", "avqa"])
def test_no_sample_set_of_a_size_that_is_none(monkeypatch, tmp_path, name, options, message):
    monkeypatch.setenv("MCD_EDU_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=message): provide.provide_samples(tmp_path / "zz" / name, **options)
    assert not list(tmp_path.iterdir())


def test_choices_are_checked_where_their_clips_are_known(call, made, tmp_path):
    code, out, _ = call("samples", "--out", tmp_path / "avqa", "--dataset", "avqa", "--source", made)
    assert code == 0 and out == f"avqa: {tmp_path / 'avqa'}; 2 files as published\n"
    others = shutil.copytree(made, tmp_path / "others")
    (others / "json" / "avqa-test.json").write_text("[]")
    code, out, _ = call("samples", "--out", tmp_path / "other", "--dataset", "avqa", "--source", others)
    assert code == 0 and out.endswith("; 0 files as published\n")


def test_the_clips_of_choices_are_made_beside_them(call, made, tmp_path):
    shutil.copytree(made, tmp_path / "music_avqa-15")
    next((tmp_path / "music_avqa-15").rglob("*.npy")).unlink()
    code, out, _ = call("samples", "--out", tmp_path / "avqa", "--dataset", "avqa", "--clips", 15, "--workers", 0)
    assert code == 0 and out.endswith("; 2 files as published\n")
    (tmp_path / "music_avqa-15" / "truth" / "test.json").write_text("[]")
    assert call("samples", "--out", tmp_path / "avqa", "--dataset", "avqa", "--clips", 15, "--workers", 0)[0] == 0, "made again"


def test_pack_makes_a_store_that_evaluate_reads(call, data, trained, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    feats = tmp_path / "data" / "feats"
    for kind in ("visual", "audio"):
        code, out, _ = call("pack", feats / f"small_{kind}", "--out", feats / kind, "--encoder", kind, "--dtype", "float32")
        assert code == 0 and out == f"11 videos, by {kind}: {feats / kind}\n"
    lines = [call("evaluate", tmp_path / "data", "--checkpoint", trained, *options)
             for options in ((), ("--visual", "visual", "--audio", "audio"))]
    assert lines[0] == lines[1] and lines[0][0] == 0
    code, _, err = call("pack", tmp_path / "none", "--out", tmp_path / "store", "--encoder", "x")
    assert code == 1 and err.count("\n") == 1 and not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Fifteen sample clips with the features of the shipped encoders."""
    folder = tmp_path_factory.mktemp("made") / "music_avqa"
    main(["samples", "--out", str(folder), "--clips", "15", "--videos", "0", "--workers", "0"])
    return folder


@pytest.mark.parametrize("model", ["late_fusion", "alignment", "graph_vqa"])
def test_other_models_train_evaluate_and_answer(call, clip, made, tmp_path, model):
    code, *_ = call("train", made, "--out", tmp_path / "model", "--model", model, "--epochs", 1, "--clips", 2)
    assert code == 0
    code, out, _ = call("evaluate", made, "--checkpoint", tmp_path / "model")
    assert code == 0 and "micro (all questions)" in out
    code, out, err = call("answer", clip, "Is there a violin?", "--checkpoint", tmp_path / "model")
    assert code == 0 and err == "" and out.startswith("Q: Is there a violin?\nA: ")


def test_a_model_that_chooses_is_given_choices(call, clip, made, tmp_path):
    build_choice_set(tmp_path / "avqa", made, num_train=12, num_val=3)
    code, *_ = call("train", tmp_path / "avqa", "--out", tmp_path / "model", "--epochs", 1)
    assert code == 0
    options = [word for name in ("left", "right", "nowhere", "everywhere") for word in ("--choice", name)]
    ask = ["answer", clip, "Where does it sound?", "--checkpoint", tmp_path / "model"]
    code, out, _ = call(*ask, *options, "--json")
    assert code == 0 and json.loads(out)[0]["answer"] in options
    code, _, err = call(*ask, *options[2:])
    assert code == 1 and err.count("\n") == 1 and "3 choices: this model was trained to choose among 4" in err
    code, out, _ = call("evaluate", tmp_path / "avqa", "--checkpoint", tmp_path / "model")
    assert code == 0 and "mean of the 24 types" in out


def test_a_student_is_trained_by_a_teacher(call, data, trained, tmp_path):
    small = ["--model", "graph_vqa", "--epochs", 1, "--clips", 2, "--option", "embed_dim=16"]
    code, *_ = call("train", data, "--out", tmp_path / "teacher", *small, "--option", "num_layers=2")
    assert code == 0
    student = ["train", data, "--out", tmp_path / "student", *small, "--option", "distillation=feature"]
    code, *_ = call(*student, "--teacher", tmp_path / "teacher")
    config = json.loads((tmp_path / "student" / "config.json").read_text(encoding="utf-8"))
    assert code == 0 and config["kind"] == "graph_vqa" and config["about"]["kd_motion"] > 0
    code, _, err = call(*student, "--teacher", trained)
    assert code == 1 and err.count("\n") == 1 and "a mcd cannot teach this graph_vqa" in err


def test_two_files_of_predictions_are_compared(call, data, trained, tmp_path):
    for name in ("a", "b"):
        code, *_ = call("evaluate", data, "--checkpoint", trained, "--out", tmp_path / name)
        assert code == 0 and len((tmp_path / name).read_text().splitlines()) == 15
    code, out, err = call("compare", tmp_path / "a", tmp_path / "b", "--draws", 20)
    assert code == 0 and err == "" and "points" in out and "micro (all questions)" in out
    code, out, _ = call("compare", tmp_path / "a", tmp_path / "a", "--json", "--draws", 20)
    assert code == 0 and set(json.loads(out)["points, from, to"]["micro (all questions)"]) == {0}


def test_extract_reports_what_failed_and_goes_on(call, clip, tmp_path):
    (tmp_path / "broken.mp4").write_text("no film")
    code, out, err = call("extract", clip, tmp_path / "broken.mp4", "--out", tmp_path / "x")
    assert code == 1 and "1 done, 0 were there, 1 failed" in out and "broken.mp4" in err
    code, out, _ = call("extract", clip, "--out", tmp_path / "x", "--shard", "0/1")
    assert code == 0 and "0 done, 1 were there, 0 failed" in out
    assert sorted(p.parent.name for p in (tmp_path / "x").rglob("*.npy")) == ["small_audio", "small_visual"]
    code, _, err = call("extract", clip, "--out", tmp_path / "x", "--shard", "3/2")
    assert code == 1 and err.count("\n") == 1 and "0/4 to 3/4" in err


def test_types_without_questions_are_none():
    assert score_table({"A": [50., 40., 60.], "B": None}).splitlines()[1:] == [
        f"{'A':24}  50.0 %   40.0 to 60.0", f"{'B':24}    none"]


@pytest.mark.parametrize("line, message", [
    ("train none --out new", "none: no dataset there; looked for avqa-train.json"),
    ("train none --out new --dataset avqa", "none/train_qa.json: no such annotation file"),
    ("train none --out new --dataset cats", "dataset 'cats' is unknown; give one of music_avqa"),
    ("train DATA --out new --model cats", "model 'cats'; choose one of mcd"),
    ("train DATA --out new --option wings=2", "mcd has no option 'wings'"),
    ("train DATA --out new --option embed_dim=wide", "needs a value like 128"),
    ("train DATA --out new --option head=early", "head='early'"),
    ("train DATA --out new --option modalities=smell", "modalities='smell'"),
    ("train DATA --out new --visual resnet", "features are missing"),
    ("train DATA --out TRAINED --epochs 5", "a training with other settings; give another"),
    ("evaluate DATA --checkpoint TRAINED --out new --shuffle-videos", "leave out --shuffle-videos"),
    ("evaluate DATA --checkpoint none", "none: no checkpoint there"),
    ("evaluate DATA --checkpoint TRAINED --split tset", "split 'tset' is none of train, val, test"),
    ("evaluate EMPTY --checkpoint TRAINED", "test has no questions; choose another split"),
    ("evaluate DATA --checkpoint UNTRAINED", "use the encoder it was trained with"),
])
def test_bad_data_is_one_line(call, data, trained, untrained, tmp_path, monkeypatch, line, message):
    (tmp_path / "empty" / "json").mkdir(parents=True)
    (tmp_path / "empty" / "json" / "avqa-test.json").write_text("[]")
    places = {"DATA": data, "TRAINED": trained, "EMPTY": tmp_path / "empty",
              "UNTRAINED": untrained / "model"}
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*(places.get(word, word) for word in line.split()))
    assert code == 1 and out == "" and not (tmp_path / "new").exists()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


# What the machine says ---------------------------------------------------------------------------

def failing(monkeypatch, error, warning=None):
    """`compare` meets this error, and this warning before."""
    def fail(*_):
        if warning: warnings.warn(warning, stacklevel=1)
        raise error
    monkeypatch.setattr("mcd_edu.predictions.read_pair", fail)
    with pytest.raises(SystemExit) as stop: main(["compare", "a", "b"])
    assert stop.value.code == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
                                   RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert capsys.readouterr().err.startswith("error: not enough memory; make the model or a batch smaller")


def test_a_mistake_of_ours_stays_a_traceback(monkeypatch):
    with pytest.raises(RuntimeError, match="a bug"): failing(monkeypatch, RuntimeError("a bug"))


def test_an_error_of_the_system_without_a_name(monkeypatch, capsys):
    failing(monkeypatch, OSError(28, "No space left on device"))
    assert capsys.readouterr().err == ("error: output or working folder: No space left on device; give another path, "
                                       "or mend its permissions\n")


def test_a_warning_is_one_line_without_python(monkeypatch, capsys):
    failing(monkeypatch, ValueError("no"), "2 of 9 videos\n were left out \x1b[31m")
    assert capsys.readouterr().err == "warning: 2 of 9 videos were left out ?[31m\nerror: no\n"


def test_answers_of_a_strange_checkpoint_do_no_harm():
    reply = Reply("why?", "\x1b[31mred\nQ: x", .5, (("\ud800", .25),), (1,), (2,), (1.,), (1.,), (0,), (), "a\x07b")
    lines = describe(reply).splitlines()
    assert lines[1] == "A: ?[31mred Q: x (50%; then ? 25%)" and lines[-1] == "   note: a?b" and len(lines) == 4
