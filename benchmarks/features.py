"""Features as files and as a store, at the size of MUSIC-AVQA.

    python benchmarks/features.py                  # 9,288 videos: 2.2 GB in a temporary folder
    python benchmarks/features.py --videos 500

Random features of 60 seconds, pictures of width 512 and sound of width 128, and as many questions
as MUSIC-AVQA trains on. Each measurement runs in a process of its own, the files first forgotten
by the system where that can be done (`cold`), then again (`warm`). Writes benchmarks/features.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from mcd_edu.data import group_by_video
from mcd_edu.features import open_features, pack_features

VIDEOS, QUESTIONS, SEGMENTS = 9288, 31_927, 60  # MUSIC-AVQA; the questions are those of train
WIDTHS = {"visual": 512, "audio": 128}
BATCH = 32  # videos
HERE = Path(__file__).resolve().parent


# Machine ---------------------------------------------------------------------------------------

def machine() -> dict:
    """What the figures were measured on."""
    cpu = [line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if "model name" in line]
    memory = [int(line.split()[1]) for line in read_lines("/proc/meminfo") if "MemTotal" in line]
    return {"cpu": (cpu or [platform.processor()])[0], "cores": os.cpu_count(),
            "memory_gb": round(sum(memory) * 1024 / 1e9, 1),
            "system": platform.system(), "python": platform.python_version(),
            "numpy": np.__version__, "torch": torch.__version__}


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def peak_memory() -> dict:
    """The most that this process held, and what of it is its own at the end (files apart), GB."""
    status = dict(line.split(":", 1) for line in read_lines("/proc/self/status"))
    return {name: round(int(status[key].split()[0]) * 1024 / 1e9, 3) for name, key in
            {"peak_gb": "VmHWM", "own_gb": "RssAnon"}.items() if key in status}


def forget(*folders: Path) -> None:
    """Ask the system to drop the files from its memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in (file for folder in folders for file in folder.iterdir()):
        with file.open("rb+") as opened:
            os.fsync(opened)
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def apart(function, *arguments):
    """Run in a fresh process, so that memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return round(time.perf_counter() - start, 4)


# What is measured ------------------------------------------------------------------------------

def make_files(folder: Path, videos: list[str], width: int) -> None:
    """One file of (60, width) a video."""
    generator = np.random.default_rng(width)
    folder.mkdir(parents=True)
    for video in videos:
        np.save(folder / f"{video}.npy", generator.standard_normal((SEGMENTS, width), dtype=np.float32))


def groups_of(num_videos: int, num_questions: int) -> list[np.ndarray]:
    """Numbers of the videos in each batch of an epoch: shuffled, with all questions of a video."""
    generator = np.random.default_rng(0)
    asked = np.concatenate([np.arange(num_videos), generator.integers(
        num_videos, size=max(0, num_questions - num_videos))])  # each video has a question
    video = np.array([asked[group[0]] for group in group_by_video(asked, seed=0)])
    return [video[i:i + BATCH] for i in range(0, len(video), BATCH)]


def convert(folders: list[Path], outs: list[Path]) -> dict:
    """Pack each folder."""
    forget(*folders)

    def pack_all():
        for folder, out in zip(folders, outs):
            pack_features(folder, out, folder.name, show_progress=False)

    return {"seconds": seconds(pack_all), **peak_memory()}


def opening(folders: list[Path]) -> dict:
    """Time until the features of the first video are there to be asked for."""
    forget(*folders)
    names = "cold_seconds", "warm_seconds"
    return {name: seconds(lambda: [open_features(folder).videos for folder in folders]) for name in names}


def streaming(folders: list[Path], groups: list[np.ndarray]) -> dict:
    """An epoch of batches, each read when it is needed."""
    forget(*folders)
    sources = [open_features(folder) for folder in folders]
    videos = list(sources[0].videos)

    def epoch():
        for group in groups:
            for source in sources:
                source.stack([videos[i] for i in group])

    rates = {name: round(len(groups) / seconds(epoch), 1) for name in ("cold", "warm")}
    return {f"{name}_batches_per_second": rate for name, rate in rates.items()} | peak_memory()


def resident(folders: list[Path], groups: list[np.ndarray]) -> dict:
    """All features in memory first, as a training does; then an epoch of batches."""
    forget(*folders)
    tensors = []
    load = seconds(lambda: tensors.extend(open_features(folder).tensors() for folder in folders))

    def epoch():
        for group in groups:
            for features, mask in tensors:
                features[group], mask[group]

    epoch()
    rate = round(len(groups) / seconds(epoch), 1)
    return {"load_seconds": round(load, 2), "batches_per_second": rate, **peak_memory()}


def size_of(folders: list[Path]) -> dict:
    files = [file for folder in folders for file in folder.iterdir()]
    return {"files": len(files), "gb": round(sum(file.stat().st_size for file in files) / 1e9, 4)}


def compare(workshop: Path, num_videos: int, num_questions: int) -> dict:
    """Both sides, one after the other."""
    videos = [f"{i:08}" for i in range(num_videos)]
    files = [workshop / "npy" / kind for kind in WIDTHS]
    stores = [workshop / "store" / kind for kind in WIDTHS]
    for folder, width in zip(files, WIDTHS.values()):
        make_files(folder, videos, width)
    groups = groups_of(num_videos, num_questions)
    found = {"empty_process": apart(peak_memory), "conversion": apart(convert, files, stores)}
    found["verify_seconds"] = seconds(lambda: [open_features(store).verify() for store in stores])
    for name, folders in {"files_float32": files, "store_float16": stores}.items():
        found[name] = {"size": size_of(folders), "open": apart(opening, folders),
                       "streamed": apart(streaming, folders, groups),
                       "in_memory": apart(resident, folders, groups)}
    return {"videos": num_videos, "questions": num_questions, "segments": SEGMENTS, "widths": WIDTHS,
            "batch_videos": BATCH, "batches": len(groups), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=int, default=VIDEOS)
    parser.add_argument("--folder", help="for the files; it needs 250 kB a video")
    parser.add_argument("--out", type=Path, default=HERE / "features.json")
    options = parser.parse_args()
    questions = round(QUESTIONS * options.videos / VIDEOS)
    with tempfile.TemporaryDirectory(dir=options.folder) as workshop:
        needed, free = 240e3 * options.videos, shutil.disk_usage(workshop).free
        if free < 1.2 * needed:
            sys.exit(f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; give another --folder")
        report = {"machine": machine(), **compare(Path(workshop), options.videos, questions)}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
