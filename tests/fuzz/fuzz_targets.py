"""What anybody may hand in, as bytes: each target takes any bytes and must come back without a surprise.

A target returns, or raises AssertionError where a promise is broken; errors that the readers announce
(`DataError`, `MediaError`, ValueError of a question without words) are no surprise, any other is.
"""

import json
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import av
import numpy as np

from mcd_edu.cli import printable
from mcd_edu.data import DataError, Vocabulary, read_annotations, text_objects, tokenize
from mcd_edu.datasets import DATASETS, Naming, first_record, read_mapping
from mcd_edu.features import INDEX, PackedArray, open_features, pack_features, read_feature
from mcd_edu.inference import MAX_OBJECTS, prepare
from mcd_edu.media import FRAME_SIZE, SAMPLE_RATE, MediaError, read_segments
from mcd_edu.predictions import read_predictions

LONGEST = 30_000             # bytes of an input


def attempt(action: Callable, *arguments, expected=DataError):
    """The result, or None after an announced error, which must be one line that names a file."""
    try: return action(*arguments)
    except expected as error:
        assert "\n" not in str(error) and "/" in str(error), error
        return None


# ---- the four readers

def annotations(data: bytes, folder: Path) -> None:
    """Annotation files of all datasets, the names of videos, files of predictions."""
    path = folder / "train_qa.json"
    path.write_bytes(data)
    attempt(first_record, path)
    attempt(read_predictions, path)
    for video, name in (attempt(read_mapping, path) or {}).items():
        assert video.startswith("vid") and name
    for source in DATASETS.values():
        parse = partial(source.parse, naming=Naming())
        for skip_bad in True, False:
            questions = attempt(read_annotations, path, skip_bad, parse) or []
            Vocabulary.build(questions)
            if questions: schema = source.schema("any", questions)
            for question in questions:
                assert (folder / f"{question.video_id}.npy").resolve().parent == folder.resolve()
                assert len(question.video_id) <= 150
                assert 0 <= question.question_id < 2 ** 63
                assert schema.number(question) < max(len(schema.answers), schema.num_choices)
                json.dumps([question.text, question.answer, text_objects(question)],
                           ensure_ascii=False).encode()


@cache
def small_store(folder: Path) -> dict:
    """A store of two videos, and its index."""
    (folder / "plain").mkdir()
    for name, t in (("a", 2), ("b", 3)):
        np.save(folder / "plain" / f"{name}.npy", np.arange(4. * t).reshape(t, 4))
    pack_features(folder / "plain", folder / "store", "toy", show_progress=False)
    return json.loads((folder / "store" / INDEX).read_text())


def features(data: bytes, folder: Path) -> None:
    """An .npy file alone or packed; the ids beside an array; the index of a store; a note."""
    small_store(folder)
    array, ids = folder / "x.npy", folder / "x.json"
    array.write_bytes(data)
    for dim in None, 4:
        found = attempt(read_feature, array, dim)
        assert found is None or (found.ndim == 2 and np.isfinite(found).all())
    for path, as_ids, content in ((array, ids, b'["a", "b"]'), (folder / "plain" / "a.npy", ids, data)):
        as_ids.write_bytes(content)
        check_all(attempt(PackedArray, path, as_ids))
    (folder / "store" / INDEX).write_bytes(data)
    check_all(attempt(open_features, folder / "store"))
    (folder / "plain" / "encoder.json").write_bytes(data)
    check_all(attempt(open_features, folder / "plain"))
    (folder / "plain" / "encoder.json").unlink()


def check_all(source) -> None:
    """Every video gives finite numbers of the announced shape, or an announced error."""
    for video in list(source or ())[:3]:
        found = attempt(source.__getitem__, video)
        assert found is None or (found.shape == source.shape(video) and np.isfinite(found).all())


def media(data: bytes, folder: Path) -> None:
    """A media file."""
    path = folder / "video"
    path.write_bytes(data)
    read = attempt(read_segments, path, 4, len(data) % 2 == 0, expected=MediaError)
    if read is None: return
    t = len(read)
    assert 1 <= t <= 4 and read.frames.shape == (t, 4, FRAME_SIZE, FRAME_SIZE, 3)
    assert read.waveform.shape == (t, SAMPLE_RATE) and np.isfinite(read.waveform).all()


VOCABULARY = Vocabulary(["is", "there", "a", "violin", "acoustic_guitar"])


def questions(data: bytes, folder: Path) -> None:
    """What somebody types, down to half characters."""
    text = data.decode("utf-8", "surrogateescape" if len(data) % 2 else "surrogatepass" if
                       data.isascii() else "replace")
    line = printable(text)
    assert len(line) <= 1004 and line.isprintable()
    try: read = prepare(text, VOCABULARY, {"violin"}, max_tokens=12)
    except ValueError as error:
        assert not tokenize(text) and "has no words" in str(error) and "\n" not in str(error)
        return
    assert len(read.tokens) == 12 and len(read.objects) == MAX_OBJECTS
    assert all(0 <= number < len(VOCABULARY) for number in read.tokens + read.objects)
    assert VOCABULARY.encode(tokenize(text), 3)[0] > 0


# ---- what to begin with

