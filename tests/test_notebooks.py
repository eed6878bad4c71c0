"""Every notebook runs from a fresh kernel and is as a reader should find it; so does its runner."""

import os
import posixpath
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellTimeoutError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebooks import (
    app,
    check_parameters,
    local_links,
    move_links,
    out_of_step,
    parameter_names,
    read_parameters,
    readme_text,
    run_notebook,
)
from papermill import PapermillExecutionError
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
TIME_LIMIT = float(os.environ.get("NOTEBOOK_SECONDS", 300))  # for one notebook
MAX_BYTES, MAX_CELLS = 300_000, 65
NOTEBOOKS = [path for path in sorted(NBS.rglob("*.ipynb"))
             if path.relative_to(NBS).parts[0] != "assignments"
             and not any(part.startswith(".") for part in path.relative_to(NBS).parts)]
PARAMETER_FILES = sorted((ROOT / "params").rglob("*.yaml"))

BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/mcd-edu/mcd_edu/blob/main/{})")
COLAB_CELL = """\
#| hide
import sys
if "google.colab" in sys.modules:  # install the package on Colab only; the torch that is there stays
    %pip install -q "mcd_edu[colab]"\
"""
FILES_CELL = COLAB_CELL.replace("import sys", "import os\nimport sys", 1) + """
    if not os.path.exists("{up}data_samples"):   # the files that stand beside the notebooks
        !git clone -q --depth 1 https://github.com/mcd-edu/mcd_edu
        %cd -q mcd_edu/{folder}\
"""
BESIDE = re.compile(r"\"(\.\./)+(data_samples|results|benchmarks)\b")
FOLDERS = "home root Users tmp work mnt opt var srv".split()  # absolute paths start in one of them
MACHINE_PATH = re.compile(rf"(?<![\w.~/-])/(?:{'|'.join(FOLDERS)})/[\w.-]+")

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[path.relative_to(NBS).as_posix() for path in NOTEBOOKS])


# What a notebook has to be ---------------------------------------------------------------------

def texts(cell) -> list[str]:
    """All text of a cell that a reader may see: its source and every output but the images."""
    found = [cell.source]
    for output in cell.get("outputs", []):
        found += [output.get("text", ""), *output.get("traceback", [])]
        found += [str(data) for mime, data in output.get("data", {}).items()
                  if not mime.startswith("image/")]
    return found


def opening_problems(notebook, name: str) -> list[str]:
    """What is wrong with the first cells of the notebook at `name`, a path from the root."""
    sources = [cell.source for cell in notebook.cells[:4]] + [""] * 4  # there may be fewer cells
    library = sources[0].startswith("#| default_exp ")  # else: training, experiments
    sources = sources[library:]
    wanted = ["# ", "\n> ", BADGE.format(name)]
    wanted += ["**You will build**", "**You need**", "**Runs in**"] if library else []
    problems = [f"the title cell has no {mark!r}" for mark in wanted if mark not in sources[0]]
    if not sources[0].startswith("# "):
        problems.append("it does not start with its title")
    folder = posixpath.dirname(name)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    files = FILES_CELL.format(up="../" * len(folder.split("/")), folder=folder)
    alone = "provide_samples" in code or not BESIDE.search(code)    # needs no files of the repository, or makes them
    if sources[1] != (COLAB_CELL if alone else files):
        problems.append("the cell after the title is not the guarded Colab cell")
    if library and not sources[2].startswith("#| export"):
        problems.append("the imports of the module do not follow the Colab cell")
    return problems


