"""Features of one's own videos: every encoder by its true path, every way a run can go wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import mcd_edu.extraction as extraction
from mcd_edu.encoders import AudioEncoder, VisualEncoder, encode_segments, load_encoders, save_encoders
from mcd_edu.extraction import (
    ENCODERS,
    FAMILIES,
    SHIPPED,
    Encoder,
    EncoderError,
    Report,
    ahead,
    claim_folder,
    encode_questions,
    encode_videos,
    extract,
    find_videos,
    load_encoder,
    parse_name,
    place_once,
    prepare_video,
    resample,
)
from mcd_edu.media import read_segments, write_video

ROOT = Path(__file__).resolve().parent.parent
HALF = {"rtol": 2e-3, "atol": 2e-3}  # a unit in the last place of half precision

# Videos ----------------------------------------------------------------------------------------


def film(path, seed, seconds=2):
    """A short video of noise and a tone, other for every seed."""
    generator = np.random.default_rng(seed)
    frames = generator.integers(0, 256, (4 * seconds, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    time = np.arange(16_000 * seconds) / 16_000
    write_video(path, frames, 0.3 * np.sin(2 * np.pi * (200 + 90 * seed) * time))
    return path


def track(path, kind):
    """A video that lacks a track: `kind` is all it has."""
    with av.open(str(path), "w") as container:
        if kind == "visual":
            stream = container.add_stream("libx264", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            parts = [av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8), format="rgb24")
                     for i in range(8)]
        else:
            stream = container.add_stream("aac", rate=16_000, layout="mono")
            parts = []
            for at in range(0, 32_000, 1024):
                samples = np.sin(np.arange(at, at + 1024, dtype=np.float32) / 9)[None]
                part = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
                part.sample_rate, part.pts = 16_000, at
                parts.append(part)
        for part in parts:
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Five whole videos of two or three seconds."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(5):
        film(folder / f"clip{i}.mp4", i, 2 + i % 2)
    return folder


def features(out, name="small_visual"):
    """What a run has written: id → features, float32."""
    return {path.stem: np.load(path).astype(np.float32)
            for path in sorted((Path(out) / "feats" / name).glob("*.npy"))}


def run(videos, out, **options):
    return extract(videos, out, **{"progress": False} | options)


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_allclose(one[key], other[key], **HALF)


def dot(name, kind="visual", scale=1.0, watch=lambda: None):
    """An encoder of two numbers a segment, for tests of everything around it."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, scale)
    nn.init.zeros_(model.bias)

    def read(model, prepared):
        watch()
        mean = prepared["x"].flatten(1).float().mean(1, keepdim=True)
        return torch.cat([scale * mean, mean], 1)

    return Encoder(name, kind, model, lambda x: {"x": torch.from_numpy(np.asarray(x))}, read)


# A run with our own encoders -------------------------------------------------------------------

def test_same_features_as_one_video_after_the_other(videos, tmp_path):
    report = run(videos, tmp_path, batch=3)
    assert report == Report(tuple(f"clip{i}" for i in range(5)), (), {})
    encoders = load_encoders(SHIPPED)
    for i in range(5):
        expected = encode_segments(encoders, read_segments(videos / f"clip{i}.mp4"))
        for name, feature in zip(("small_visual", "small_audio"), expected):
            array = np.load(tmp_path / "feats" / name / f"clip{i}.npy")
            assert array.dtype == np.float16 and array.shape == (2 + i % 2, feature.shape[1])
            np.testing.assert_allclose(array, feature.numpy(), **HALF)
    note = json.loads((tmp_path / "feats/small_audio/encoder.json").read_text())
    assert note == {"name": "small_audio", "dim": 128, "segments": 10,
                    "weights": load_encoder("small_audio").digest}
    assert {path.name for path in tmp_path.iterdir()} == {"feats"}
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("name", ["small_visual", "small_audio"])
def test_a_batch_of_videos_changes_nothing(videos, name):
    encoder = load_encoder(name)
    prepared = [prepare_video(path, [encoder], 10)[0] for path in find_videos(videos)[:3]]
    together = encode_videos(encoder, prepared)
    for alone, feature in zip(prepared, together):
        assert_close(encode_videos(encoder, [alone])[0], feature, atol=1e-5, rtol=1e-5)


def test_batches_of_one_and_of_three_write_the_same(videos, tmp_path):
    for batch in (1, 3):
        run(videos, tmp_path / str(batch), batch=batch, workers=batch)
    for name in ("small_visual", "small_audio"):
        same(features(tmp_path / "1", name), features(tmp_path / "3", name))


