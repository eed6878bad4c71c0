"""No bytes surprise a reader: found cases, and inputs spoilt anew.

    FUZZ_SECONDS=3600 pytest tests/fuzz -k media         # spoilt for an hour; 2 seconds where it is not set
    python tools/fuzz.py media --seconds 3600            # led by the code that is reached; needs atheris
"""

import json
import os
import time
from pathlib import Path
from random import Random

import pytest
from fuzz_targets import LONGEST, TARGETS, mutate, run, seeds

ROOT = Path(__file__).resolve().parents[2]
FOUND = sorted(path for path in (Path(__file__).parent / "found").glob("*/*") if path.is_file())
SECONDS = float(os.environ.get("FUZZ_SECONDS", 2))


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_is_no_surprise_any_more(path, tmp_path):
    run(path.parent.name, path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_whole_is_read(name, tmp_path):
    for content in seeds(name, tmp_path): run(name, content, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_spoilt_is_no_surprise(name, tmp_path):
    """The last input stays in the folder of a failed test, also where a library took the process with it."""
    draw, given, until, count = Random(0), seeds(name, tmp_path), time.monotonic() + SECONDS, 0
    while time.monotonic() < until:
        content = mutate(draw.choice(given), TARGETS[name].words, draw)[:LONGEST]
        (tmp_path / "last").write_bytes(content)
        run(name, content, tmp_path)
        count += 1
    assert count > 5


@pytest.mark.parametrize("name", TARGETS)
def test_the_record_tells_of_an_hour_without_a_surprise(name):
    """What `make fuzz` has left, noted every ten seconds; another hour is for whoever changes a reader."""
    record = json.loads((ROOT / "results" / "fuzz" / f"{name}.json").read_text())
    assert record["seconds"] > 3590 and record["runs"] > 100_000 and record["surprises"] == {}
