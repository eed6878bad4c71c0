"""Killed at any moment, full disks, folders that may only be read: what was there stays whole, and the work goes on.

    KILLS=20 pytest tests/test_kill.py       # each kind of work killed 20 times; 2 where KILLS is not set

A server process has imported everything, so that a kill hits the work and not the imports. The moments are
random, but the same in every run of the tests as far as the machine allows.
"""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from safetensors.torch import load_file

from mcd_edu.cli import main
from mcd_edu.features import open_features, read_feature
from mcd_edu.media import read_segments
from mcd_edu.samples.action_set import ActionSetConfig, build_action_set, read_silent_video
from mcd_edu.training import load_checkpoint, make_toy_set

KILLS = int(os.environ.get("KILLS", 2))
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and mounts as Linux has them")

if sys.platform == "linux":
    SERVER = multiprocessing.get_context("forkserver")
    SERVER.set_forkserver_preload(["mcd_edu.experiments", "mcd_edu.extraction", "test_kill"])


def work(job: list[str], errors: Path, bytes_a_file: int | None) -> None:
    """A command line in a process of its own, perhaps one whose files cannot grow beyond a size."""
    import torch
    torch.set_num_threads(1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if bytes_a_file: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
    if job[0] != "actions": return main(job)
    build_action_set(job[1], "msvd_qa", ActionSetConfig(num_train=8, num_val=2, num_test=4, num_videos=4), workers=0)


def begin(job, errors=os.devnull, bytes_a_file=None):
    process = SERVER.Process(target=work, args=(job, errors, bytes_a_file))
    process.start()
    return process


def finish(job, errors=os.devnull, bytes_a_file=None) -> int:
    """Do a job to its end: the exit code."""
    process = begin(job, errors, bytes_a_file)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


# ---- what is in a folder, by the readers that everybody uses

def whole_training(out: Path) -> None:
    if (out / "config.json").is_file() and (out / "model.safetensors").is_file(): load_checkpoint(out)
    for path in out.glob("[!.]*.safetensors"): load_file(path)


def whole_files(out: Path) -> None:
    """Features, videos and annotations, whichever are there."""
    for path in out.rglob("[!.]*"):
        if path.suffix == ".npy": read_feature(path)
        if path.suffix == ".json": json.loads(path.read_text())
        if path.suffix == ".mp4": (read_silent_video if path.parent.name == "video" else read_segments)(path)


def whole_store(out: Path) -> None:
    if (out / "index.json").is_file(): open_features(out).verify()


@pytest.fixture(scope="module")
def base(tmp_path_factory, clip):
    """A toy dataset, some clips, features to pack; and a server that is awake."""
    place = tmp_path_factory.mktemp("base")
    make_toy_set(place / "data", 4, 2, 2, 4)
    (place / "clips").mkdir()
    for i in range(6): shutil.copy(clip, place / "clips" / f"clip{i}.mp4")
    (place / "npy").mkdir()
    for i in range(400): np.save(place / "npy" / f"v{i}.npy", np.full((20, 1024), i, np.float32))
    assert finish(["--version"]) == 0
    return place


TRAIN = "train {base}/data --out {out} --epochs 5 --option embed_dim=16 --device cpu"
WORK = {  # kind → what is done, how to see that what it left is whole, bytes too few for a file
    "training": (TRAIN, whole_training, 20_000),
    "extraction": ("extract {base}/clips --out {out} --batch 1", whole_files, 300),
    "conversion": ("pack {base}/npy --out {out} --encoder toy", whole_store, 1_000_000),
    "samples of music_avqa": ("samples --out {out} --clips 15 --videos 2 --workers 0", whole_files, 20_000),
    "samples of msvd_qa": ("actions {out}", whole_files, 20_000),
}


@pytest.mark.parametrize("kind", WORK)
def test_killed_at_random_moments(kind, base, tmp_path):
    line, check, _ = WORK[kind]
    def words(out): return line.format(base=base, out=out).split()
    start = time.monotonic()
    assert finish(words(tmp_path / "reference")) == 0
    needed = time.monotonic() - start
    reference, draw, out, kills, ends = contents(tmp_path / "reference"), Random(kind), tmp_path / "out", 0, 0
    assert reference
    for _ in range(4 * KILLS):
        process = begin(words(out))
        process.join(draw.uniform(0, 0.7 * needed))
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode:
            assert process.exitcode == -9
            kills += 1
            if out.exists(): check(out)
        if process.exitcode == 0 or kills == KILLS:
            assert finish(words(out)) == 0
            assert contents(out) == reference              # to the last bit, and no draft is left
            shutil.rmtree(out)
            ends += 1
        if kills == KILLS: break
    assert kills == KILLS and ends >= 1


def alive(process: int) -> bool:
    """Whether a process is there and not yet buried."""
    try: return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


def test_workers_leave_with_the_one_they_work_for(tmp_path):
    """Whoever starts anew is not disturbed by workers of the run before."""
    line = [sys.executable, "-c", "from mcd_edu.cli import main; main()", "samples", "--out", tmp_path / "out",
            "--clips", "40", "--videos", "40", "--workers", "2"]
    started = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while len(list(tmp_path.rglob("*.npy"))) < 2 and time.monotonic() < until: time.sleep(0.05)
    workers = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert started.poll() is None and len(workers) >= 2
    started.kill()
    started.wait()
    until = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < until: time.sleep(0.05)
    assert not any(map(alive, workers))
    whole_files(tmp_path / "out")


# ---- disks that are full, folders that may only be read

@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"mounts need root ({done.stderr.strip()})")
    try: yield place
    finally: subprocess.run(["umount", "--lazy", place], check=True)