def test_segments_bounds_the_length(videos, tmp_path):
    run(videos, tmp_path, segments=2)
    assert {len(feature) for feature in features(tmp_path).values()} == {2}


def test_each_video_is_read_once(videos, tmp_path, monkeypatch):
    seen = []

    def watched(path, *args):
        seen.append(path.stem)
        return read_segments(path, *args)

    monkeypatch.setattr(extraction, "read_segments", watched)
    run(videos, tmp_path)
    assert sorted(seen) == [f"clip{i}" for i in range(5)]


def test_bad_videos_are_reported_and_stop_nothing(videos, tmp_path):
    folder = shutil.copytree(videos, tmp_path / "in")
    (folder / "broken.mp4").write_bytes((folder / "clip0.mp4").read_bytes()[:3000])
    (folder / "noise.mp4").write_bytes(os.urandom(4000))
    (folder / "empty.mp4").write_bytes(b"")
    track(folder / "silent.mp4", "visual")
    film(folder / "my holiday.mp4", 1)
    report = run([folder, tmp_path / "nowhere.mp4"], tmp_path / "out", batch=3)
    assert report.done == tuple(f"clip{i}" for i in range(5))
    reasons = {Path(path).name: why for path, why in report.failed.items()}
    assert reasons.keys() == {"broken.mp4", "noise.mp4", "empty.mp4", "silent.mp4",
                              "my holiday.mp4", "nowhere.mp4"}
    for name, words in {"broken.mp4": "copy", "noise.mp4": "convert it to mp4", "empty.mp4": "0 bytes",
                        "silent.mp4": "has no sound track", "nowhere.mp4": "no such file",
                        "my holiday.mp4": "rename it, for example my_holiday.mp4"}.items():
        assert words in reasons[name] and str(tmp_path) not in reasons[name]
        assert "\n" not in reasons[name]
    assert len(features(tmp_path / "out")) == 5
    lines = str(report).splitlines()
    assert lines[0] == "5 videos done, 0 done before, 6 failed" and len(lines) == 7
    again = run([folder, tmp_path / "nowhere.mp4"], tmp_path / "out")
    assert again == Report((), report.done, report.failed)


def test_silence_on_request(tmp_path):
    track(tmp_path / "silent.mp4", "visual")
    report = run(tmp_path / "silent.mp4", tmp_path, allow_missing=True)
    assert report.done == ("silent",) and len(features(tmp_path, "small_audio")["silent"]) == 2


@pytest.mark.parametrize("kind, other", [("visual", "audio"), ("audio", "visual")])
def test_one_sense_alone_needs_one_track(tmp_path, kind, other):
    track(tmp_path / "has.mp4", kind)
    track(tmp_path / "lacks.mp4", other)
    report = run(tmp_path, tmp_path, **{other: None})
    assert report.done == ("has",) and "has no" in report.failed[str(tmp_path / "lacks.mp4")]
    assert [path.name for path in (tmp_path / "feats").iterdir()] == [f"small_{kind}"]


def test_features_that_overflow_are_refused(videos, tmp_path):
    report = run(videos, tmp_path, visual=dot("huge", scale=1e6), audio=None)
    assert not report.done and len(report.failed) == 5 and not features(tmp_path, "huge")
    assert "not finite in half precision" in report.failed[str(videos / "clip0.mp4")]


