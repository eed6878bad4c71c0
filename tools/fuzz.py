"""Hand a reader bytes for as long as one likes, led by the code that they reach; keep what surprises it.

    pip install atheris                      # Linux; not among the requirements of the project
    python tools/fuzz.py media --seconds 3600

What was run goes to results/fuzz/<target>.json, and each surprise once, by the place where it was
raised, with its input in runs/fuzz/<target>. Copy what was found to tests/fuzz/found/<target>, mend
the reader, and it stays a test. Without atheris `FUZZ_SECONDS=3600 pytest tests/fuzz -k media`
spoils inputs blindly.
"""

import argparse
import hashlib
import json
import platform
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzz")]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["mcd_edu", "json", "numpy.lib"]):
    from fuzz_targets import LONGEST, TARGETS, run, seeds

    from mcd_edu.media import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--found", type=Path, default=ROOT / "runs" / "fuzz", help="folder of the inputs that surprised")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fuzz", help="folder of the records")
    options = parser.parse_args()
    found, record, start = options.found / options.target, options.out / f"{options.target}.json", time.monotonic()
    for folder in (found, options.out): folder.mkdir(parents=True, exist_ok=True)
    state = {"command": f"python tools/fuzz.py {options.target} --seconds {options.seconds}",
             "python": platform.python_version(), **{name: version(name) for name in ("atheris", "av", "numpy")},
             "seconds": 0, "runs": 0, "surprises": {}}

    with TemporaryDirectory() as name:
        folder = Path(name)
        corpus, words, work = (folder / part for part in ("corpus", "words", "work"))
        for path in (corpus, work): path.mkdir()
        given = [file.read_bytes() for file in (ROOT / "tests/fuzz/found").glob(f"{options.target}/*")]
        for i, content in enumerate([*seeds(options.target, work), *given]):
            (corpus / str(i)).write_bytes(content)
        words.write_text("".join('"' + "".join(f"\\x{b:02x}" for b in word) + '"\n'
                                 for word in TARGETS[options.target].words))

        def note() -> None:
            write_whole(record, lambda part: part.write_text(json.dumps(state, indent=1) + "\n"))

        def check(data: bytes) -> None:
            state["runs"] += 1
            try: run(options.target, data, work)
            except Exception:
                lines = traceback.format_exc().splitlines()
                place = [line.strip() for line in lines if line.startswith("  File ")][-3:]
                key = hashlib.sha256("".join(place).encode()).hexdigest()[:12]
                if key not in state["surprises"]:
                    state["surprises"][key] = [*place, lines[-1]]
                    (found / key).write_bytes(data)
                    note()
            if (seconds := round(time.monotonic() - start)) >= state["seconds"] + 10:
                state["seconds"] = seconds
                note()

        atheris.Setup([sys.argv[0], str(corpus), f"-max_len={LONGEST}", f"-dict={words}", "-timeout=60",
                       "-rss_limit_mb=6000", f"-max_total_time={options.seconds}", "-verbosity=0", "-print_final_stats=1",
                       f"-artifact_prefix={found}/"], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
