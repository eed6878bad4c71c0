"""Whatever is handed in, the command line answers with a result or with one sentence that helps.

One table: what was spoilt, what was typed, what the sentence must say. Every case ends with an exit
code, a single `error:` line without a traceback, and every file of the folder as it was.

    pytest tests/test_bad_input.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mcd_edu.cli import main
from mcd_edu.training import make_toy_set

ROOT = Path(__file__).resolve().parent.parent
ASK = "How many instruments are sounding in the video?"
VIDEO = "00000000"                       # a training clip of the toy set
TRAIN = "train data --out new --epochs 1 --option embed_dim=16"
AGAIN = TRAIN.replace("new", "model")    # where a training is already
EVALUATE = "evaluate data --checkpoint model"
ANSWER = "answer clip.mp4 ASK --checkpoint asked"
LISTEN = "answer clip.wav ASK --checkpoint asked --allow-missing"
PACK = "pack data/feats/small_visual --out new --encoder toy"


class Case(NamedTuple):
    """What is typed, what the error says, what was spoilt before."""
    line: str
    message: str
    spoil: Callable[[Path], object] | None = None
    code: int = 1


# ---- ways to spoil a file

def put(name: str, content: str | bytes = "") -> Callable:
    """Something else where a file is expected."""
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    def spoil(place):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return spoil


def cut(name: str, share: float = 0.5) -> Callable:
    """A file that ends too early."""
    def spoil(place):
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[:int(share * len(content))])
    return spoil


def lose(name: str) -> Callable:
    """A file or folder that is gone."""
    def spoil(place):
        shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()
    return spoil


def change(name: str, **keys) -> Callable:
    """Other values in a JSON file: of its first record, or of the object it holds."""
    def spoil(place):
        content = json.loads((place / name).read_text())
        record = content[0] if isinstance(content, list) else content
        for path, value in keys.items():
            part, *rest = path.split("__")
            target, key = (record[part], rest[0]) if rest else (record, part)
            if value is LOST: del target[key]
            else: target[key] = value
        (place / name).write_text(json.dumps(content))
    return spoil


LOST = object()
ANNOTATION, CONFIG = "data/json/avqa-train.json", "asked/config.json"


def feature(array, kind: str = "visual") -> Callable:
    """Other features of one clip."""
    return lambda place: np.save(place / "data" / "feats" / f"small_{kind}" / f"{VIDEO}.npy", array)


def weights(change: Callable) -> Callable:
    """Other weights of a checkpoint."""
    def spoil(place):
        path = place / "asked" / "model.safetensors"
        save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)
    return spoil


def film(picture: bool = True, sound: bool = True, form: str = "mp4", size: int = 32) -> Callable:
    """A clip that may lack a track."""
    def spoil(place):
        with av.open(str(place / "clip.mp4"), "w", format=form) as container:
            if picture:
                video = container.add_stream("libx264", rate=4)
                video.width, video.height, video.pix_fmt = size, size, "yuv420p"
                for _ in range(8):
                    black = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8), "rgb24")
                    container.mux(video.encode(black))
                container.mux(video.encode())
            if sound:
                audio = container.add_stream("aac", rate=16_000, layout="mono")
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                silence.sample_rate, silence.pts = 16_000, 0
                container.mux(audio.encode(silence))
                container.mux(audio.encode())
    return spoil


def noise(*values: float, rate: int = 16_000) -> Callable[[Path], None]:
    """A thousand samples of a value in each channel."""
    def write(place: Path) -> None:
        with av.open(str(place / "clip.wav"), "w") as container:
            layout = "mono" if len(values) == 1 else "stereo"
            audio = container.add_stream("pcm_f32le", rate=rate, layout=layout)
            samples = av.AudioFrame.from_ndarray(np.tile(np.array(values, np.float32), (1, 1000)), "flt", layout)
            samples.sample_rate, samples.pts = rate, 0
            container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return write


def bookmark(notes) -> Callable:
    """Other notes in the progress file of a training."""
    text = notes if isinstance(notes, str) else json.dumps(notes)
    def spoil(place):
        path = place / "model" / "resume.safetensors"
        save_file(load_file(path), path, {"progress": text})
    return spoil


def lines(*changes: dict) -> bytes:
    """A file of predictions."""
    line = {"dataset": "music_avqa", "id": 1, "video": "a", "type": ["Audio", "Counting"],
            "gold": "one", "prediction": "two"}
    return "".join(json.dumps(line | change) + "\n" for change in changes).encode()


def many(*steps: Callable) -> Callable:
    """One spoiling after the other."""
    return lambda place: [step(place) for step in steps]


def videos_with_questions(place: Path) -> None:
    """Questions of MSVD-QA beside the features that are there."""
    record = {"answer": "man", "id": 0, "question": "who is there?", "video_id": 1}
    put("data/test_qa.json", json.dumps([record]))(place)
    put("data/youtube_mapping.txt", f"{VIDEO} vid1\n")(place)


CASES = {
    # media
    "no such video": Case("answer none.mp4 ASK --checkpoint asked", "none.mp4: no such file; give"),
    "a folder for a video": Case("answer data ASK --checkpoint asked", "data: is a folder; give"),
    "a text for a video": Case(ANSWER, "clip.mp4: not a video", put("clip.mp4", "not a film")),
    "an empty video": Case(ANSWER, "clip.mp4: is empty", put("clip.mp4")),
    "half a video": Case(ANSWER, "copy it again", cut("clip.mp4")),
    "a device for a video": Case(f"answer {os.devnull} ASK --checkpoint asked", "no such file; give"),
    "a name beyond all lengths": Case(f"answer {'x' * 5000}.mp4 ASK --checkpoint asked", "File name too long; give"),
    "a NUL in a name": Case("answer a\0b.mp4 ASK --checkpoint asked", "embedded null byte", code=2),
    "a playlist for a video": Case(ANSWER, "not a video", put("clip.mp4", "#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")),
    "a picture for a video": Case(ANSWER, "not a video", put("clip.mp4", b"\x89PNG\r\n\x1a\n" + bytes(200))),
    "a page for a video": Case(ANSWER, "not a video", put("clip.mp4", "<html><body>404</body></html>")),
    "no sound": Case(ANSWER, "has no sound track", film(sound=False)),
    "no pictures": Case(ANSWER, "has no picture track", film(picture=False)),
    "sound that is not a number": Case(LISTEN, "no numbers", noise(np.nan)),
    "sound without bounds": Case(LISTEN, "no numbers", noise(np.inf, -np.inf)),
    "sound at two million samples a second": Case(LISTEN, "2000000 samples a second", noise(0, rate=2_000_000)),
    "an address for a video": Case("answer https://example.org/x.mp4 ASK --checkpoint asked", "no such file"),
    "no video in a folder": Case("extract data --out new", "data: there is no video in this folder; give another"),
    "two videos of one name": Case("extract clip.mp4 copy/clip.mp4 --out new", "have one name",
                                   put("copy/clip.mp4", "x")),

    # features
    "no features": Case(TRAIN, "feats/small_visual: features are missing; extract them", lose("data/feats/small_visual")),
    "no features of one clip": Case(TRAIN, f"{VIDEO}.npy: features are missing", lose(f"data/feats/small_visual/{VIDEO}.npy")),
    "features cut off": Case(TRAIN, "extract it again", cut(f"data/feats/small_visual/{VIDEO}.npy")),
    "features that are text": Case(TRAIN, "is no whole .npy file", put(f"data/feats/small_audio/{VIDEO}.npy", "1 2 3")),
    "features that are pickled": Case(TRAIN, "is no whole .npy file", feature(np.array([{}, print], object))),
    "features of whole numbers": Case(TRAIN, "expected floats", feature(np.ones((10, 37), int))),
    "features of four axes": Case(TRAIN, "expected floats of", feature(np.ones((2, 2, 2, 37), "f4"))),
    "features without segments": Case(TRAIN, "expected floats of", feature(np.ones((0, 37), "f4"))),
    "features with a hole": Case(TRAIN, "not finite; extract it again", feature(np.full((10, 37), np.nan, "f4"))),
    "features of another width": Case(TRAIN, "was it made by another encoder?", feature(np.ones((10, 36), "f4"))),
    "features of another length": Case(TRAIN, "9 and 10 segments; extract both again", feature(np.ones((9, 37), "f4"))),
    "features of another encoder": Case(EVALUATE + " --visual small_audio", "the model was built for b t 37"),
    "a folder of nothing": Case(TRAIN + " --visual empty", "holds neither .npy files nor",
                                lambda place: (place / "data/feats/empty").mkdir()),
    "packing nothing": Case("pack none --out new --encoder toy", "none: features are missing"),
    "packing what is no array": Case("pack x.npy --out new --encoder toy", "is no whole .npy file", put("x.npy", "x")),
    "packing without ids": Case("pack x.npy --out new --encoder toy", "x.json: is missing; put the ids beside",
                                lambda place: np.save(place / "x.npy", np.ones((2, 3, 4)))),
    "ids that leave the folder": Case("pack x.npy --out new --encoder toy", "is not a plain file name", many(
        lambda place: np.save(place / "x.npy", np.ones((2, 3, 4))), put("x.json", '["../a", "b"]'))),
    "packing without a name": Case("pack data/feats/small_visual --out new", "does not say what made it"),
    "packing under a name of signs": Case(PACK.replace("toy", "a\x1b[31m"), "does not say what made it, in plain text"),
    "packing among other files": Case("pack data/feats/small_visual --out data/json --encoder toy", "a folder of its own"),
    "numbers too large for half": Case(PACK, "pack with dtype='float32'", feature(np.full((10, 37), 1e6, "f4"))),
    "a store of another version": Case("pack store --out new", "is of version 9",
                                       put("store/index.json", '{"format": "mcd_edu features", "version": 9}')),
    "a store that is damaged": Case("pack store --out new", "is damaged; pack the features again",
                                    put("store/index.json", '{"format": "mcd_edu features", "version": 1}')),
    "a note that is none": Case(PACK, "mend it or delete it", put("data/feats/small_visual/encoder.json", "[" * 100_000)),

    # annotations
    "no dataset": Case("train none --out new", "none: no dataset there; looked for avqa-train.json"),
    "no annotations": Case("train data --out new --dataset avqa", "train_qa.json: no such annotation file"),
    "annotations cut off": Case(TRAIN, "not JSON", cut(ANNOTATION)),
    "annotations that are no text": Case(TRAIN, "not JSON", put(ANNOTATION, b"\xff\xfe\0\x81")),
    "annotations without end": Case(TRAIN, "not JSON", put(ANNOTATION, "[" * 200_000)),
    "annotations of another kind": Case(TRAIN + " --dataset music_avqa", "expected a list of records", put(ANNOTATION, "{}")),
    "a record that is none": Case(TRAIN + " --dataset music_avqa", "record 0: is not a record; mend it", put(ANNOTATION, "[7]")),
    "no answer": Case(TRAIN + " --dataset music_avqa", "record 0: has no 'anser'", change(ANNOTATION, anser=LOST)),
    "an unknown answer": Case(TRAIN, "record 0: unknown answer 'maybe'", change(ANNOTATION, anser="maybe")),
    "an unknown type": Case(TRAIN, "record 0: unknown question type", change(ANNOTATION, type='["Smell", "Counting"]')),
    "a type without end": Case(TRAIN, "record 0: type '[[[", change(ANNOTATION, type="[" * 100_000)),
    "a type that is no list": Case(TRAIN, "record 0: ", change(ANNOTATION, type="Audio")),
    "an id twice": Case(TRAIN, "was there before", change(ANNOTATION, question_id=1)),
    "an id that is no number": Case(TRAIN, "is not a whole number", change(ANNOTATION, question_id="first")),
    "an id beyond all numbers": Case(TRAIN, "is not a whole number", change(ANNOTATION, question_id=10**30)),
    "a video outside": Case(TRAIN, "'../../secret' is not a plain file name", change(ANNOTATION, video_id="../../secret")),
    "a video at the root": Case(TRAIN, "is not a plain file name", change(ANNOTATION, video_id="/etc/passwd")),
    "a video on a drive": Case(TRAIN, "is not a plain file name", change(ANNOTATION, video_id="C:\\x")),
    "a video beyond all lengths": Case(TRAIN, "is not a plain file name", change(ANNOTATION, video_id="x" * 5000)),
    "a question of half a letter": Case(TRAIN, "record 0: 'utf-8' codec can't encode",
                                        change(ANNOTATION, question_content="Is it \ud800?", templ_values="[]")),
    "a hole that stays": Case(TRAIN, "record 0: ", change(ANNOTATION, question_content="Is <A> or <B>?", templ_values='["x"]')),
    "a question without words": Case(TRAIN, "has no words", change(ANNOTATION, question_content="?!", templ_values="[]")),
    "no questions": Case(EVALUATE, "test has no questions", put("data/json/avqa-test.json", "[]")),
    "all questions bad": Case(TRAIN + " --skip-bad --dataset music_avqa", "train has no questions", put(ANNOTATION, "[1, 2]")),

    # questions
    "an empty question": Case("answer clip.mp4 EMPTY --checkpoint asked", "has no words; ask something like"),
    "a question of signs": Case("answer clip.mp4 ASK ?!… --checkpoint asked", "question '?!…' has no words"),
    "a question of half a letter only": Case("answer clip.mp4 \udcff --checkpoint asked", "has no words"),
    "candidates for a classifier": Case(ANSWER + " --choice a --choice b", "2 choices: this model was trained to choose among 0"),
    "no answers wanted": Case(ANSWER + " --top 0", "--top", code=2),

    # configurations
    "an unknown model": Case(TRAIN + " --model cats", "model 'cats'; choose one of mcd"),
    "an unknown option": Case(TRAIN + " --option wings=2", "mcd has no option 'wings'"),
    "an option without a value": Case(TRAIN + " --option num_heads", "needs a value like 4"),
    "a word for a number": Case(TRAIN + " --option embed_dim=wide", "needs a value like 128"),
    "a word that is none of these": Case(TRAIN + " --option head=early", "head='early'"),
    "a width of nothing": Case(TRAIN + " --option embed_dim=0", "embed_dim=0; give a whole number from 1"),
    "a width below nothing": Case(TRAIN + " --option embed_dim=-8", "give a whole number from 1"),
    "a width beyond all memory": Case(TRAIN + " --option embed_dim=900000", "give smaller numbers"),
    "heads that do not divide": Case(TRAIN + " --option num_heads=3", "num_heads"),
    "too much dropout": Case(TRAIN + " --option dropout=1", "below 1"),
    "a weight that is no number": Case(TRAIN + " --option weight_av=nan", "weight_av=nan; give a number from 0"),
    "what the dataset decides": Case(TRAIN + " --option num_answers=3", "follows from the dataset; leave it out"),
    "frames that are not there": Case(TRAIN + " --model graph_vqa --option num_frames=5", "option num_frames=5"),
    "too short for the questions": Case(TRAIN + " --option max_tokens=3", "max_tokens=3: give a number from 20"),
    "a learning rate of nothing": Case(TRAIN + " --learning-rate 0", "learning_rate=0.0; give a number above 0"),
    "a learning rate that is none": Case(TRAIN + " --learning-rate nan", "--learning-rate", code=2),
    "a learning rate without bounds": Case(TRAIN + " --learning-rate inf", "--learning-rate", code=2),
    "a teacher that is none": Case(TRAIN + " --teacher model", "a mcd cannot teach this mcd"),
    "a training with other settings": Case("train data --out model --epochs 7", "holds a training with other settings; give"),

    # checkpoints
    "no checkpoint": Case("answer clip.mp4 ASK --checkpoint none", "none: no checkpoint there"),
    "no weights": Case(ANSWER, "model.safetensors is missing", lose("asked/model.safetensors")),
    "no configuration": Case(ANSWER, "config.json is missing", lose(CONFIG)),
    "weights cut off": Case(ANSWER, "asked/model.safetensors: unreadable", cut("asked/model.safetensors")),
    "weights that are pickled": Case(ANSWER, "unreadable", put("asked/model.safetensors", b"\x80\x02}q\0.")),
    "weights of unbelievable size": Case(ANSWER, "unreadable", put("asked/model.safetensors", b"\xff" * 8 + b"{}")),
    "weights of another model": Case(ANSWER, "the weights are of another configuration", lambda place: shutil.copy(
        place / "model/model.safetensors", place / "asked")),
    "weights that are no numbers": Case(ANSWER, "not finite", weights(lambda x: x * np.nan if x.is_floating_point() else x)),
    "weights that add up to nothing": Case(ANSWER, "numbers that are not finite", weights(lambda x: 0 * x)),
    "weights of two parts": Case(ANSWER, "the weights are of another configuration", weights(lambda x: x.to(torch.complex64))),
    "a configuration cut off": Case(ANSWER, "not the configuration of a model", cut(CONFIG)),
    "a configuration without end": Case(ANSWER, "not the configuration of a model", put(CONFIG, "[" * 200_000)),
    "a configuration of another kind": Case(ANSWER, "not the configuration", put(CONFIG, "[1, 2]")),
    "an unknown kind of model": Case(ANSWER, "of a model '__class__'", change(CONFIG, kind="__class__")),
    "a size that is a word": Case(ANSWER, "not the configuration", change(CONFIG, model__embed_dim="wide")),
    "layers without end": Case(ANSWER, "num_blocks=1000000000; give a whole number", change(CONFIG, model__num_blocks=10**9)),
    "a size beyond all memory": Case(ANSWER, "not the configuration", change(CONFIG, model__embed_dim=4 * 10**12)),
    "another vocabulary": Case(ANSWER, "words for a vocabulary of size", change(CONFIG, words=["one"])),
    "words that are numbers": Case(ANSWER, "not the configuration", change(CONFIG, words=[1, 2, "x"])),
    "no keywords": Case(ANSWER, 'no list of "keywords"', change(CONFIG, about={})),
    "a schema with too few answers": Case(
        EVALUATE + " --out new.jsonl", "the model expects a list of answers of length",
        change("model/config.json", about__schema={"name": "music_avqa", "answers": ["yes"], "num_choices": 0,
                                                   "question_types": [["Audio", "Counting"]]})),
    "questions of another dataset": Case(EVALUATE + " --dataset msvd_qa", "is none of music_avqa; give a model of this dataset",
                                         videos_with_questions),
    "a schema that is none": Case(ANSWER, "stored schema: ", change(CONFIG, about__schema=[1])),
    "for other features": Case("answer clip.mp4 ASK --checkpoint model", "visual features of width 37"),
    "a progress file cut off": Case(AGAIN, "delete it to begin anew",
                                    cut("model/resume.safetensors")),
    "a progress file without settings": Case(AGAIN, "delete it to begin anew", bookmark({"settings": {}, "history": []})),
    "a progress file of lists": Case(AGAIN, "delete it to begin anew", bookmark({"settings": [1], "history": []})),
    "a history of numbers": Case(AGAIN, "delete it to begin anew", bookmark({"settings": {"training": {}}, "history": [1]})),
    "a progress file without end": Case(AGAIN, "delete it to begin anew", bookmark("[" * 100_000)),

    # results and assignments
    "no results": Case("experiments table --data data --results none", "no result files *.json there"),
    "results without end": Case("experiments table --data data --results results", "a.json: not a result file",
                                put("results/a.json", "[" * 100_000)),
    "results of another kind": Case("experiments table --data data --results results", "a.json: not a result file",
                                    put("results/a.json", "[]")),
    "results with a word for what was measured": Case(
        "experiments table --data data --results results --claims", "'measured' of the file is of kind str",
        put("results/a.json", '{"run": {"variant": "MCD"}, "measured": "x"}')),
    "results on another folder": Case("experiments table --data data --results results", "give the plain name of a folder",
                                      put("results/a.json", '{"run": {"variant": "MCD", "annotations": "../data/json"}}')),
    "a variant that is none": Case("experiments run nosuch --data data --results new", "nosuch"),
    "variants, and all of them": Case("experiments run MCD --all --data data --results new", "name some variants, or give --all"),
    "no such assignment": Case("assignments new nosuch new", "no assignment 'nosuch'"),
    "an assignment over another": Case("assignments new fusion .", "is there already", put("fusion.ipynb", "{}")),
    "an assignment that is none": Case("assignments check clip.mp4", "clip.mp4: "),

    # the command line
    "an unknown command": Case("ansver clip.mp4 ASK", "ansver", code=2),
    "more epochs than numbers": Case(f"train data --out new --epochs 1{'0' * 400}", "--epochs", code=2),
    "more clips than numbers": Case(f"samples --out new --clips 1{'0' * 400}", "--clips", code=2),
    "a student with all the time in the world": Case("assignments check x.ipynb --seconds 1e300", "--seconds", code=2),
    "an unknown flag": Case(EVALUATE + " --fast", "--fast", code=2),
    "nothing to do": Case("train data", "--out", code=2),
    "a word for a count": Case("train data --out new --epochs many", "--epochs", code=2),
    "a seed without bounds": Case(TRAIN + f" --seed {10**30}", "--seed", code=2),
    "an unknown dataset": Case("evaluate data --checkpoint model --dataset cats", "dataset 'cats' is unknown; give one of"),
    "an unknown split": Case(EVALUATE + " --split tset", "split 'tset' is none of"),
    "an unknown precision": Case(PACK + " --dtype int8", "choose float16 or float32"),
    "unknown frames": Case(PACK + " --frames all", "choose mean or keep"),
    "an unknown encoder": Case("extract clip.mp4 --out new --visual cat", "'cat': no such encoder; use one of"),
    "an encoder of the other sense": Case("extract clip.mp4 --out new --visual small_audio", "is no visual encoder"),
    "no encoder at all": Case("extract clip.mp4 --out new --visual none --audio none", "give a visual encoder"),
    "an unknown device": Case("extract clip.mp4 --out new --device warp", "choose another device"),
    "a device of another maker": Case(TRAIN + " --device hpu", "device 'hpu' cannot be used here (No module named"),
    "a device with a long story": Case("extract clip.mp4 --out new --device lazy", "backend); choose another device"),
    "a part with too many digits": Case(f"extract clip.mp4 --out new --shard 0/{'1' * 5000}", "such as 0/4 to 3/4"),
    "grades into a folder": Case("assignments grade data --out x.csv", "is a folder or a device, not a file; choose another name",
                                 lambda place: (place / "x.csv").mkdir()),
    "grades below a file": Case("assignments grade data --out clip.mp4/x.csv", "is a file; give a folder for the results"),
    "a part of nothing": Case("extract clip.mp4 --out new --shard 3/2", "such as 0/4 to 3/4"),
    "results into a file": Case("train data --out clip.mp4", "clip.mp4: is a file; give a folder"),
    "results below a file": Case("extract clip.mp4 --out clip.mp4/x", "is a file; give a folder"),
    "samples of an unknown layout": Case("samples --out new --dataset cats", "dataset 'cats' is unknown"),
    "samples of no source": Case("samples --out new --dataset avqa --source none", "build the sample set of MUSIC-AVQA first"),
    "samples without encoders": Case("samples --out new --clips 15 --encoders none", "no encoder there"),
    "samples without notes": Case("samples --out new --clips 15 --assets none", "none", code=2),
    "samples among another set": Case("samples --out data --dataset msvd_qa --workers 0", "delete that folder or choose",
                                      put("data/made_from.json", '{"scenes": "of others"}')),
    "samples on a note that is none": Case("samples --out data --dataset msvd_qa --workers 0", "cannot be read",
                                           put("data/made_from.json", "{")),
    "predictions that are not there": Case("compare none other", "none: no such file; write it with"),
    "predictions that are no text": Case("compare a a", "a: is no text", put("a", b"\xff\xfe\0")),
    "predictions of another kind": Case("compare a a", "line 1 is no prediction", put("a", "[1]\n")),
    "predictions of other questions": Case("compare a b", "not the same questions", many(
        put("a", lines({})), put("b", lines({}, {"id": 2})))),
    "predictions with an id beyond all numbers": Case("compare a a", "line 1 is no prediction", put("a", lines({"id": 2**63}))),
    "predictions over the annotations": Case(EVALUATE + " --out data/json/avqa-test.json",
                                             "holds no predictions; choose another name"),
    "predictions below a file": Case(EVALUATE + " --out clip.mp4/x.jsonl", "is a file; give a folder for the results"),
    "predictions into a folder": Case(EVALUATE + " --out .", "is a folder or a device, not a file; choose another name"),
    "draws without end": Case(f"compare a b --draws {10**9}", "--draws", code=2),
    "a device that computes nothing": Case(TRAIN + " --device meta", "device 'meta' cannot be used here"),
    "grades over another table": Case("assignments grade data --out x.csv", "x.csv: is there and holds no grades",
                                      put("x.csv", "a,b\n1,2\n")),
    "predictions over what is there": Case(EVALUATE + " --out x.jsonl --shuffle-videos", "leave out --shuffle-videos"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, untrained, clip):
    """A toy dataset, a model trained on it, a model for videos, a clip."""
    place = tmp_path_factory.mktemp("whole")
    make_toy_set(place / "data", 3, 1, 2, 4)
    shutil.copy(clip, place / "clip.mp4")
    shutil.copytree(untrained / "model", place / "asked")
    shutil.copytree(untrained / "encoders", place / "encoders")
    main(["train", str(place / "data"), "--out", str(place / "model"), "--epochs", "1", "--option", "embed_dim=16"])
    return place


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of it all, the working folder."""
    shutil.copytree(whole, tmp_path / "place", ignore=lambda folder, names: {"encoders"} & set(names))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def state(place: Path) -> dict:
    """All folders, and all files with their size and the time of the last change."""
    return {path.relative_to(place): path.is_dir() or (path.stat().st_size, path.stat().st_mtime_ns)
            for path in place.rglob("*")}