def test_a_full_disk_stops_the_run(videos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(extraction, "save_array", full)
    with pytest.raises(OSError, match="No space"):
        run(videos, tmp_path)


# Going on --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import numpy as np
import mcd_edu.extraction as extraction
import mcd_edu.media as media

class Dying:
    left = {left}
    def save(self, file, array, allow_pickle):
        Dying.left -= 1
        if Dying.left: return np.save(file, array, allow_pickle=allow_pickle)
        np.save(file, array, allow_pickle=allow_pickle)
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    def __getattr__(self, name): return getattr(np, name)

media.np = Dying()
extraction.extract(sys.argv[1], sys.argv[2], batch=2, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
@pytest.mark.parametrize("left", [1, 6])
def test_killed_while_writing_then_resumed(videos, tmp_path, left):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(videos, whole)
    killed = subprocess.run([sys.executable, "-c", KILLED.format(left=left), videos, out], cwd=ROOT,
                            capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = "small_visual", "small_audio"
    written = [features(out, name) for name in names]  # none of them is broken
    assert sum(map(len, written)) == left - 1
    report = run(videos, out)
    complete = written[0].keys() & written[1].keys()
    assert set(report.skipped) == complete and len(report.done) == 5 - len(complete)
    for name in names:
        same(features(out, name), features(whole, name))
    assert not list(out.rglob(".*"))


def test_finished_videos_are_not_read_again(videos, tmp_path, monkeypatch):
    run(sorted(videos.iterdir())[:3], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    seen = []
    monkeypatch.setattr(extraction, "read_segments",
                        lambda path, *args: seen.append(path.stem) or read_segments(path, *args))
    report = run(videos, tmp_path)
    assert report.skipped == ("clip0", "clip1", "clip2") and report.done == ("clip3", "clip4")
    assert seen == ["clip3", "clip4"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_damaged_features_are_made_again(videos, tmp_path):
    run(videos, tmp_path)
    good, bad = sorted((tmp_path / "feats" / "small_visual").glob("*.npy"))[:2]
    whole, time = features(tmp_path), good.stat().st_mtime_ns
    bad.write_bytes(bad.read_bytes()[:50])
    report = run(videos, tmp_path)
    assert report.done == (bad.stem,) and good.stat().st_mtime_ns == time
    same(features(tmp_path), whole)  # alone or beside others: some processors round the last bit otherwise


def test_another_encoder_is_added_alone(videos, tmp_path):
    calls = []
    first = dot("first", watch=lambda: calls.append("first"))
    run(videos, tmp_path, visual=first, audio=None)
    calls.clear()
    report = run(videos, tmp_path, visual=first, audio=dot("ear", "audio"))
    assert len(report.done) == 5 and len(features(tmp_path, "ear")) == 5
    assert calls == []  # its features were there


# Shards ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_cover_every_video_once(videos, tmp_path, world):
    reports = [run(videos, tmp_path, visual=dot("x"), audio=None, shard=(rank, world))
               for rank in range(world)]
    done = [name for report in reports for name in report.done]
    assert sorted(done) == [f"clip{i}" for i in range(5)]
    assert not any(report.skipped for report in reports)


def test_a_bad_video_fails_in_one_shard(videos, tmp_path):
    folder = shutil.copytree(videos, tmp_path / "in")
    (folder / "a b.mp4").write_bytes(b"")
    reports = [run(folder, tmp_path, visual=dot("x"), audio=None, shard=(i, 2)) for i in range(2)]
    assert sum(len(report.failed) for report in reports) == 1


def test_shards_at_the_same_time(videos, tmp_path):
    code = ("import sys; from mcd_edu.extraction import extract; "
            "extract(sys.argv[1], sys.argv[2], shard=(int(sys.argv[3]), 2), progress=False)")
    shards = [subprocess.Popen([sys.executable, "-c", code, videos, tmp_path, str(i)], cwd=ROOT)
              for i in range(2)]
    assert [shard.wait(120) for shard in shards] == [0, 0]
    run(videos, tmp_path / "whole")
    same(features(tmp_path), features(tmp_path / "whole"))


@pytest.mark.parametrize("options", [
    {"shard": (2, 2)}, {"shard": (-1, 2)}, {"shard": (0, 0)}, {"segments": 0}, {"batch": 0},
    {"workers": 0}, {"visual": None, "audio": None}, {"visual": "small_audio"}, {"audio": "bert"},
    {"visual": dot("x", "audio")}, {"visual": dot("x", "text")}, {"visual": dot("../x")},
    {"visual": dot("a/b")}, {"visual": dot(".x")}, {"visual": dot("")}, {"visual": dot("x\n")},
    {"visual": dot("x\\y")}])
def test_wrong_options(videos, tmp_path, options):
    with pytest.raises(ValueError, match="."):
        run(videos, tmp_path / "out", **options)
    assert not list(tmp_path.rglob("*.*")), "something was written"


# Whose folder ----------------------------------------------------------------------------------

def test_a_folder_of_another_encoder_is_refused(videos, tmp_path):
    run(videos, tmp_path, visual=dot("x"), audio=None)
    before = features(tmp_path, "x")
    with pytest.raises(EncoderError, match="x: holds features of other weights"):
        run(videos, tmp_path, visual=dot("x", scale=2.0), audio=None)
    with pytest.raises(EncoderError, match="other segments .10, now 60"):
        run(videos, tmp_path, visual=dot("x"), audio=None, segments=60)
    same(features(tmp_path, "x"), before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_nobody_waits_for_a_pipe_in_place_of_a_note(videos, tmp_path):
    (tmp_path / "feats" / "x").mkdir(parents=True)
    os.mkfifo(tmp_path / "feats/x/encoder.json")
    with pytest.raises(EncoderError, match="encoder.json: cannot be read .*; delete that folder"):
        run(videos, tmp_path, visual=dot("x"), audio=None)


def test_other_small_encoders_are_refused(videos, tmp_path):
    torch.manual_seed(1)
    save_encoders(tmp_path / "mine", VisualEncoder(), AudioEncoder())
    mine = load_encoder(f"small_visual:{tmp_path}/mine")
    assert mine.name == "small_visual-mine" and mine.digest != load_encoder("small_visual").digest
    run(videos, tmp_path, visual=f"small_visual:{tmp_path}/mine", audio=None)
    save_encoders(tmp_path / "mine", VisualEncoder(), AudioEncoder())  # trained again
    with pytest.raises(EncoderError, match="other weights"):
        run(videos, tmp_path, visual=f"small_visual:{tmp_path}/mine", audio=None)


def test_features_of_unknown_origin_are_refused(tmp_path):
    np.save(tmp_path / "old.npy", np.zeros((2, 2)))
    with pytest.raises(EncoderError, match="unknown origin; delete"):
        claim_folder(tmp_path, dot("x"), 10)


@pytest.mark.parametrize("text", ["", "{", "3", "[1]", "null", '"x"', "\x00"])
def test_a_damaged_note_is_refused(tmp_path, text):
    (tmp_path / "encoder.json").write_text(text)
    with pytest.raises(EncoderError, match="delete that folder"):
        claim_folder(tmp_path, dot("x"), 10)


@pytest.mark.parametrize("links", [True, False])
def test_of_many_who_claim_one_succeeds(tmp_path, monkeypatch, links):
    if not links:
        def unsupported(*_):
            raise OSError("Operation not permitted")

        monkeypatch.setattr(os, "link", unsupported)
    path, barrier = tmp_path / "deep" / "note", threading.Barrier(8)

    def claim(i):
        if links:
            barrier.wait()
        place_once(path, f"{i}" * 1000)
        return path.read_text()

    if links:
        with ThreadPoolExecutor(8) as pool:
            texts = set(pool.map(claim, range(8)))
    else:
        texts = {claim(i) for i in range(3)}
    assert len(texts) == 1 and [p.name for p in path.parent.iterdir()] == ["note"]


# Which videos ----------------------------------------------------------------------------------

def test_files_and_folders_each_once(tmp_path):
    for name in "b.mp4", "sub/a.MKV", "sub/deep/c.webm", ".hidden.mp4", ".cache/d.mp4", "notes.txt":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "odd.xyz").touch()
    paths = find_videos([tmp_path, tmp_path / "b.mp4", str(tmp_path / "sub" / ".." / "b.mp4"),
                         tmp_path / "odd.xyz"])
    assert [path.name for path in paths] == ["a.MKV", "b.mp4", "c.webm", "odd.xyz"]


def test_two_videos_of_one_name_are_refused_before_anything_starts(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "in" / "one")
    shutil.copy(videos / "clip0.mp4", tmp_path / "in" / "clip0.mp4")
    with pytest.raises(ValueError, match="clip0.mp4 and .*clip0.mp4 have one name.*rename"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_videos(tmp_path):
    with pytest.raises(ValueError, match="no video in this folder"):
        find_videos(tmp_path)
    with pytest.raises(ValueError, match="there are no videos"):
        find_videos([])


# Decoding ahead --------------------------------------------------------------------------------

@pytest.mark.parametrize("workers, waiting", [(1, 1), (2, 3), (4, 9)])
def test_in_order_and_never_far_ahead(workers, waiting):
    begun, taken = [], []
    for job, result in ahead(lambda n: begun.append(n) or -n, range(50), workers, waiting):
        assert len(begun) - len(taken) <= waiting + 1
        taken.append((job, result.result()))
    assert taken == [(n, -n) for n in range(50)]


def test_who_stops_taking_stops_the_work():
    begun = []
    for _ in ahead(begun.append, range(1000), 2, 4):
        break
    assert len(begun) < 10


def test_decoding_goes_on_while_an_encoder_works(videos, tmp_path, monkeypatch):
    later = threading.Event()

    def watched(path, *args):
        if path.stem == "clip2":
            later.set()
        return read_segments(path, *args)

    monkeypatch.setattr(extraction, "read_segments", watched)
    waits = []
    encoder = dot("x", watch=lambda: waits and waits.append(later.wait(20)))
    assert encoder.dim == 2  # tried before the run
    waits.append(True)
    assert len(run(videos, tmp_path, visual=encoder, audio=None, batch=1).done) == 5
    assert len(waits) == 6 and all(waits)


# Names -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, expected", [
    ("clip", ("clip", "", "clip")),
    ("resnet:microsoft/resnet-18", ("resnet", "microsoft/resnet-18", "resnet-resnet-18")),
    ("bert:bert-base-uncased", ("bert", "bert-base-uncased", "bert-bert-base-uncased"))])
def test_names(spec, expected):
    assert parse_name(spec) == expected


def test_the_name_of_a_folder_is_plain(tmp_path, monkeypatch):
    odd = tmp_path / "my best: model…"
    (odd / "sub").mkdir(parents=True)
    assert parse_name(f"vit:{odd}")[2] == "vit-my_best_model_"
    monkeypatch.chdir(odd / "sub")
    assert parse_name("vit:..")[2] == "vit-my_best_model_"
    assert parse_name("vit:/")[2] == "vit-"


@pytest.mark.parametrize("spec", [
    "", ":", "resnest", "../clip", "/clip", "clip/..", "clip:", "clip:../../x", "clip:/no/such/x",
    "clip:a/../b", "clip:a/b/c", "clip:./x", "clip:\0", "small_visual:some/hub", "small_audio:",
    "clip:a b", "clip:..", "clip:-/../x"])
def test_wrong_names(spec, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    if spec == "clip:..":
        spec = "clip:..."
    with pytest.raises(EncoderError) as caught:
        parse_name(spec)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_small_encoders_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no encoder there"):
        load_encoder(f"small_audio:{tmp_path}")


def test_a_device_that_is_not_there():
    with pytest.raises(EncoderError, match="small_visual.*nosuch"):
        load_encoder("small_visual", "nosuch")


# Without transformers --------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_without_transformers(family, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for spec in family, f"{family}:{tmp_path}":
        with pytest.raises(EncoderError, match=r'pip install "mcd_edu\[backbones\]"') as caught:
            load_encoder(spec)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(family)


def test_our_own_encoders_do_not_import_it():
    code = ("import sys, mcd_edu.extraction as e; e.load_encoder('small_visual'); "
            "assert 'transformers' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


# Encoders of transformers, by the true path ----------------------------------------------------

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] is there a piano violin how many ? the left right".split()
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DIMS = {"resnet": 24, "vit": 16, "swin": 32, "clip": 12, "ast": 16, "clap": 20, "clip_text": 16,
        "bert": 16, "roberta": 16}
PICTURE = {"height": 32, "width": 32}


def save_clip(hf, folder):
    letters = [*"abcdefghijklmnopqrstuvwxyz?"]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "pi", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\np i\n")
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    text = {**SIZE, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 12,
            "projection_dim": 12, "pad_token_id": ends["eos_token_id"]}
    vision = {**SIZE, "image_size": 32, "patch_size": 8, "projection_dim": 12}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    hf.CLIPModel(config).save_pretrained(folder)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=PICTURE).save_pretrained(folder)
    reading = {name: f"<|{text}|>" for name, text in {
        "bos_token": "startoftext", "eos_token": "endoftext", "unk_token": "endoftext",
        "pad_token": "endoftext"}.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, **reading}))


def save_resnet(hf, folder):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic")
    hf.ResNetForImageClassification(config).save_pretrained(folder)  # as on the hub: with a head
    hf.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)


def save_vit(hf, folder):
    config = hf.ViTConfig(**SIZE, image_size=32, patch_size=8)
    hf.ViTForImageClassification(config).save_pretrained(folder)
    hf.ViTImageProcessor(size=PICTURE).save_pretrained(folder)


def save_swin(hf, folder):
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1],
                           num_heads=[2, 2], window_size=4)
    hf.SwinForImageClassification(config).save_pretrained(folder)
    hf.ViTImageProcessor(size=PICTURE).save_pretrained(folder)


