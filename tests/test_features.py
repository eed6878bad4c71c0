"""Features from files, arrays and stores: read the same, and never half or wrong."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mcd_edu.features import (
    INDEX,
    DataError,
    FeatureFolder,
    Features,
    FeatureStore,
    PackedArray,
    digest,
    open_features,
    pack_array,
    pack_features,
    read_feature,
    stack_features,
    with_features,
)

ROOT = Path(__file__).resolve().parent.parent


def pack(source, out, encoder="toy", **options):
    return pack_features(source, out, encoder, show_progress=False, **options)


def save_folder(folder, arrays):
    """One {video}.npy a video."""
    folder.mkdir(parents=True, exist_ok=True)
    for video, array in arrays.items():
        np.save(folder / f"{video}.npy", array)
    return folder


def save_packed(folder, array, ids):
    """x.npy with x.json beside it."""
    np.save(folder / "x.npy", array)
    (folder / "x.json").write_text(json.dumps(ids))
    return folder / "x.npy"


@pytest.fixture
def arrays():
    """Three videos of 4, 2 and 3 segments, width 5; what each value is, nobody else is."""
    numbers = np.arange(45, dtype=np.float32).reshape(9, 5) / 8
    return {"b": numbers[:4], "a": numbers[4:6], "-c_1": numbers[6:]}


@pytest.fixture
def folder(tmp_path, arrays):
    return save_folder(tmp_path / "npy", arrays)


@pytest.fixture
def store(tmp_path, folder):
    return pack(folder, tmp_path / "store")


# One video -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_feature_is_read_as_float32(tmp_path, dtype):
    array = np.arange(12).reshape(4, 3).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    feature = read_feature(tmp_path / "a.npy", dim=3)
    assert feature.dtype == np.float32 and feature.flags.owndata and feature.flags.writeable
    np.testing.assert_array_equal(feature, array)


def test_feature_in_columns_is_read_right(tmp_path):
    array = np.asfortranarray(np.arange(12.0).reshape(4, 3))
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_feature(tmp_path / "a.npy"), array)


@pytest.mark.parametrize("array, message", [
    (np.ones((4, 3)) * np.nan, "not finite"), (np.array([[1, np.inf]] * 4), "not finite"),
    (np.full((2, 2), 1e300), "not finite"), (np.full((2, 2, 2), np.inf), "not finite"),
    (np.ones((2, 4, 3, 1)), r"shape \(2, 4, 3, 1\)"), (np.ones((0, 3)), "extract it again"),
    (np.ones((3, 0)), "extract it again"), (np.ones((4, 3), int), "int64"),
    (np.ones((4, 3), complex), "complex"), (np.array([["a"]]), "holds <U1"),
    (np.array([[{}]], object), "no whole .npy"), (np.float32(3), "holds float32")])
def test_wrong_array(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message) as caught:
        read_feature(tmp_path / "a.npy")
    assert str(caught.value).startswith(f"{tmp_path / 'a.npy'}: ")
    assert "\n" not in str(caught.value)


def test_wrong_width(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 3)))
    with pytest.raises(DataError, match="width 3, expected 5; .* another encoder"):
        read_feature(tmp_path / "a.npy", dim=5)


@pytest.mark.parametrize("name", ["absent.npy", "folder.npy"])
def test_missing_feature(tmp_path, name):
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(DataError, match="features are missing"):
        read_feature(tmp_path / name)


class Trap:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_opened(tmp_path):
    mark, trap = tmp_path / "mark", tmp_path / "a.npy"
    trap.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(DataError, match="extract it again"):
        read_feature(trap)
    np.save(trap, np.array([[Trap(mark)]], object), allow_pickle=True)
    with pytest.raises(DataError, match="extract it again"):
        read_feature(trap)
    np.savez(tmp_path / "a.npz", a=np.ones((2, 2)))
    (tmp_path / "a.npz").rename(trap)
    with pytest.raises(DataError, match="extract it again"):
        read_feature(trap)
    assert not mark.exists()


@given(st.data())
@settings(max_examples=150)
def test_damaged_files_give_a_data_error_or_an_array(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    np.save(path, np.ones((4, 3), np.float32))
    content = bytearray(path.read_bytes())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1),
                                                 st.integers(0, 255)), max_size=4)):
        content[at] = byte
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            feature = read_feature(path)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert feature.ndim == 2 and np.isfinite(feature).all()


@given(st.binary(max_size=200))
def test_any_bytes_give_a_data_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.npy"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_feature(path)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 4)),
                  elements=st.floats(-1e3, 1e3, width=32)))
def test_what_was_saved_is_read(tmp_path_factory, array):
    path = tmp_path_factory.getbasetemp() / "saved.npy"
    np.save(path, array)
    np.testing.assert_array_equal(read_feature(path), array)


def test_flat_vector_is_one_segment(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0))
    assert read_feature(tmp_path / "a.npy", dim=6).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_frames_against_a_loop(tmp_path):
    array = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    mean = read_feature(tmp_path / "a.npy", dim=5)
    assert mean.shape == (3, 5)
    for t in range(3):
        for d in range(5):
            assert mean[t, d] == pytest.approx(sum(array[t, f, d] for f in range(4)) / 4)
    np.testing.assert_array_equal(read_feature(tmp_path / "a.npy", frames="keep"), array)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
def test_unknown_way_with_frames(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.ones(shape))
    with pytest.raises(ValueError, match="frames='max'; choose mean or keep"):
        read_feature(tmp_path / "a.npy", frames="max")
    with pytest.raises(ValueError, match="frames='max'; choose mean or keep"):
        stack_features(tmp_path, ["a"], "max")


# Many videos -----------------------------------------------------------------------------------

def test_stack_pads_to_the_longest(tmp_path):
    for name, t in ("a", 2), ("b", 4):
        np.save(tmp_path / f"{name}.npy", np.full((t, 3), t, np.float32))
    features, mask = stack_features(tmp_path, ["b", "a"])
    assert features.shape == (2, 4, 3) and mask.sum(-1).tolist() == [4, 2]
    assert (features[1, :2] == 2).all() and not features[~mask].any()


def test_videos_of_different_encoders_are_found(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 3)))
    np.save(tmp_path / "b.npy", np.ones((4, 5)))
    with pytest.raises(DataError, match=r"b\.npy: width 5, expected 3"):
        stack_features(tmp_path, ["a", "b"])


def test_order_is_the_order_asked_for(folder, store, arrays):
    for source in folder, store, str(folder), str(store.path):
        for videos in ["b", "a", "-c_1"], ["-c_1", "b"], ["a", "a"]:
            features, mask = stack_features(source, videos)
            for row, there, video in zip(features, mask, videos, strict=True):
                np.testing.assert_array_equal(row[there], arrays[video])
                assert not row[~there].any()


def test_frames_of_a_stack(tmp_path):
    arrays = {"a": np.random.rand(2, 3, 4), "b": np.random.rand(1, 3, 4)}
    save_folder(tmp_path / "npy", arrays)
    for source in tmp_path / "npy", pack(tmp_path / "npy", tmp_path / "store", dtype="float32"):
        kept, mask = stack_features(source, ["a", "b"], frames="keep")
        mean, _ = stack_features(source, ["a", "b"])
        assert kept.shape == (2, 2, 3, 4) and mask.tolist() == [[True, True], [True, False]]
        torch.testing.assert_close(mean, kept.mean(2))


def test_number_of_frames_matters_only_where_they_are_kept(tmp_path):
    save_folder(tmp_path, {"a": np.ones((2, 3, 4)), "b": np.ones((2, 4))})
    assert stack_features(tmp_path, ["a", "b"])[0].shape == (2, 2, 4)
    with pytest.raises(DataError, match=r"b\.npy: width 4, expected 3×4"):
        stack_features(tmp_path, ["a", "b"], frames="keep")


def test_no_videos(store, folder):
    for source in store, folder:
        with pytest.raises(DataError, match="no videos were asked for"):
            stack_features(source, [])


def test_folder_lists_its_videos(folder):
    (folder / "._a.npy").touch()  # what an archive from a Mac leaves
    (folder / "notes.txt").touch()
    source = FeatureFolder(folder)
    assert list(source) == source.videos == ["-c_1", "a", "b"] and len(source) == 3
    assert "a" in source and "z" not in source


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "features are missing"), (Path.mkdir, "neither .npy files nor"),
    (Path.touch, "features are missing")])
def test_nothing_there(tmp_path, make, message):
    make(tmp_path / "feats")
    with pytest.raises(DataError, match=message):
        open_features(tmp_path / "feats")


def test_note_in_a_folder_names_the_encoder(tmp_path, folder):
    assert open_features(folder, "any").encoder is None
    with pytest.raises(ValueError, match="name the encoder"):
        pack(folder, tmp_path / "store", None)
    (folder / "encoder.json").write_text('{"name": "toy", "dim": 5}')
    assert pack(folder, tmp_path / "store", None).encoder == "toy"
    with pytest.raises(DataError, match="features of toy, not of clip"):
        pack(folder, tmp_path / "other", "clip")
    for note in "{", "[]", '{"name": 3}':
        (folder / "encoder.json").write_text(note)
        with pytest.raises(DataError, match=r"encoder\.json: .*; mend it or delete it"):
            open_features(folder)


# Packed arrays ---------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5), (3, 2, 4, 5)])
@pytest.mark.parametrize("ids", [["x", "y", "z"], {"z": 2, "y": 1, "x": 0}, [7, 8, 9]])
def test_packed_array(tmp_path, shape, ids):
    array = np.random.rand(*shape).astype(np.float32)
    source = open_features(save_packed(tmp_path, array, ids))
    assert isinstance(source, PackedArray)
    for row, video in enumerate("xyz" if 7 not in ids else "789"):
        expected = array[row].reshape(-1 if len(shape) > 2 else 1, *shape[2:] or shape[1:])
        np.testing.assert_array_equal(source[video], expected)
        assert source.shape(video) == expected.shape and video in source
    with pytest.raises(DataError, match="video w: features are missing"):
        source["w"]


@pytest.mark.parametrize("ids, message", [
    (["a"], "1 different ids for 2 rows"), (["a", "a"], "each once"), ({}, "has no rows"),
    ({"a": 2}, "rows outside 0 … 1"), ({"a": -1}, "rows outside"), ({"a": True}, "rows outside"),
    ({"a": 1.0}, "rows outside"), (["a", "../b"], "not a plain file name"),
    (["a", None], "not a plain"), (["a", ["b"]], "not a plain"), ({"a.b": 0}, "not a plain"),
    ("ab", "expected a list"), (None, "expected a list")])
def test_ids_that_do_not_fit(tmp_path, ids, message):
    path = save_packed(tmp_path, np.ones((2, 3)), ids)
    with pytest.raises(DataError, match=message) as caught:
        open_features(path)
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}: ")


def test_packed_array_without_ids_or_rows(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3)))
    with pytest.raises(DataError, match=r"x\.json: is missing; put the ids beside"):
        open_features(tmp_path / "x.npy")
    for array, message in [(np.ones(()), "no videos"), (np.ones((0, 2)), "no videos"),
                           (np.ones(2), r"shape \(\)"), (np.ones((1, 1, 1, 1, 1)), "shape"),
                           (np.ones((2, 3), int), "int64")]:
        with pytest.raises(DataError, match=message):
            open_features(save_packed(tmp_path, array, ["a", "b"]))


def test_only_the_spoilt_row_is_refused(tmp_path):
    path = save_packed(tmp_path, np.array([[1, 2], [np.nan, 3]]), ["a", "b"])
    assert stack_features(path, ["a"])[0].tolist() == [[[1, 2]]]
    with pytest.raises(DataError, match="video b: has values that are not finite"):
        stack_features(path, ["a", "b"])


def test_array_becomes_a_store(tmp_path):
    array = np.random.rand(3, 2, 4, 5).astype(np.float32)
    path = save_packed(tmp_path, array, ["x", "y", "z"])
    store = pack_array(path, tmp_path / "x.json", tmp_path / "store", "toy", dtype="float32",
                       show_progress=False, videos=["z", "x"])
    assert store.videos == ["z", "x"] and store.segment == (4, 5)
    np.testing.assert_array_equal(store["x"], array[0])
    mean = pack(path, tmp_path / "mean", frames="mean", dtype="float32")
    assert mean.segment == (5,)
    np.testing.assert_allclose(mean["y"], array[1].mean(1), rtol=1e-6)


def test_array_is_never_read_whole(tmp_path):
    """A sparse file of 8 GB, of which one video is read; the machine's memory need not hold it."""
    shape = 1_000_000, 8, 256
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape).flush()
    (tmp_path / "x.json").write_text(json.dumps({"a": 0, "b": 999_999}))
    store = pack(tmp_path / "x.npy", tmp_path / "store")
    assert store.shape("b") == (8, 256) and store.file.stat().st_size == 2 * 8 * 256 * 2