def refused(job, errors: Path, message: str, *limits) -> None:
    """The job ends with one line that says what, where, and what to do."""
    assert finish(job, errors, *limits) == 1
    line = errors.read_text().replace("\r", "\n").splitlines()[-1]
    assert message in line and "Traceback" not in errors.read_text(), errors.read_text()
    assert line.startswith("error: ") and ("make room there" in line or "give another" in line), line


COMMANDS = [kind for kind in WORK if not WORK[kind][0].startswith("actions")]


@pytest.mark.parametrize("kind", COMMANDS if KILLS > 3 else COMMANDS[:3])
def test_a_full_disk(kind, base, disk, tmp_path):
    """What was there stays; with room again the work is done as if nothing had been."""
    line, check, _ = WORK[kind]
    def words(out): return line.format(base=base, out=out).split()
    assert finish(words(tmp_path / "reference")) == 0
    earlier = begin(words(disk / "out"))                 # a run that somebody stopped
    while earlier.is_alive() and not (disk / "out").exists(): time.sleep(0.01)
    earlier.kill()
    earlier.join()
    (disk / "results").write_bytes(b"of another week")
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError as error: assert error.errno == 28
    before = {name: content for name, content in contents(disk).items() if not name.endswith(".part")}
    if (before.keys() - {"filler", "results"}) >= {f"out/{name}" for name in contents(tmp_path / "reference")}:
        pytest.skip("the earlier run was quicker than the kill")
    refused(words(disk / "out"), tmp_path / "errors", "No space left on device")
    after = {name: content for name, content in contents(disk).items() if not name.endswith(".part")}
    assert before.items() <= after.items()
    check(disk / "out")
    filler.unlink()
    assert finish(words(disk / "out")) == 0
    assert contents(disk / "out") == contents(tmp_path / "reference")


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_file_that_cannot_grow(kind, base, tmp_path):
    """As on a disk with a quota; this needs no mount."""
    line, check, most = WORK[kind]
    job = line.format(base=base, out=tmp_path / "out").split()
    refused(job, tmp_path / "errors", "File too large", most)
    check(tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".*.part"))
    assert all(len(content) <= most for content in contents(tmp_path / "out").values())
    assert finish(job) == 0


@pytest.fixture
def only_to_read(tmp_path):
    """Make a folder one that may only be read: by its permissions or, for root, by a mount."""
    folder = tmp_path / "read"
    folder.mkdir()
    (folder / "results").write_bytes(b"of another week")
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    for options in (["--bind", folder], ["-o", "remount,bind,ro"]):
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
        if done.returncode: pytest.skip(f"root may not mount here ({done.stderr.strip()})")
    try: yield folder
    finally: subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("below", ["", "new/deep"])
def test_a_folder_that_may_only_be_read(kind, below, base, only_to_read, tmp_path):
    job = WORK[kind][0].format(base=base, out=only_to_read / below).split()
    refused(job, tmp_path / "errors", f"{only_to_read}: may only be read")
    assert contents(only_to_read) == {"results": b"of another week"}


def test_predictions_where_nothing_may_be_written(base, only_to_read, tmp_path):
    assert finish(TRAIN.format(base=base, out=tmp_path / "model").split()) == 0
    job = ["evaluate", str(base / "data"), "--checkpoint", str(tmp_path / "model"), "--out", str(only_to_read / "x.jsonl")]
    refused(job, tmp_path / "errors", "may only be read; give another folder")
