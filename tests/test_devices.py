"""A team of processes computes what one process computes: on the same batches, with the same losses."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import ask, awake, clips

from mcd_edu import devices
from mcd_edu.baselines.knowledge_distillation import GraphVQA, KDConfig
from mcd_edu.data import VideoBatch
from mcd_edu.datasets import load_splits
from mcd_edu.devices import Feed, Team, each, find_device, in_short, shares, take_rows
from mcd_edu.layers import KeysValues
from mcd_edu.model import MCD, MCDConfig
from mcd_edu.training import TrainingConfig, accuracy, load_checkpoint, make_toy_set, train

CPU = torch.device("cpu")
CONFIG = TrainingConfig(epochs=3, num_videos=5, num_questions=3, learning_rate=3e-3)


def tiny(data) -> MCDConfig:
    """Without dropout, whose numbers differ from process to process."""
    sizes = dict(visual_dim=data.visual.shape[-1], audio_dim=data.audio.shape[-1])
    return MCDConfig(len(data.vocabulary), **sizes, embed_dim=16, num_heads=2, num_blocks=1, shared_dim=8, dropout=0.)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """13 videos in batches of 5 rows; more than 3 questions of a video are two rows."""
    path = tmp_path_factory.mktemp("toy")
    make_toy_set(path, num_train=13, num_val=5, num_test=1, per_video=5)
    return path


@pytest.fixture(scope="module")
def data(folder):
    return load_splits(folder)["train"]


def parts_of(batch: VideoBatch) -> dict:
    return {name: part for name, part in vars(batch).items() if part is not None}


# Devices ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", ["gpu", "cuda:99", "", "cpu:x", "cpu cuda", "hpu", "privateuseone", "lazy"])
def test_a_device_that_is_not_there_is_refused(wrong):
    with pytest.raises(ValueError, match="cannot be used here") as error:
        find_device(wrong)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("text, short", [
    ("Could not run 'aten::x'. This is why:\nmore", "Could not run 'aten::x'"), ("\n not here:\n", "not here"),
    ("no file a.b at 3.5", "no file a.b at 3.5"), ("word " * 90, "word " * 29 + "..."), ("", "RuntimeError")])
def test_an_error_in_short_is_its_first_sentence(text, short):
    assert in_short(RuntimeError(text)) == short


def test_auto_is_a_device_that_is_there():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert Team.find() == Team(CPU) and Team(CPU).main


def test_several_processes_without_accelerate_are_told_what_to_install(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"pip install .mcd_edu\[devices\]"):
        Team.find()


@pytest.mark.parametrize("options, named", [
    (["--device", "gpu"], "device 'gpu' cannot be used here"),
    (["--precision", "half"], "precision='half'; choose float32 or bfloat16"),
])
def test_the_command_line_refuses_what_it_cannot_do(folder, tmp_path, capsys, options, named):
    from mcd_edu.cli import main
    with pytest.raises(SystemExit):
        main(["train", str(folder), "--out", str(tmp_path / "run"), *options])
    found = capsys.readouterr().err
    assert found.startswith("error: ") and named in found and found.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_package_is_imported_without_accelerate():
    code = "import sys, mcd_edu.training; assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment())


# Shares ----------------------------------------------------------------------------------------

@given(ids=st.lists(st.integers(0, 30), min_size=1, max_size=40), world=st.integers(1, 9))
def test_shares_cover_every_row_once_and_split_no_video(ids, world):
    ids = torch.tensor(ids)
    found = shares(ids, world)
    assert len(found) == world and sorted(torch.cat(found).tolist()) == list(range(len(ids)))
    videos = [set(ids[part].tolist()) for part in found]
    assert sum(map(len, videos)) == len(set(ids.tolist()))
    assert max(map(len, videos)) - min(map(len, videos)) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_question_is_computed_and_counted_once_an_epoch(data, world):
    """What the processes compute, as far as it is kept, in the order in which losses are asked."""
    feeds, seen = [Feed(data, Team(CPU, rank, world)) for rank in range(world)], Counter()
    for batches in zip(*(feed.batches(5, 3, seed=4) for feed in feeds)):
        found = [feed.share(batch) for feed, batch in zip(feeds, batches)]
        assert len({len(share.own.tokens) for share in found}) == 1
        kept = found[0].kept if world > 1 else torch.arange(len(found[0].own.tokens))
        for name in ("tokens", "answers", "question_mask", "video_ids", "question_ids"):
            rows = torch.cat([getattr(share.own, name) for share in found])[kept]
            assert torch.equal(rows, getattr(found[0].whole, name)), name
        whole = found[0].whole
        seen.update(whole.question_ids[whole.question_mask].tolist())
        for share in found:
            torch.testing.assert_close(share.own.visual, data.visual[share.own.video_ids], rtol=0, atol=0)
    assert seen == Counter(data.question_ids.tolist())


@pytest.mark.parametrize("room", [True, False])
def test_a_feed_gives_the_batches_of_its_dataset(data, room, monkeypatch):
    monkeypatch.setattr(devices, "has_room", lambda *_: room)
    feed, before = Feed(data, Team(CPU)), torch.random.get_rng_state()
    plain = list(data.batches(4, 3, seed=2))
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    fed = [feed.share(batch) for batch in feed.batches(4, 3, seed=2)]
    assert torch.equal(torch.random.get_rng_state(), after), "dropout draws other numbers"
    assert len(fed) == len(plain) and len(feed) == len(data) and feed.resident == room
    for share, batch in zip(fed, plain):
        assert share.kept is None and share.own is share.whole
        assert all(torch.equal(part, parts_of(share.own)[name]) for name, part in parts_of(batch).items())
    assert data.visual.shape[1] == 10, "the dataset itself keeps its features"


def test_rows_are_taken_in_order(data):
    batch = next(iter(data.batches(5)))
    rows = take_rows(batch, torch.tensor([3, 0, 3]))
    assert all(torch.equal(part[1], parts_of(batch)[name][0]) for name, part in parts_of(rows).items())
    assert torch.equal(rows.tokens[0], rows.tokens[2]) and rows.choices is None


# Nests -----------------------------------------------------------------------------------------

def test_each_keeps_the_shape_of_the_nest():
    pair = KeysValues(torch.ones(1), torch.ones(2))
    nest = ([pair, None], (torch.ones(3),), "word")
    assert each(nest, len) == ([KeysValues(1, 2), None], (3,), "word")
    assert each(nest, len, skip=(KeysValues,)) == ([None, None], (3,), "word")


def test_each_takes_along_what_an_answer_carries():
    model = awake(GraphVQA(KDConfig(20, visual_dim=6, audio_dim=3, embed_dim=8, num_heads=2)))
    answer = model.answer(model.encode_video(*clips()), ask())
    doubled = each(answer, lambda x: 2 * x)
    assert type(doubled) is type(answer) and type(doubled.streams) is type(answer.streams)
    torch.testing.assert_close(doubled.streams.fused, 2 * answer.streams.fused)


# Two processes ---------------------------------------------------------------------------------

TOGETHER = """
import json, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_devices import CONFIG, tiny
from mcd_edu.datasets import load_splits
from mcd_edu.devices import Team
from mcd_edu.hub import fingerprint
from mcd_edu.training import CheckpointError, accuracy, load_checkpoint, train