def save_ast(hf, folder):
    config = hf.ASTConfig(**SIZE, max_length=128, num_mel_bins=32)
    hf.ASTForAudioClassification(config).save_pretrained(folder)
    hf.ASTFeatureExtractor(max_length=128, num_mel_bins=32).save_pretrained(folder)


def save_clap(hf, folder, truncation="rand_trunc"):
    sound = {"spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 16,
             "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
             "hidden_size": 32, "window_size": 4, "projection_dim": 20, "num_classes": 4,
             "enable_fusion": truncation == "fusion"}
    text = {**SIZE, "vocab_size": 40, "max_position_embeddings": 20, "projection_dim": 20}
    config = hf.ClapConfig(text_config=text, audio_config=sound, projection_dim=20)
    hf.ClapModel(config).save_pretrained(folder)
    hf.ClapFeatureExtractor(feature_size=16, max_length_s=2, truncation=truncation).save_pretrained(folder)


def save_bert(hf, folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    config = hf.BertConfig(**SIZE, vocab_size=len(WORDS), max_position_embeddings=12)
    hf.BertForMaskedLM(config).save_pretrained(folder)  # as on the hub: no pooler, another head
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def save_roberta(hf, folder):
    letters = [*"abcdefghijklmnopqrstuvwxyz?", "Ġ"]
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = hf.RobertaConfig(**SIZE, vocab_size=len(vocabulary), max_position_embeddings=14,
                              pad_token_id=1, bos_token_id=0, eos_token_id=2)
    hf.RobertaForMaskedLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))


