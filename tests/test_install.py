"""The package as a stranger gets it: wheel and sdist, tried far from the repository.

The environments here are new. Into them go the distributions that the wheel asks for, and those
that these ask for, linked from the environment of the tests; nothing else. The wheel itself is
installed by pip, which refuses when a requirement is missing or of the wrong version.
"""

import importlib.metadata as metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "data_samples" / "music_avqa" / "videos" / "00002611.mp4"
LATE = {"torch", "numpy", "av", "plotly", "transformers", "huggingface_hub", "IPython", "nbdev", "fastcore"}
RUN = """
import papermill, sys, tempfile
from traitlets.config import Config
with tempfile.TemporaryDirectory() as sockets:  # no TCP ports, which kernels side by side may fight for
    kernel = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
    papermill.execute_notebook(sys.argv[1], "out.ipynb", progress_bar=False,
                               config=Config(KernelManager=kernel))
"""
MAX_WHEEL = 10_000_000  # bytes


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist of a copy of the repository and the wheel built from that sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "mcd_edu", source / "mcd_edu", ignore=leave)
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
                   check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def requirements(wheel: Path, *extras: str) -> list[Requirement]:
    """What the wheel asks for, as its own metadata say."""
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        about = metadata.PathDistribution(zipfile.Path(archive, info + "/"))
        needs = [Requirement(text) for text in about.requires]
    return [need for need in needs if not need.marker
            or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras))]


def closure(needs: list[Requirement]) -> dict[str, metadata.Distribution]:
    """The installed distributions that requirements lead to, one after the other."""
    found, waiting = {}, [(need.name, frozenset(need.extras)) for need in needs]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen: continue
        seen.add((name, extras))
        distribution = metadata.distribution(name)
        found[distribution.metadata["Name"].lower()] = distribution
        for need in map(Requirement, distribution.requires or ()):
            if not need.marker or any(need.marker.evaluate({"extra": e}) for e in ("", *extras)):
                waiting.append((need.name, frozenset(need.extras)))
    return found


def tops(distribution: metadata.Distribution) -> dict[str, list[str]]:
    """What stands at the top of site-packages, with the files in it; scripts are made anew."""
    found = defaultdict(list)
    for file in distribution.files or ():
        if ".." not in file.parts and file.suffix != ".pyc": found[file.parts[0]].append(str(file))
    return found


def make_environment(folder: Path, needs: list[Requirement]) -> Path:
    """A new environment with pip and what `needs` lead to, and nothing else. Its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    wanted = closure([*needs, Requirement("pip")])
    owners = Counter(top for distribution in metadata.distributions() for top in tops(distribution))
    for distribution in wanted.values():
        for top, files in tops(distribution).items():
            for name in [top] if owners[top] == 1 else files:  # a folder that several share: by file
                target = packages / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists(): target.symlink_to(Path(distribution.locate_file(name)).resolve())
    return python


def clean_run(command: list, folder: Path, dist: Path | None = None, **more) -> subprocess.CompletedProcess:
    """Run in `folder`, without any trace of the tests' own environment; pip finds `dist` alone."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1",
           "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
           "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", **({"PIP_FIND_LINKS": str(dist)} if dist else {}), **more}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=env, capture_output=True,
                          text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


# What is built ---------------------------------------------------------------------------------

def test_wheel_and_sdist_are_small_and_whole(dist, wheel):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if name.startswith("mcd_edu/")}
    assert installed <= packed and {"LICENSE", "NOTICE", "README.md", "settings.ini"} <= packed
    for name in ("weights/music_avqa/model.safetensors", "weights/encoders/visual.safetensors",
                 "samples/assets/notes.flac", "samples/fingerprints.json", "cli.py"):
        assert f"mcd_edu/{name}" in installed
    assert max(wheel.stat().st_size, sdist.stat().st_size) <= MAX_WHEEL, (
        f"{wheel.stat().st_size} bytes: `halve` of mcd_edu.hub stores a checkpoint in 16 bits")


