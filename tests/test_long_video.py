"""A long video is answered in the memory of a short one.

    LONG_MINUTES=60 pytest tests/test_long_video.py -s       # an hour; 3 minutes where it is not set
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mcd_edu.media import write_video

MINUTES = float(os.environ.get("LONG_MINUTES", 3))
ROOT = Path(__file__).resolve().parent.parent
MEASURE = """
import sys
from mcd_edu.cli import main
main(sys.argv[1:])
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


def write_film(path: Path, seconds: int) -> Path:
    """Pictures and sound that change, one picture a second; nothing of it is ever in memory as a whole."""
    class Sound:
        ndim = 1
        def __len__(self): return seconds * 16_000
        def __array__(self, *_, **__): return np.zeros(1)
        def __getitem__(self, at):
            _, piece = at if isinstance(at, tuple) else (None, at)
            time = np.arange(piece.start, min(piece.stop, len(self))) / 16_000
            return 0.1 * np.sin(2 * np.pi * 300 * time)[None]
    frames = np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None, None], (seconds, 128, 128, 3))
    write_video(path, frames, Sound(), fps=1)
    return path


def peak(*arguments) -> tuple[str, float]:
    """What a command line says in a process of its own, and the most memory it had, MB."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=1200)
    *said, memory = done.stdout.splitlines()
    return "\n".join(said), int(memory) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")
def test_memory_does_not_grow_with_the_minutes(tmp_path, untrained):
    question = "How many instruments are sounding in the video?"
    peaks = {}
    for seconds in 10, round(60 * MINUTES):
        film = write_film(tmp_path / f"{seconds}.mp4", seconds)
        said, peaks[seconds] = peak("answer", film, question, "--checkpoint", untrained / "model")
        assert said.startswith(f"Q: {question}\nA: ")
    (_, short), (seconds, long) = peaks.items()
    print(f"\n10 s: {short:.0f} MB; {seconds} s: {long:.0f} MB")
    assert long - short < 15 + 0.5 * MINUTES                 # MB; the pictures of a minute alone are 3, its sound 4
