"""Run a notebook, write the README from its notebook, check that notebooks and package agree.

    python tools/notebooks.py run nbs/train/music_avqa.ipynb runs/demo/music_avqa.ipynb \\
        -f params/demo.yaml
    python tools/notebooks.py readme
    python tools/notebooks.py check
"""

import ast
import filecmp
import logging
import posixpath
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import nbformat
import papermill
import typer
import yaml
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
FRONT_PAGE = "index.ipynb"  # the notebook in nbs/ that README.md is made from
GENERATED = ["nbs/**/*.ipynb", "mcd_edu/**/*.py", "README.md"]  # what `make export` may rewrite

logging.getLogger("papermill").setLevel(logging.ERROR)  # check_parameters is stricter than it


# Run -------------------------------------------------------------------------------------------

def parameter_names(notebook: NotebookNode) -> set[str]:
    """The names assigned in the cell tagged `parameters`. ValueError: no such cell."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if not cells:
        raise ValueError("no cell is tagged `parameters`: tag the one that holds the defaults")
    names = set()
    for statement in ast.parse(cells[0].source).body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        else:
            targets = [statement.target] if isinstance(statement, ast.AnnAssign) else []
        names |= {node.id for target in targets for node in ast.walk(target)
                  if isinstance(node, ast.Name)}
    return names


def check_parameters(notebook: NotebookNode, parameters: dict[str, Any]) -> None:
    """ValueError unless the `parameters` cell assigns every one of `parameters`."""
    known = parameter_names(notebook)
    if unknown := sorted(set(parameters) - known):
        raise ValueError(f"unknown parameter {', '.join(unknown)}: "
                         f"the `parameters` cell assigns {', '.join(sorted(known))}")


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters of a yaml file; an empty file has none. ValueError: not a mapping."""
    parameters = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: expected lines of the form `name: value`")
    return parameters


def run_notebook(
    path: Path,                                # the notebook; its folder is the working directory
    output: Path,                              # where the executed copy goes
    parameters: dict[str, Any] | None = None,  # replace defaults of the `parameters` cell
    time_limit: float | None = None,           # seconds for the whole notebook
    show: bool = False,                        # also print what the cells print, as they do
) -> NotebookNode:
    """Execute a notebook in a fresh kernel, as papermill does, but refuse misspelt parameters.

    ValueError: a parameter is unknown or the notebook takes none. CellTimeoutError: the time
    limit has passed. PapermillExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        try:
            check_parameters(notebook, parameters)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    options = {}
    if show:
        options |= {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
    if time_limit is not None:
        end = time.monotonic() + time_limit
        options["timeout_func"] = lambda cell: max(1, round(end - time.monotonic()))
    with TemporaryDirectory() as sockets:  # no TCP ports, which kernels side by side may fight for
        kernel = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
        return papermill.execute_notebook(
            path.resolve(), output.resolve(), parameters=parameters or {},
            cwd=path.resolve().parent, progress_bar=False, config=Config(KernelManager=kernel),
            **options)


# README ----------------------------------------------------------------------------------------

LINK = re.compile(r'(?:(?<=\]\()|(?<=src=")|(?<=href="))[^)"\s]+')
ELSEWHERE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|[/#]")  # another site, or this very page
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def local_links(markdown: str) -> list[str]:
    """The links of a page that point to files beside it, without their #fragments."""
    links = LINK.findall(CODE.sub("", markdown))
    return [link.partition("#")[0] for link in links if not ELSEWHERE.match(link)]


def move_links(markdown: str, folder: str) -> str:
    """Make the links of a page in `folder` right for a page in the folder above it."""
    def moved(match: re.Match) -> str:
        link = match.group()
        return link if ELSEWHERE.match(link) else posixpath.normpath(f"{folder}/{link}")
    prose_and_code = CODE.split(markdown)  # every second piece is code
    return "".join(piece if i % 2 else LINK.sub(moved, piece)
                   for i, piece in enumerate(prose_and_code))


def readme_text(notebook: NotebookNode) -> str:
    """The front page as Markdown: `#| hide` drops a cell, `#| echo: false` only its source."""
    pages = [f"<!-- Written by `make readme` from nbs/{FRONT_PAGE}: edit that one. -->"]
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        directives = [line[2:].strip() for line in lines if line.startswith("#|")]
        if "hide" in directives:
            continue
        source = "\n".join(line for line in lines if not line.startswith("#|"))
        page = nbformat.v4.new_notebook(cells=[NotebookNode(cell, source=source)],
                                        metadata={"language_info": {"name": "python"}})
        exporter = MarkdownExporter(exclude_input="echo: false" in directives)
        text, resources = exporter.from_notebook_node(page)
        if resources["outputs"]:
            raise ValueError(f"{FRONT_PAGE}: a README cannot hold a plot; save it in nbs/images "
                             "and link to it")
        pages.append(move_links(text.strip(), "nbs"))
    return "\n\n".join(filter(None, pages)) + "\n"


def write_readme(root: Path) -> None:
    """Write README.md from nbs/index.ipynb."""
    notebook = nbformat.read(root / "nbs" / FRONT_PAGE, as_version=4)
    (root / "README.md").write_text(readme_text(notebook), encoding="utf-8")


# Check -----------------------------------------------------------------------------------------

def out_of_step(root: Path) -> list[str]:
    """The files that nbdev_export, nbdev_clean or `readme` would change, tried on a copy."""
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(root / "settings.ini", copy)
        for path in (path for pattern in GENERATED for path in root.glob(pattern)):
            (copy / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy / path.relative_to(root))
        for command in ["nbdev_export", "nbdev_clean"]:
            subprocess.run([Path(sys.executable).parent / command], cwd=copy, check=True)
        write_readme(copy)
        names = {path.relative_to(base).as_posix() for base in [root, copy]
                 for pattern in GENERATED for path in base.glob(pattern)}
        same, _, _ = filecmp.cmpfiles(root, copy, names, shallow=False)
        return sorted(names - set(same))


# Command line ----------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False,
                  help=__doc__.splitlines()[0])


@app.command()
def run(
    notebook: Path,
    output: Path,
    parameters: Annotated[list[Path] | None, typer.Option("-f", "--parameters-file")] = None,
) -> None:
    """Execute NOTEBOOK into OUTPUT; of several parameter files a later one wins."""
    typer.echo(f"{notebook} -> {output}")
    try:
        values = {k: v for path in parameters or [] for k, v in read_parameters(path).items()}
        run_notebook(notebook, output, values, show=True)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


@app.command()
def readme() -> None:
    """Write README.md from nbs/index.ipynb."""
    write_readme(ROOT)


@app.command()
def check() -> None:
    """Fail when the notebooks are not clean, or the package or README.md are not what they say."""
    if changed := out_of_step(ROOT):
        raise SystemExit("`make export` would change: " + " ".join(changed))


if __name__ == "__main__":
    app()