def problems_of(path: Path, root: Path) -> list[str]:
    """Everything about a notebook that would meet its reader badly."""
    notebook = nbformat.read(path, as_version=4)
    problems = []
    if path.stat().st_size > MAX_BYTES:
        problems.append(f"{path.stat().st_size} bytes are more than {MAX_BYTES}")
    if len(notebook.cells) > MAX_CELLS:
        problems.append(f"{len(notebook.cells)} cells are more than {MAX_CELLS}")
    if (kernel := notebook.metadata.get("kernelspec", {}).get("name")) != "python3":
        problems.append(f"its kernel is {kernel}, not python3")
    if "widgets" in notebook.metadata:
        problems.append("it keeps the states of widgets, such as progress bars")
    for number, cell in enumerate(notebook.cells):
        outputs = cell.get("outputs", [])
        if any(part.get("execution_count") for part in [cell, *outputs]):
            problems.append(f"cell {number} has an execution count")
        if any(output.output_type == "error" for output in outputs):
            problems.append(f"cell {number} shows an error")
        problems += [f"cell {number} names a path of one machine: {found}"
                     for text in texts(cell) for found in MACHINE_PATH.findall(text)]
        if cell.cell_type == "markdown":
            problems += [f"cell {number} links to {link}, which is not there"
                         for link in local_links(cell.source)
                         if not (path.parent / link).exists()]
    return problems + opening_problems(notebook, path.relative_to(root).as_posix())


@each_notebook
def test_notebook_is_tidy(path):
    problems = problems_of(path, ROOT)
    assert not problems, "\n".join(problems)


# Each notebook, run ----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def one_copy(tmp_path_factory) -> Path:
    """The repository without what it does not ship; on the disk of the throw-away copies."""
    copy = tmp_path_factory.mktemp("one") / "copy"
    leave = shutil.ignore_patterns(".*", "runs", "build", "dist", "_docs", "*.egg-info", "tests")
    shutil.copytree(ROOT, copy, ignore=leave)
    return copy


@pytest.fixture
def copied_root(one_copy, tmp_path, monkeypatch) -> Path:
    """A throw-away copy of the repository, made of links, so that no notebook can write into the real one."""
    copy = tmp_path / "copy"
    shutil.copytree(one_copy, copy, copy_function=os.link)
    monkeypatch.setenv("PYTHONPATH", str(copy))  # the kernel imports the copy of the package
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    return copy


@each_notebook
def test_notebook_runs(path, copied_root, tmp_path):
    smoke = ROOT / "params" / "smoke" / f"{path.stem}.yaml"
    parameters = read_parameters(smoke) if smoke.exists() else None
    run_notebook(copied_root / path.relative_to(ROOT), tmp_path / "out.ipynb", parameters,
                 time_limit=TIME_LIMIT)


@pytest.mark.parametrize("path", PARAMETER_FILES,
                         ids=[path.relative_to(ROOT).as_posix() for path in PARAMETER_FILES])
def test_parameter_file_fits_its_notebook(path):
    found = re.match(r"# (nbs/\S+\.ipynb)\b", path.read_text(encoding="utf-8"))
    assert found, "the first line must name the notebook: # nbs/….ipynb"
    notebook = ROOT / found[1]
    check_parameters(nbformat.read(notebook, as_version=4), read_parameters(path))
    assert path.parent.name != "smoke" or path.stem == notebook.stem


# The checks themselves -------------------------------------------------------------------------

def write(path: Path, *cells) -> Path:
    """Write a notebook of these cells."""
    metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)
    return path


def tidy_cells(name: str) -> list:
    """The first cells of a library notebook as they should be."""
    title = (f"# Title\n\n> One line.\n\n{BADGE.format(name)}\n\n"
             "**You will build** it. **You need** little. **Runs in** 1 s on a CPU.")
    return [new_code_cell("#| default_exp x"), new_markdown_cell(title),
            new_code_cell(COLAB_CELL), new_code_cell("#| export\nimport torch")]


def test_a_tidy_notebook_has_no_problems(tmp_path):
    name = "nbs/05_x.ipynb"
    library = write(tmp_path / name, *tidy_cells(name))
    training = write(tmp_path / "nbs/train/x.ipynb", *tidy_cells("nbs/train/x.ipynb")[1:3])
    assert problems_of(library, tmp_path) == problems_of(training, tmp_path) == []
    cells = tidy_cells("nbs/train/y.ipynb")[1:3]
    cells[1].source = FILES_CELL.format(up="../../", folder="nbs/train")
    assert problems_of(write(tmp_path / "nbs/train/y.ipynb", *cells, new_code_cell('x = "../../results/x"')), tmp_path) == []