@pytest.mark.parametrize("extra", ["notebooks", "colab", "backbones", "devices", "docs", "dev"])
def test_extras_resolve(wheel, tmp_path, extra):
    report = tmp_path / "report.json"
    clean_run([sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", report,
               f"mcd_edu[{extra}] @ {wheel.as_uri()}"], tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    plan = json.loads(report.read_text(encoding="utf-8"))["install"]
    assert {item["metadata"]["name"] for item in plan} <= {"mcd_edu"}  # all else is here already


# Used without the repository, and without Jupyter ----------------------------------------------

@pytest.fixture(scope="module")
def installed(dist, wheel, tmp_path_factory) -> Path:
    """The folder of an environment with the package and what it needs to run."""
    folder = tmp_path_factory.mktemp("clean")
    python = make_environment(folder / "env", requirements(wheel))
    clean_run([python, "-m", "pip", "install", "--quiet", "mcd_edu"], folder, dist)
    clean_run([python, "-m", "pip", "check"], folder)
    return folder


def test_nothing_heavy_is_imported_before_it_is_used(installed):
    python = installed / "env" / "bin" / "python"
    absent = ["nbdev", "IPython", "jupyterlab", "plotly", "papermill", "transformers", "pytest"]
    clean_run([python, "-c", "import importlib.util as u\n"
               f"assert not [name for name in {absent} if u.find_spec(name)]"], installed)
    for code in ("import mcd_edu", "import mcd_edu.cli", "from mcd_edu.cli import main; main(['--help'])"):
        done = clean_run([python, "-c", f"{code}\nimport sys\nprint('MODULES', *sys.modules)"], installed)
        loaded = {name.partition(".")[0] for name in done.stdout.partition("MODULES")[2].split()}
        assert "mcd_edu" in loaded and not loaded & LATE, code
    found = clean_run([python, "-c", "import mcd_edu; print(mcd_edu.__file__)"], installed).stdout
    assert found.startswith(str(installed))


def test_the_installed_command_answers_about_a_clip(installed):
    command = installed / "env" / "bin" / "mcd-edu"
    assert "answer" in clean_run([command, "--help"], installed).stdout
    questions = ["How many instruments are sounding in the video?", "Is there a voiceover?"]
    replies = json.loads(clean_run([command, "answer", CLIP, *questions, "--json"], installed).stdout)
    assert [reply["question"] for reply in replies] == questions
    assert replies[0]["answer"] in "zero one two three four five".split()
    assert replies[1]["answer"] in ("yes", "no")


def test_the_installed_command_makes_samples(installed):
    command = [installed / "env" / "bin" / "mcd-edu", "samples", "--out", "set", "--clips", 15,
               "--videos", 0, "--workers", 0]
    done = clean_run(command, installed)
    assert "clip" in done.stderr and "synthesised" not in done.stderr  # a bar; the shipped notes
    features = sorted((installed / "set" / "feats").rglob("*.npy"))
    assert len(features) == 30
    features[3].unlink()
    stamps = {path: path.stat().st_mtime_ns for path in features[:3]}
    clean_run(command, installed)                                       # goes on, without a network
    assert features[3].is_file() and stamps == {path: path.stat().st_mtime_ns for path in stamps}


# On Colab --------------------------------------------------------------------------------------

def test_colab_installs_the_package_and_leaves_its_own_alone(dist, wheel, tmp_path):
    """What Colab brings is torch, a kernel and widgets; no JupyterLab and no kaleido."""
    brought = [Requirement(name) for name in ("ipykernel", "ipywidgets", "papermill")]   # the last one runs the notebook here
    python = make_environment(tmp_path / "env", [*requirements(wheel, "colab"), *brought])
    assert not {need.name for need in requirements(wheel, "colab")} & {"ipython", "ipykernel", "ipywidgets", "jupyterlab"}
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "colab.pth").write_text(
        "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n")
    shutil.copy(ROOT / "nbs" / "03_layers.ipynb", tmp_path)
    assert not list(packages.glob("mcd_edu*"))

    def own_files():
        found = [path for name in ("torch", "IPython", "ipywidgets", "ipykernel") for path in packages.glob(f"{name}*/**/*")]
        return {path: os.lstat(path)[:9] for path in found} | {path: path.resolve() for path in found if path.is_symlink()}
    before = own_files()
    clean_run([python, "-c", RUN, "03_layers.ipynb"], tmp_path, dist, PLOTLY_RENDERER="plotly_mimetype")
    assert list(packages.glob("mcd_edu-*.dist-info")) and len(before) > 1000
    after = own_files()
    assert {path for path in before if "__pycache__" not in path.parts and before[path] != after.get(path)
            and not path.is_dir()} == set()

    # a notebook that reads files of the repository clones it first
    origin = tmp_path / "origin"
    shutil.copytree(ROOT / "results", origin / "results")
    (origin / "nbs" / "experiments").mkdir(parents=True)
    (origin / "nbs" / "experiments" / "here").touch()
    for step in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *step], cwd=origin, check=True)
    shutil.copy(ROOT / "nbs" / "experiments" / "search.ipynb", tmp_path)
    clean_run([python, "-c", RUN, "search.ipynb"], tmp_path, dist, PLOTLY_RENDERER="plotly_mimetype", GIT_CONFIG_COUNT="1",
              GIT_CONFIG_KEY_0=f"url.{origin.as_uri()}.insteadOf", GIT_CONFIG_VALUE_0="https://github.com/mcd-edu/mcd_edu")
    assert (tmp_path / "mcd_edu" / "results" / "search").is_dir()