SAVE = {"resnet": save_resnet, "vit": save_vit, "swin": save_swin, "clip": save_clip, "ast": save_ast,
        "clap": save_clap, "clip_text": save_clip, "bert": save_bert, "roberta": save_roberta}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny checkpoint of a family, with random weights and all that belongs to it."""
    hf = pytest.importorskip("transformers")
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("checkpoints") / f"tiny_{family}"
            made[family].mkdir()
            torch.manual_seed(0)
            SAVE[family](hf, made[family])
        return made[family]

    return make


def inputs(kind, n=3):
    generator = np.random.default_rng(0)
    if kind == "visual":
        return generator.integers(0, 256, (n, 4, 128, 128, 3), np.uint8)
    if kind == "audio":
        return generator.normal(0, 0.1, (n, 16_000)).astype(np.float32)
    return ["is there a piano?", "how many?", "the left violin?"][:n]


each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_every_family_loads_from_disk(family, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec, kind = f"{family}:{checkpoint(family)}", ENCODERS[family]
    encoder = load_encoder(spec, kind=kind)
    assert (encoder.name, encoder.kind, encoder.dim) == (f"{family}-tiny_{family}", kind, DIMS[family])
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    found = encoder(inputs(kind))
    again = load_encoder(spec)
    assert again.digest == encoder.digest and len(encoder.digest) == 16
    if kind == "text":
        (found, mask), repeated = found, again(inputs(kind))[0]
        assert mask.dtype == torch.bool and mask.shape == found.shape[:2] and not mask.all()
    else:
        repeated = again(inputs(kind))
        assert found.shape == (3, DIMS[family])
    assert found.isfinite().all() and not found.requires_grad
    assert (found[0] - found[1]).abs().max() > 1e-4  # other inputs, other features
    assert_close(found, repeated, atol=0, rtol=0)


@each_family
def test_alone_as_in_a_batch(family, checkpoint):
    encoder, kind = load_encoder(f"{family}:{checkpoint(family)}"), ENCODERS[family]
    several, found = inputs(kind), encoder(inputs(kind))
    for i in range(3):
        alone = encoder(several[i:i + 1])
        if kind == "text":
            there = found[1][i]
            assert_close(alone[0][0], found[0][i][there], atol=1e-5, rtol=1e-5)
        else:
            assert_close(alone[0], found[i], atol=1e-5, rtol=1e-5)


def test_the_features_are_those_of_the_model(checkpoint):
    hf = pytest.importorskip("transformers")
    frames, sound = inputs("visual"), inputs("audio")
    folder = checkpoint("vit")
    pixels = hf.AutoImageProcessor.from_pretrained(folder)(images=list(frames[:, 2]), return_tensors="pt")
    whole = hf.ViTForImageClassification.from_pretrained(folder).eval()
    states = whole(**pixels, output_hidden_states=True).hidden_states[-1]
    expected = whole.vit.layernorm(states)[:, 0]
    assert_close(load_encoder(f"vit:{folder}")(frames), expected.detach(), atol=1e-5, rtol=1e-5)

    folder = checkpoint("clip")
    pixels = hf.AutoImageProcessor.from_pretrained(folder)(images=list(frames[:, 2]), return_tensors="pt")
    model = hf.CLIPModel.from_pretrained(folder).eval()
    expected = model.visual_projection(model.vision_model(**pixels).pooler_output)
    assert_close(load_encoder(f"clip:{folder}")(frames), expected.detach(), atol=1e-5, rtol=1e-5)

    folder = checkpoint("ast")
    heard = hf.AutoFeatureExtractor.from_pretrained(folder)(list(sound), sampling_rate=16_000,
                                                            return_tensors="pt")
    model = hf.ASTModel.from_pretrained(folder).eval()
    expected = model(heard["input_values"]).last_hidden_state[:, :2].mean(1)
    assert_close(load_encoder(f"ast:{folder}")(sound), expected.detach(), atol=1e-5, rtol=1e-5)


def test_only_the_frame_after_the_half_counts(checkpoint):
    encoder, frames = load_encoder(f"resnet:{checkpoint('resnet')}"), inputs("visual")
    changed = frames.copy()
    changed[:, [0, 1, 3]] = 255 - changed[:, [0, 1, 3]]
    assert_close(encoder(changed), encoder(frames), atol=0, rtol=0)
    changed[:, 2] = 0
    assert (encoder(changed) - encoder(frames)).abs().max() > 1e-4


def test_clap_hears_at_its_own_rate(checkpoint):
    hf = pytest.importorskip("transformers")
    folder = checkpoint("clap")
    tones = 300 + 200 * np.arange(3)[:, None]
    expected = hf.AutoFeatureExtractor.from_pretrained(folder)(
        list(np.sin(2 * np.pi * tones * np.arange(48_000) / 48_000)), sampling_rate=48_000,
        return_tensors="pt")["input_features"].float()
    sound = np.sin(2 * np.pi * tones * np.arange(16_000) / 16_000).astype(np.float32)
    found = load_encoder(f"clap:{folder}").prepare(sound)["input_features"]
    loud = expected > expected.amax() - 30
    assert loud.any() and (found - expected)[loud].abs().mean() < 1  # dB


def test_clap_with_fusion_draws_no_lots(tmp_path):
    save_clap(pytest.importorskip("transformers"), tmp_path, "fusion")
    encoder, sound = load_encoder(f"clap:{tmp_path}"), inputs("audio")
    found = [encoder(sound) for _ in range(4)]
    for other in found[1:]:
        assert_close(other, found[0], atol=0, rtol=0)
    assert_close(encoder(sound[1:2])[0], found[0][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [
    np.zeros((2, 4, 8, 8, 3)), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((0, 4, 8, 8, 3), np.uint8),
    np.zeros((2, 4, 3, 8, 8), np.uint8)])
def test_wrong_pictures(checkpoint, wrong):
    with pytest.raises(ValueError, match="expected pictures.*read_segments"):
        load_encoder(f"vit:{checkpoint('vit')}")(wrong)


@pytest.mark.parametrize("wrong", [np.zeros((2, 16_000), int), np.zeros(16_000), np.zeros((0, 16_000))])
def test_wrong_sound(checkpoint, wrong):
    with pytest.raises(ValueError, match="expected sound.*read_segments"):
        load_encoder(f"ast:{checkpoint('ast')}")(wrong)


@pytest.mark.parametrize("wrong", [[], "one text", [3], None])
def test_wrong_texts(checkpoint, wrong):
    with pytest.raises(ValueError, match="expected a list of texts"):
        load_encoder(f"bert:{checkpoint('bert')}")(wrong)


def test_threads_may_prepare_at_the_same_time(checkpoint):
    for family in ("vit", "clap"):
        encoder = load_encoder(f"{family}:{checkpoint(family)}")
        several = inputs(encoder.kind, 8)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i, e=encoder, x=several: e.prepare(x[i:i + 1]), range(8)))
        for key, whole in encoder.prepare(several).items():
            assert_close(torch.cat([one[key] for one in found]), whole, atol=0, rtol=0)


@pytest.mark.parametrize("family, held, words", [
    ("resnet", "vit", "holds a model of type 'vit', not 'resnet'"),
    ("bert", "roberta", "'roberta', not 'bert'"), ("clap", "ast", "audio-spectrogram"),
    ("clip_text", "bert", "'bert'")])
def test_a_checkpoint_of_another_family_is_refused(checkpoint, family, held, words):
    with pytest.raises(EncoderError, match=words) as caught:
        load_encoder(f"{family}:{checkpoint(held)}")
    assert "\n" not in str(caught.value)


def test_weights_in_a_pickle_are_not_read(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("vit"), tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="cannot load .*model.safetensors"):
        load_encoder(f"vit:{folder}")


@pytest.mark.parametrize("key", ["vit.encoder.layer.0", "vit.layernorm.bias"])
def test_missing_weights_are_not_made_up(checkpoint, tmp_path, key):
    folder = shutil.copytree(checkpoint("vit"), tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.startswith(key)}
    if len(kept) == len(weights):
        pytest.skip("this version names its weights otherwise")
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match="weights are missing, such as"):
        load_encoder(f"vit:{folder}")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_an_incomplete_checkpoint_is_refused(checkpoint, tmp_path, lost, how):
    folder = shutil.copytree(checkpoint("vit"), tmp_path / "half")
    (folder / lost).unlink()
    if how == "damaged":
        (folder / lost).write_bytes(b"{\xff")
    with pytest.raises(EncoderError, match="cannot load .*half") as caught:
        load_encoder(f"vit:{folder}")
    assert "\n" not in str(caught.value)


def test_a_processor_of_another_size_is_refused(checkpoint, tmp_path):
    hf = pytest.importorskip("transformers")
    folder = shutil.copytree(checkpoint("vit"), tmp_path / "wide")
    hf.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    with pytest.raises(EncoderError, match="does not run on cpu"):
        load_encoder(f"vit:{folder}")


@pytest.mark.parametrize("device", ["hpu", "privateuseone", "lazy", "warp"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(EncoderError, match=f"does not run on {device} .*; choose another device") as caught:
        load_encoder("small_audio", device)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_name_on_the_hub_without_network(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    code = ("import sys; from mcd_edu.extraction import *\n"
            "try: load_encoder('resnet:no-such/checkpoint')\n"
            "except EncoderError as error: print(error)")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=120,
                           capture_output=True, text=True)
    assert found.stdout.startswith("resnet-checkpoint: cannot load no-such/checkpoint ("), found.stderr
    assert found.stdout.count("\n") == 1


@each_family
def test_loading_is_quiet_and_leaves_the_library_as_it_was(family, checkpoint, capfd):
    hf = pytest.importorskip("transformers")
    folder = checkpoint(family)
    capfd.readouterr()
    before = hf.utils.logging.get_verbosity(), hf.utils.logging.is_progress_bar_enabled()
    load_encoder(f"{family}:{folder}")
    assert (hf.utils.logging.get_verbosity(), hf.utils.logging.is_progress_bar_enabled()) == before
    assert "".join(capfd.readouterr()) == ""


def test_extract_with_pretrained_encoders(videos, checkpoint, tmp_path):
    options = {"visual": f"clip:{checkpoint('clip')}", "audio": f"clap:{checkpoint('clap')}"}
    report = run(videos, tmp_path, batch=3, **options)
    assert len(report.done) == 5
    for family in ("clip", "clap"):
        encoder = load_encoder(f"{family}:{checkpoint(family)}")
        found = features(tmp_path, encoder.name)
        for name, feature in found.items():
            prepared = prepare_video(videos / f"{name}.mp4", [encoder], 10)[0]
            np.testing.assert_allclose(feature, encoder.encode(prepared).numpy(), **HALF)
    run(videos, tmp_path / "one", batch=1, workers=1, **options)
    same(features(tmp_path, "clap-tiny_clap"), features(tmp_path / "one", "clap-tiny_clap"))


# Questions -------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["clip_text", "bert", "roberta"])
def test_questions(family, checkpoint):
    encoder = load_encoder(f"{family}:{checkpoint(family)}")
    texts = ["is there a piano?", "how?", "is there a piano?", "the violin", "how?"]
    found, mask = encode_questions(texts, encoder, batch=2)
    assert found.shape[:2] == mask.shape and mask.shape[0] == 5 and mask.any(0).all()
    assert found.dtype == torch.float32 and mask.dtype == torch.bool
    assert_close(found[0], found[2], atol=0, rtol=0)
    assert not found[~mask].any()
    for i, text in enumerate(texts):
        alone, there = encoder([text])
        assert there.all()
        assert_close(found[i][mask[i]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["clip_text", "bert", "roberta"])
def test_a_long_question_is_cut(family, checkpoint):
    found, mask = encode_questions(["is there a piano " * 30], load_encoder(f"{family}:{checkpoint(family)}"))
    assert found.shape[1] == 12 and mask.all() and found.isfinite().all()


def test_wrong_questions(checkpoint):
    with pytest.raises(EncoderError, match="no text encoder"):
        encode_questions(["how?"], load_encoder("small_visual"))
    for wrong in ([], "how?", [3]):
        with pytest.raises(ValueError, match="expected a list"):
            encode_questions(wrong, load_encoder(f"bert:{checkpoint('bert')}"))


# Sound at another rate -------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 32_000, 44_100, 48_000])
def test_resampling_keeps_pitch_time_and_length(rate):
    pitch = np.array([[300], [1000]])
    found = resample(np.sin(2 * np.pi * pitch * np.arange(16_000) / 16_000).astype(np.float32), rate)
    expected = np.sin(2 * np.pi * pitch * np.arange(rate) / rate)
    assert found.shape == (2, rate) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 300:-300], expected[:, 300:-300], atol=0.02)