splits, out, team, wrote = load_splits(sys.argv[1]), Path(sys.argv[2]), Team.find(), []
data, val = splits["train"], splits["val"]

def stop(history):                       # what a power cut after the first epoch would leave
    wrote.append(team.rank)
    if len(history) == 1: shutil.copytree(out / "whole", out / "stopped")

history = train(tiny(data), data, val, out / "whole", CONFIG, on_epoch=stop, show_progress=False)
resumed = train(tiny(data), data, val, out / "stopped", CONFIG, show_progress=False)
try: train(tiny(data), data, val, out / ("whole" if team.main else "elsewhere"), CONFIG)
except CheckpointError as error: refused = str(error)
model, *_ = load_checkpoint(out / "whole")
found = dict(world=team.world, history=history, resumed=resumed, wrote=wrote, refused=refused,
             right=accuracy(model, data, num_videos=2), weights=fingerprint(*model.state_dict().values()))
(out / f"{team.rank}.json").write_text(json.dumps(found))
team.leave()
"""


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments, processes=2) -> str:
    """Start processes as a person would; what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    done = subprocess.run([*start, *map(str, arguments)], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """What one process makes of it."""
    splits, path = load_splits(folder), tmp_path_factory.mktemp("alone")
    return train(tiny(splits["train"]), splits["train"], splits["val"], path, CONFIG, show_progress=False), path


@pytest.fixture(scope="module")
def together(folder, tmp_path_factory):
    """What each of two processes has seen, and where they wrote."""
    pytest.importorskip("accelerate")
    out = tmp_path_factory.mktemp("together")
    (out / "work.py").write_text(TOGETHER)
    torchrun(out / "work.py", folder, out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)], out


def test_two_processes_learn_what_one_learns(alone, together):
    """The contrastive losses see the whole batch: they are among those compared."""
    found, out = together
    assert [each_one["world"] for each_one in found] == [2, 2]
    assert found[0]["history"] == found[1]["history"]
    assert len(found[0]["history"]) == len(alone[0]) == CONFIG.epochs
    for ours, theirs in zip(found[0]["history"], alone[0]):
        assert ours.keys() == theirs.keys() >= {"total", "ce", "av", "qv", "qa"}
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    one, two = (MCD.state_dict(load_checkpoint(path)[0]) for path in (alone[1], out / "whole"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=2e-3)


def test_two_processes_go_on_where_they_were(together):
    for found in together[0]:
        assert found["resumed"] == found["history"]


def test_one_process_writes_and_all_read_the_same(together):
    found, out = together
    assert found[0]["wrote"] == [0] * CONFIG.epochs and found[1]["wrote"] == []
    assert found[0]["weights"] == found[1]["weights"]
    names = {"config.json", "model.safetensors", "resume.safetensors"}
    assert {path.name for path in (out / "whole").iterdir()} == names and not (out / "elsewhere").exists()


def test_two_processes_evaluate_without_duplicates(together, folder):
    found, out = together
    expected = accuracy(load_checkpoint(out / "whole")[0], load_splits(folder)["train"], num_videos=2)
    assert expected > 0 and [one["right"] for one in found] == [expected] * 2


def test_processes_that_find_different_bookmarks_are_stopped(together):
    assert all("not all processes find the same bookmark" in one["refused"] for one in together[0])


def test_the_command_line_trains_with_two_processes(folder, tmp_path):
    pytest.importorskip("accelerate")
    options = ["train", folder, "--epochs", "1", "--option", "embed_dim=16", "--option", "dropout=0"]
    cli = "from mcd_edu.cli import main; main()"
    said = torchrun("--no-python", sys.executable, "-c", cli, *options, "--out", tmp_path / "two")
    assert said.count("the checkpoint is in") == 1  # and not one training beside the other
    subprocess.run([sys.executable, "-c", cli, *options, "--out", tmp_path / "one"], check=True, env=environment(),
                   capture_output=True, timeout=120)
    one, two = (json.loads((tmp_path / name / "config.json").read_text())["about"] for name in ("one", "two"))
    for name in ("total", "ce", "av", "qv", "qa"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)