def write_clip(path: Path, picture: str, sound: str, form: str = "") -> bytes:
    """One second of picture and sound in some container; either code may be missing."""
    with av.open(str(path), "w", format=form or None) as container:
        video = container.add_stream(picture, rate=8) if picture else None
        audio = container.add_stream(sound, rate=16_000, layout="mono") if sound else None
        if video: video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for i in range(8 if video else 0):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * i, np.uint8), "rgb24")
            container.mux(video.encode(frame))
        if video: container.mux(video.encode())
        if audio:
            wave = 0.3 * np.sin(np.arange(16_000, dtype=np.float32))[None]
            samples = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
            samples.sample_rate, samples.pts = 16_000, 0
            resampler = av.AudioResampler(audio.format, "mono", 16_000, audio.frame_size or 1024)
            for piece in [*resampler.resample(samples), *resampler.resample(None)]:
                container.mux(audio.encode(piece))
            container.mux(audio.encode())
    return path.read_bytes()


CLIPS = {"mp4": ("libx264", "aac"), "mkv": ("libx264", "aac"), "avi": ("mpeg4", "mp3"),
         "ts": ("mpeg2video", "mp2"), "flv": ("flv1", "aac"), "mov": ("mpeg4", "pcm_s16le"),
         "wav": ("", "pcm_f32le"), "flac": ("", "flac"), "ogg": ("", "flac"), "mp3": ("", "mp3")}

MUSIC = {"video_id": "00000012", "question_id": 7, "type": '["Audio", "Counting"]',
         "question_content": "How many <Object> sound?", "templ_values": '["violin"]', "anser": "two"}
CHOICE = {"id": 3, "video_name": "a_1", "video_id": 4, "question_text": "Where is it?",
          "question_relation": "View", "question_type": "Where", "answer": 0,
          "multi_choice": ["left", "right", "up", "down"]}
OPEN = {"id": 5, "video_id": 6, "question": "who sings?", "answer": "man"}
LINE = {"dataset": "msvd_qa", "id": 1, "video": "vid1", "type": ["", "who"], "gold": "man",
        "prediction": "dog", "probabilities": {"dog": .9}, "looks_at": [0], "listens_to": [1]}


def seeds(name: str, folder: Path) -> list[bytes]:
    """Inputs that a reader takes: what mutations begin with."""
    if name == "annotations":
        return [json.dumps(records).encode() for records in
                ([MUSIC], [CHOICE], [OPEN], [MUSIC | {"question_content": "Is the violin loud?"}],
                 [OPEN, OPEN | {"id": 8}])] + [b"abc_1_2 vid1\nvid2 x-y_3\n", json.dumps(LINE).encode()]
    if name == "features":
        index, found = small_store(folder), []
        for array in (np.ones((2, 4), "f4"), np.ones((2, 3, 4), "f8"), np.ones(4, "f2"),
                      np.asfortranarray(np.ones((3, 4)))):
            np.save(folder / "seed.npy", array)
            found.append((folder / "seed.npy").read_bytes())
        return found + [json.dumps(x).encode() for x in (index, ["a", "b"], {"a": 1, "b": 0}, {"name": "toy"})]
    if name == "media":
        return [write_clip(folder / f"seed.{end}", *codes) for end, codes in CLIPS.items()]
    return ["Is there a violin?".encode(), "acoustic guitar 提琴？".encode(), "É́ 'x' <b>".encode()]


class Target(NamedTuple):
    """A reader, and what may be in its inputs."""
    check: Callable[[bytes, Path], None]
    words: tuple[bytes, ...]


TARGETS = {
    "annotations": Target(annotations, (b"null", b"true", b"NaN", b"1e999", b"-1", b"\\ud800", b"../", b"[[[[",
                                        b'"type"', b'"anser"', b'""', b"9" * 30, *(k.encode() for k in MUSIC | CHOICE | OPEN))),
    "features": Target(features, (b"null", b"true", b"'O'", b"<f4", b">f8", b"(0, 4)", b"(-1, 4)", b"99999999999",
                                  b"\x93NUMPY", b"\xff" * 8, b"[[[[", b'"../x"')),
    "media": Target(media, (b"moov", b"trak", b"mdat", b"ftyp", b"avc1", b"RIFF", b"\xff" * 4, b"\x7f\xff\xff\xff",
                            b"\x00" * 8, b"#EXTM3U", b"OggS", b"fLaC", b"stsz", b"tkhd", b"mvhd")),
    "questions": Target(questions, ("\u202e".encode(), b"\x00", b"\x1b[2J", "İ".encode(), "ß".encode(), b"_", b"$",
                                    b"</script>")),
}

def run(name: str, data: bytes, folder: Path) -> None:
    """Hand some bytes to a reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)     # about records that were left out
        TARGETS[name].check(data[:LONGEST], folder)


def mutate(data: bytes, words: tuple[bytes, ...], draw: Random) -> bytes:
    """Some bytes, spoilt in a few places: changed, cut, doubled, or a word put in."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice((1, 1, 2, 4, 64)))
        piece = draw.choice((b"", draw.randbytes(end - at), content[at:end] * 2, draw.choice(words)))
        content[at:end] = piece
    return bytes(content)