@pytest.mark.parametrize("spoil, problem", [
    (lambda cells: cells.extend(new_code_cell("x") for _ in range(70)), "more than 65"),
    (lambda cells: cells.append(new_markdown_cell("x" * 300_001)), "more than 300000"),
    (lambda cells: cells.append(new_code_cell("x", execution_count=3)), "execution count"),
    (lambda cells: cells.append(new_markdown_cell("![](images/no.svg)")), "images/no.svg"),
    (lambda cells: cells.append(new_code_cell(f"open('/{FOLDERS[0]}/me/x.npy')")), "one machine"),
    (lambda cells: cells.append(new_code_cell("x", outputs=[new_output(
        "stream", text=f"File /{FOLDERS[3]}/ipykernel_7/1.py")])), "one machine"),
    (lambda cells: cells.append(new_code_cell("x", outputs=[new_output(
        "error", ename="E", evalue="e", traceback=[])])), "shows an error"),
    (lambda cells: cells[1].update(source=cells[1].source.replace("05_x", "06_y")), "05_x.ipynb"),
    (lambda cells: cells[1].update(source=cells[1].source.replace("**Runs", "**Run")), "Runs in"),
    (lambda cells: cells[1].update(source="\n" + cells[1].source), "title"),
    (lambda cells: cells[2].update(source="%pip install -q mcd_edu"), "Colab"),
    (lambda cells: cells.append(new_code_cell('x = "../data_samples/music_avqa"')), "Colab"),
    (lambda cells: cells.insert(3, new_markdown_cell("early")), "imports"),
])
def test_a_spoilt_notebook_is_found(tmp_path, spoil, problem):
    name = "nbs/05_x.ipynb"
    cells = tidy_cells(name)
    spoil(cells)
    problems = problems_of(write(tmp_path / name, *cells), tmp_path)
    assert len(problems) == 1 and problem in problems[0], problems


def test_states_of_widgets_are_found(tmp_path):
    path = write(tmp_path / "nbs/05_x.ipynb", *tidy_cells("nbs/05_x.ipynb"))
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    nbformat.write(notebook, path)
    assert problems_of(path, tmp_path) == ["it keeps the states of widgets, such as progress bars"]


@pytest.mark.parametrize("text", [
    "https://example.org/home/page", "a/tmp/b", "data_samples/var/x", "../opt/x", "/", "and/or"])
def test_these_are_no_machine_paths(text):
    assert not MACHINE_PATH.search(text)


# The runner ------------------------------------------------------------------------------------

def parameters_cell(source: str = "steps, rate = 1, 0.1\nname: str = 'a'"):
    return new_code_cell(source, metadata={"tags": ["parameters"]})


def test_parameter_names_are_those_assigned():
    cell = parameters_cell("import os\na = b = 1\n(c, d), e = (2, 3), 4\nf: int = 5\nprint(a)")
    assert parameter_names(new_notebook(cells=[cell])) == set("abcdef")


def test_parameters_reach_the_notebook_in_its_own_folder(tmp_path):
    path = write(tmp_path / "nbs/train/x.ipynb", parameters_cell(),
                 new_code_cell("import os\nprint(steps, rate, os.path.basename(os.getcwd()))"))
    output = tmp_path / "runs/x.ipynb"
    executed = run_notebook(path, output, {"steps": 7}, time_limit=60)
    assert executed.cells[-1].outputs[0].text == "7 0.1 train\n"
    assert nbformat.read(output, as_version=4).cells[-1].outputs == executed.cells[-1].outputs


@pytest.mark.parametrize("cell, message", [
    (parameters_cell(), "unknown parameter setps: .* assigns name, rate, steps"),
    (new_code_cell("setps = 1"), "no cell is tagged `parameters`"),
])
def test_parameters_without_effect_are_refused(tmp_path, cell, message):
    output = tmp_path / "out.ipynb"
    with pytest.raises(ValueError, match=message):
        run_notebook(write(tmp_path / "x.ipynb", cell), output, {"setps": 7})
    assert not output.exists()