REMEDIES = ("give", "choose", "use ", "copy", "extract", "delete", "mend", "pack ", "train ", "build", "rename",
            "ask ", "leave", "download", "write", "put ", "convert", "needs a value like", "name ", "check", "keep",
            "compare", "it has ", "must be", "there are", "run a grid", "save it", "is it the right", "by another encoder?",
            "--help")


def typed(line: str) -> list[str]:
    return [{"ASK": ASK, "EMPTY": ""}.get(word, word) for word in line.split(" ")]


def last_line(err: str) -> str:
    """What a terminal shows in the end; nothing but warnings and a progress bar may stand above."""
    assert err.endswith("\n")
    *above, line = err.replace("\r", "\n").splitlines()
    assert all(not text.strip() or re.search(r"^warning: |\d+%\||\d+it ", text) for text in above), err
    return line


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_sentence(case, place, capfd):
    if case.spoil: case.spoil(place)
    before = state(place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop: main(typed(case.line))
    out, err = capfd.readouterr()
    line = last_line(err)
    assert stop.value.code == case.code and out == ""
    assert line.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err, err
    assert case.message in line, line
    assert len(line) < 1100 and any(word in line for word in REMEDIES), line
    assert state(place) == before


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", ["a text for a video", "features cut off", "a video outside", "weights cut off",
                                  "an unknown option", "an unknown command"])
def test_debug_shows_where_it_came_from(name, place):
    if CASES[name].spoil: CASES[name].spoil(place)
    with pytest.raises(Exception) as caught: main([*typed(CASES[name].line), "--debug"])
    assert not isinstance(caught.value, SystemExit) and len(caught.traceback) > 3


@pytest.mark.parametrize("name, debug", [("half a video", False), ("features cut off", True), ("a width of nothing", False)])
def test_in_a_process_of_its_own(name, debug, place):
    case = CASES[name]
    if case.spoil: case.spoil(place)
    before = state(place)
    command = [sys.executable, "-c", "from mcd_edu.cli import main; main()", *typed(case.line), *["--debug"] * debug]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stdout == "" and state(place) == before
    assert ("Traceback" in done.stderr) == debug and case.message in done.stderr.splitlines()[-1]