# Stores ----------------------------------------------------------------------------------------

@given(st.data())
@settings(max_examples=60)
def test_what_was_packed_is_read(tmp_path_factory, data):
    segment = data.draw(st.sampled_from([(1,), (3,), (2, 3)]))
    videos = data.draw(st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True), min_size=1,
                                max_size=4, unique_by=str.lower))
    dtype = data.draw(st.sampled_from(["float16", "float32"]))
    numbers = st.floats(-6e4, 6e4, width=16 if dtype == "float16" else 32)
    arrays = {video: data.draw(hnp.arrays(np.float32, (data.draw(st.integers(1, 4)), *segment),
                                          elements=numbers)) for video in videos}
    folder = tmp_path_factory.mktemp("round")
    store = pack(save_folder(folder / "npy", arrays), folder / "store", dtype=dtype, videos=videos)
    assert store.videos == videos == list(FeatureStore(folder / "store"))
    for video, array in arrays.items():
        assert store[video].dtype == np.float32 and store.shape(video) == array.shape
        np.testing.assert_array_equal(store[video], array)
    store.verify()
    again = pack(store, folder / "again", dtype=dtype)
    assert digest(again) == digest(store) and again.sha256 == store.sha256


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-65504, 65504, width=32)))
@settings(max_examples=50)
def test_float16_is_near(tmp_path_factory, array):
    folder = tmp_path_factory.mktemp("near")
    store = pack(save_folder(folder / "npy", {"a": array}), folder / "store")
    np.testing.assert_allclose(store["a"], array, rtol=2 ** -11, atol=2 ** -25)