def test_a_failing_cell_fails(tmp_path):
    path = write(tmp_path / "x.ipynb", new_code_cell("1 / 0"))
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        run_notebook(path, tmp_path / "out.ipynb", time_limit=60)


def test_a_slow_notebook_is_stopped(tmp_path):
    waits = [new_code_cell("import time\ntime.sleep(2)") for _ in range(30)]
    with pytest.raises(CellTimeoutError):
        run_notebook(write(tmp_path / "x.ipynb", *waits), tmp_path / "out.ipynb", time_limit=5)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n"])
def test_a_parameter_file_must_hold_names_and_values(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="name: value"):
        read_parameters(path)


def test_command_line_run(tmp_path):
    path = write(tmp_path / "x.ipynb", parameters_cell(), new_code_cell("assert steps == 9"))
    right, wrong = tmp_path / "right.yaml", tmp_path / "wrong.yaml"
    right.write_text("# nbs/x.ipynb\nsteps: 9\n")
    wrong.write_text("stpes: 9\n")
    arguments = ["run", str(path), str(tmp_path / "out.ipynb"), "-f", str(right)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.output.startswith(str(path))
    refused = CliRunner().invoke(app, [*arguments, "-f", str(wrong)])
    assert refused.exit_code == 1 and "unknown parameter stpes" in refused.output
    absent = CliRunner().invoke(app, ["run", str(tmp_path / "no.ipynb"), str(tmp_path / "o.ipynb")])
    assert absent.exit_code == 1 and "no.ipynb" in absent.output


# README and package against the notebooks ------------------------------------------------------

def test_readme_is_in_step_with_its_notebook():
    notebook = nbformat.read(NBS / "index.ipynb", as_version=4)
    message = "run `make readme`"
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_text(notebook), message


def test_readme_names_both_commands_in_its_first_screen():
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    assert "make demo" in screen and "make test" in screen


def test_links_move_with_the_page():
    page = ('[a](00_data.ipynb#top) [b](../params) [c](https://x.org/y) [d](#here) '
            '<img src="images/x.svg"> [`e`](f.md) `g[h](i)`\n```python\ntable[0](path)\n```')
    assert move_links(page, "nbs") == (
        '[a](nbs/00_data.ipynb#top) [b](params) [c](https://x.org/y) [d](#here) '
        '<img src="nbs/images/x.svg"> [`e`](nbs/f.md) `g[h](i)`\n```python\ntable[0](path)\n```')
    assert local_links(page) == ["00_data.ipynb", "../params", "images/x.svg", "f.md"]


def test_readme_follows_the_directives():
    result = new_output("display_data", data={"text/markdown": "| a |\n|---|"})
    text = readme_text(new_notebook(cells=[
        new_markdown_cell("# Title"), new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("#| echo: false\ntable()", outputs=[result]), new_code_cell("shown = 2")]))
    assert "# Title\n\n| a |\n|---|\n\n```python\nshown = 2\n```\n" in text
    assert "secret" not in text and "table()" not in text


def test_readme_refuses_a_plot():
    plot = new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    with pytest.raises(ValueError, match="nbs/images"):
        readme_text(new_notebook(cells=[new_code_cell("fig", outputs=[plot])]))


def test_what_is_out_of_step_is_named(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    write(tmp_path / "nbs/index.ipynb", new_markdown_cell("# Title"))
    write(tmp_path / "nbs/00_x.ipynb", new_code_cell("#| default_exp x"),
          new_code_cell("#| export\nx = 1", execution_count=1))
    (tmp_path / "README.md").write_text("# Other title\n")
    before = sorted(tmp_path.rglob("*"))
    assert out_of_step(tmp_path) == ["README.md", "mcd_edu/__init__.py", "mcd_edu/_modidx.py",
                                     "mcd_edu/x.py", "nbs/00_x.ipynb"]
    assert sorted(tmp_path.rglob("*")) == before