@pytest.mark.parametrize("value, fits", [(65504, True), (-65504, True), (65519, True),
                                         (65520, False), (-1e6, False)])
def test_float16_overflow_names_the_video(tmp_path, value, fits):
    save_folder(tmp_path / "npy", {"a": np.ones((2, 3)), "b": np.full((2, 3), float(value))})
    if fits:
        assert abs(pack(tmp_path / "npy", tmp_path / "store")["b"]).max() == 65504
    else:
        with pytest.raises(DataError, match=r"b\.npy: has values up to .* dtype='float32'"):
            pack(tmp_path / "npy", tmp_path / "store")
        assert not (tmp_path / "store").exists()
    exact = pack(tmp_path / "npy", tmp_path / "exact", dtype="float32")
    assert exact["b"][0, 0] == value


def test_files_of_a_store(store):
    index = json.loads((store.path / INDEX).read_text())
    assert {name: index[name] for name in ("version", "encoder", "dtype", "segment", "videos")} == {
        "version": 1, "encoder": "toy", "dtype": "float16", "segment": [5],
        "videos": {"-c_1": 3, "a": 2, "b": 4}}
    content = store.file.read_bytes()
    assert len(content) == 9 * 5 * 2 and index["sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(file.name for file in store.path.iterdir()) == sorted([INDEX, store.file.name])


def test_missing_video(store, folder):
    assert "z" not in store and "a" in store and len(store) == 3
    for use in store.__getitem__, store.shape, store.check, lambda v: store.stack(["a", v]):
        with pytest.raises(DataError, match="store: video z: features are missing; extract"):
            use("z")
    with pytest.raises(DataError, match=r"z\.npy: features are missing"):
        stack_features(folder, ["a", "z"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whole_store_in_memory(store, arrays, dtype):
    features, mask = store.tensors(dtype=dtype)
    assert features.shape == (3, 4, 5) and features.dtype == dtype
    for i, video in enumerate(store):
        np.testing.assert_array_equal(features[i][mask[i]].float(), arrays[video])
    features, mask = store.tensors("meta")
    assert features.device.type == mask.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_whole_store_on_a_gpu(store):
    for here, there in zip(store.tensors(), store.tensors("cuda"), strict=True):
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=0)


def test_what_is_read_can_be_written_to(store):
    store["a"][:] = 7
    store.stack(["a"])[0].zero_()
    store.verify()
    assert store["a"].any()


def test_features_of_another_encoder(store):
    assert open_features(store.path, "toy").encoder == open_features(store.path).encoder == "toy"
    for source in store, store.path:
        with pytest.raises(DataError, match="store: holds features of toy, not of clip"):
            open_features(source, "clip")


def test_a_store_is_packed_anew(tmp_path, folder, store):
    old = store.file
    exact = pack(folder, store.path, dtype="float32")
    assert not old.exists() and exact.file != old
    assert sorted(file.name for file in store.path.iterdir()) == sorted([INDEX, exact.file.name])
    np.testing.assert_array_equal(store["b"], exact["b"])  # who had it open keeps it
    itself = pack(exact.path, exact.path)
    assert itself.sha256 == store.sha256


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders there")
def test_one_conversion_at_a_time(tmp_path, folder, store):
    """A second one in the same folder is refused, and spoils neither the first nor what stood there."""
    tried = []

    class Watched(FeatureFolder):
        def __getitem__(self, video):
            with pytest.raises(OSError, match="store: another run works there; wait until it has ended"):
                pack(folder, store.path, "another")
            tried.append(video)
            return super().__getitem__(video)
    again = pack(Watched(folder), store.path, "second", dtype="float32")
    assert tried == again.videos and again.encoder == "second" and len(list(store.path.iterdir())) == 2
    again.verify()
    pack(folder, store.path, "third").verify()  # free again


def test_other_files_are_left_alone(tmp_path, folder):
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(DataError, match=r"holds .*\.npy; give the store a folder of its own"):
        pack(folder, folder)
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("options, error", [
    (dict(dtype="int8"), "dtype='int8'; choose float16 or float32"),
    (dict(frames="max"), "frames='max'"), (dict(videos=["a", "a"]), "asked for twice"),
    (dict(videos=[]), "no features to pack"), (dict(videos=["z"]), "features are missing"),
    (dict(encoder=""), "name the encoder")])
def test_wrong_orders(tmp_path, folder, options, error):
    with pytest.raises(ValueError, match=error):
        pack(folder, tmp_path / "store", **options)
    with pytest.raises(DataError):
        open_features(tmp_path / "store")


BAD = {"nan": (np.full((2, 5), np.nan), "not finite"), "wide": (np.ones((2, 6)), r"\(6,\), expected"),
       "a.b": (np.ones((2, 5)), "not a plain file name"), "odd": (np.ones((2, 5), int), "int64"),
       "large": (np.full((2, 5), 1e5), "float16 ends at 65504")}


@pytest.mark.parametrize("video", BAD)
def test_bad_video_stops_the_packing_or_is_skipped(tmp_path, folder, video):
    array, message = BAD[video]
    save_folder(folder, {video: array})
    with pytest.raises(DataError, match=message) as caught:
        pack(folder, tmp_path / "store")
    assert video in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError):
        open_features(tmp_path / "store")
    with pytest.warns(UserWarning, match=f"skipped 1 of 4 videos; .*{message}"):
        store = pack(folder, tmp_path / "store", skip_bad=True)
    assert sorted(store) == ["-c_1", "a", "b"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_nobody_waits_for_a_pipe_in_place_of_ids(tmp_path):
    path = save_packed(tmp_path, np.ones((2, 3)), ["a", "b"])
    path.with_suffix(".json").unlink()
    os.mkfifo(path.with_suffix(".json"))
    with pytest.raises(DataError, match=r"\.json: is no JSON \(not a file\)"): pack(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("out", ["link", "."])
def test_an_empty_folder_behind_a_link_or_the_one_we_are_in_takes_a_store(tmp_path, folder, monkeypatch, out):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".data.part").touch()        # of a killed run
    (tmp_path / "link").symlink_to("empty", target_is_directory=True)
    monkeypatch.chdir(tmp_path / ("empty" if out == "." else ""))
    pack(folder, out).verify()
    assert (tmp_path / "link").is_symlink() and len(list((tmp_path / "empty").iterdir())) == 2


def test_nothing_but_bad_videos(tmp_path):
    save_folder(tmp_path / "npy", {"a": np.full((1, 2), np.nan)})
    with pytest.raises(DataError, match="no features to pack; .*not finite"):
        pack(tmp_path / "npy", tmp_path / "store", skip_bad=True)


# Damage ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"0", lambda c: b""])
def test_data_of_another_size(store, change):
    store.file.write_bytes(change(store.file.read_bytes()))
    with pytest.raises(DataError, match="does not fit its index .*; copy the store again"):
        open_features(store.path)


def test_data_that_is_gone(store):
    store.file.unlink()
    with pytest.raises(DataError, match="does not fit its index"):
        open_features(store.path)


def test_one_bit_is_found(store):
    content = bytearray(store.file.read_bytes())
    content[17] ^= 1
    store.file.write_bytes(content)
    with pytest.raises(DataError, match="does not fit its index .*; copy the store again"):
        open_features(store.path).verify()


@pytest.mark.parametrize("change, message", [
    (dict(version=2), "is of version 2, expected 1; pack"), (dict(version=None), "version None"),
    (dict(format="x"), "no index of a feature store"), (dict(dtype="float64"), "damaged"),
    (dict(dtype=["float16"]), "damaged"), (dict(encoder=3), "damaged"),
    (dict(segment=[]), "damaged"), (dict(segment=[5, 1, 1]), "damaged"), (dict(segment=5), "damaged"),
    (dict(segment=[True]), "damaged"), (dict(segment=[10**30]), "does not fit"),
    (dict(videos={}), "damaged"), (dict(videos=["a"]), "damaged"), (dict(videos={"a": 0}), "damaged"),
    (dict(videos={"a": 9.0}), "damaged"), (dict(videos={"a": 8}), "does not fit"),
    (dict(videos={"../a": 9}), "not a plain file name"), (dict(sha256="../" + "0" * 61), "damaged"),
    (dict(sha256=None), "damaged"), (dict(sha256=10**63), "damaged"),
    (dict(sha256="0" * 64), "does not fit")])
def test_changed_index(store, change, message):
    index = json.loads((store.path / INDEX).read_text())
    (store.path / INDEX).write_text(json.dumps(index | change))
    with pytest.raises(DataError, match=message) as caught:
        open_features(store.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_index_that_is_none(store, content):
    (store.path / INDEX).write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json: "):
        open_features(store.path)


@given(st.data())
@settings(max_examples=150)
def test_damaged_index_gives_a_data_error_or_the_features(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged_store"
    if not folder.exists():
        pack(save_folder(tmp_path_factory.mktemp("npy"), {"a": np.ones((2, 3))}), folder)
    path = folder / INDEX
    content = whole = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    content = content[:at] + data.draw(st.binary(max_size=2)) + content[data.draw(
        st.integers(at, len(content))):]
    try:
        path.write_bytes(content)
        assert all(store[video].any() for store in [open_features(folder)] for video in store)
    except DataError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)


STAGES = "writing", "data written", "data in place", "index written"
KILLED = """
import os, signal, sys
from pathlib import Path
import mcd_edu.features as features

replace = os.replace

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

class Dying(features.FeatureFolder):
    def __getitem__(self, video): return die() if video == self.videos[-1] else super().__getitem__(video)

def pack(source, out, stage):
    if stage == "writing": source = Dying(source)
    elif stage == "data written": os.replace = die
    elif stage == "data in place": features.write_index = die
    else: os.replace = lambda old, new: die() if Path(new).name == "index.json" else replace(old, new)
    features.pack_features(source, out, "new", dtype="float32", show_progress=False)

source, *outs = sys.argv[1:]
for out in outs:
    if not (child := os.fork()): pack(source, out, Path(out).parent.name)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, out
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Conversions killed at each stage, where there was no store and where there was one."""
    base = tmp_path_factory.mktemp("killed")
    folder = save_folder(base / "npy", {"a": np.ones((2, 5))})
    outs = [base / stage / name for stage in STAGES for name in ("fresh", "old")]
    for out in outs[1::2]:
        pack(folder, out)
    save_folder(folder, {f"v{i}": np.random.rand(200, 5) for i in range(5)})  # past the buffer
    subprocess.run([sys.executable, "-c", KILLED, folder, *outs], cwd=ROOT, check=True)
    return base


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("stage", STAGES)
def test_killed_conversion_leaves_no_half_store(killed, stage):
    fresh, old = killed / stage / "fresh", killed / stage / "old"
    assert any(file.stat().st_size for file in fresh.iterdir())  # it was in the middle
    assert len(list(old.iterdir())) > 2
    with pytest.raises(DataError, match="holds neither .npy files nor a finished store"):
        open_features(fresh)
    survivor = open_features(old)
    survivor.verify()
    assert survivor.encoder == "toy" and survivor.videos == ["a"]
    for out in fresh, old:
        store = pack(killed / "npy", out, "new", dtype="float32")
        store.verify()
        assert len(store) == 6 and len(list(out.iterdir())) == 2


# Digests and questions -------------------------------------------------------------------------

def test_digest_is_of_the_content(tmp_path, folder, store, arrays):
    other = save_folder(tmp_path / "other", arrays)
    assert digest(folder) == digest(other) == digest(str(folder)) and len(digest(folder)) == 64
    np.save(other / "a.npy", arrays["a"] + 1)
    renamed = save_folder(tmp_path / "renamed", {f"{video}x": array for video, array in arrays.items()})
    path = save_packed(tmp_path, np.ones((2, 3)), ["a", "b"])
    packed = digest(path)
    save_packed(tmp_path, np.ones((2, 3)), ["b", "a"])
    different = [digest(source) for source in (folder, other, renamed, store, path)]
    different += [packed, digest(pack(other, tmp_path / "2")), digest(pack(folder, tmp_path / "3", "b"))]
    assert len(set(different)) == len(different)
    assert digest(pack(folder, tmp_path / "4")) == digest(store)


def test_questions_without_features_are_left_out(tmp_path, folder, store):
    questions = [SimpleNamespace(video_id=video) for video in ("a", "z", "b", "a", "z")]
    for source in folder, str(folder), store, store.path:
        with pytest.warns(UserWarning, match=r"skipped 2 of 5 questions on 1 videos; .*z"):
            assert with_features(questions, folder, source) == [questions[i] for i in (0, 2, 3)]
    (folder / "a.npy").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 4 of 5"):
        assert with_features(questions, store, folder) == [questions[2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_features(questions[:1], store) == questions[:1]
    with pytest.raises(DataError, match="features are missing"):
        with_features(questions, tmp_path / "nowhere")


def test_every_kind_has_every_door(tmp_path, folder, store):
    packed = open_features(save_packed(tmp_path, np.ones((2, 3)), ["a", "b"]))
    for source in FeatureFolder(folder), store, packed:
        assert isinstance(source, Features) and open_features(source) is source
        assert source[source.videos[0]].shape == source.shape(source.videos[0])
        source.check("a")
        assert source.files() and "a" in source.place("a")
