"""The site of all notebooks: hooks that give MkDocs its pages. `make docs` builds it.

A notebook becomes a page with its outputs, a module a page made of its docstrings and of the
comment behind each parameter. Nothing is loaded from other sites: formulas become MathML.
"""

import html
import inspect
import posixpath
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SKIPPED = {"assignments", "explorer"}    # folders of notebooks that are worked on, not read
GROUPS = [                               # title in the navigation, which notebooks
    ("Clips and data", r"00|01|02_samples/|04b|04c"),
    ("The network", r"03|04|05|06|07|08|09|baselines/"),
    ("Train, answer, measure", r"1|2"),
    ("Runs", r""),
]
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*/blob/main/([^)]*))\)")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[/#])([^)\s#]+)(#[^)\s]*)?(?=\))")
LIST_AFTER_TEXT = re.compile(r"^(?!\s*(?:[-*+]|\d+\.)\s)(?!\s*$)(.*)\n(?=(?:[-*+]|\d+\.)\s)", re.M)
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
BRACKET = re.compile(r"(\\begin\{\w+\}|\\\\)\s*\[")      # a bracket at the start of a row is no option
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.DOTALL | re.M)

TEMPLATE = """\
{%- extends 'markdown/index.md.j2' -%}
{% block input %}
```python{% if cell.metadata.title %} title="{{ cell.metadata.title }}"{% endif %}
{{ cell.source }}
```
{% endblock %}
{% block stream %}
``` { .text .output }
{{ output.text | strip_ansi | trim }}
```
{% endblock %}
{% block data_text %}
``` { .text .output }
{{ output.data['text/plain'] | strip_ansi | trim }}
```
{% endblock %}
"""


# Notebooks -------------------------------------------------------------------------------------

def reading_order() -> dict[str, str]:
    """Notebook, as a path below nbs/, to its name in the table of the front page; then the rest."""
    cells = nbformat.read(NBS / "index.ipynb", as_version=4).cells
    table = next(cell.source for cell in cells if cell.source.startswith("## The notebooks"))
    named = {path: name for name, path in re.findall(r"\[([^]]+)\]\((?!\.\.)([^)]+\.ipynb)\)", table)}
    others = (path.relative_to(NBS) for path in sorted(NBS.rglob("*.ipynb")))
    return named | {path.as_posix(): path.stem.replace("_", " ").capitalize() for path in others
                    if path.as_posix() not in {*named, "index.ipynb"} and not SKIPPED & {*path.parts}
                    and not any(part.startswith(".") for part in path.parts)}


def module_of(notebook: NotebookNode) -> str:
    """The module that a notebook writes, such as mcd_edu.layers, or nothing."""
    found = re.search(r"#\| default_exp (\S+)", "\n".join(c.source for c in notebook.cells[:2]))
    return f"mcd_edu.{found[1]}" if found else ""


def readable_cells(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """The cells without directives: hidden ones are gone, exported ones bear their file's name."""
    file = module_of(notebook).replace(".", "/") + ".py"
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        directives = {line[2:].split()[0] for line in lines if line.startswith("#|")}
        source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
        if "hide" in directives or not (source or cell.get("outputs")):
            continue
        title = {"title": file} if {"export", "exporti"} & directives else {}
        if cell.cell_type == "code" and "echo:" in directives:
            source = ""
        yield NotebookNode(cell, source=source, metadata=NotebookNode(cell.metadata, **title))


def as_mkdocs(markdown: str, folder: str) -> str:
    """Markdown of a notebook in nbs/`folder` as MkDocs reads it: links, lists, the Colab button."""
    def moved(match: re.Match) -> str:
        link, fragment = match[1], match[2] or ""
        target = posixpath.normpath(posixpath.join("nbs", folder, link))
        if not target.startswith("nbs/"):                       # not on the site: on GitHub
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"https://github.com/mcd-edu/mcd_edu/{kind}/main/{target}{fragment}"
        return re.sub(r"\.ipynb$", ".md", link) + fragment
    pieces = CODE.split(markdown)                               # every second piece is code
    for i in range(0, len(pieces), 2):
        pieces[i] = LIST_AFTER_TEXT.sub(r"\1\n\n", LINK.sub(moved, pieces[i]))
    return "".join(pieces)


def notebook_page(path: str) -> tuple[str, dict[str, bytes]]:
    """A notebook below nbs/ as Markdown, and its pictures by name."""
    notebook = nbformat.read(NBS / path, as_version=4)
    module = module_of(notebook)
    links = [f"[:simple-googlecolab: Open in Colab](https://colab.research.google.com/github/mcd-edu/mcd_edu/blob/main/nbs/{path})",
             f"[:simple-github: Source](https://github.com/mcd-edu/mcd_edu/blob/main/nbs/{path})"]
    if module:
        up = "../" * path.count("/")
        links.append(f"[:material-code-braces: `{module}`]({up}api/{module}.md)")
    page = nbformat.v4.new_notebook(cells=list(readable_cells(notebook)),
                                    metadata={"language_info": {"name": "python"}})
    exporter = MarkdownExporter(raw_template=TEMPLATE)
    name = Path(path).stem
    text, resources = exporter.from_notebook_node(page, {"unique_key": name, "output_files_dir": f"{name}_files"})
    buttons = " ".join(f"{link}{{ .md-button }}" for link in links)
    text = BADGE.sub(lambda _: buttons, as_mkdocs(text, posixpath.dirname(path)))
    return text, resources["outputs"]


# Modules ---------------------------------------------------------------------------------------

def described(thing) -> str:
    """A function or class: signature with the comment behind each parameter, then its docstring."""
    if inspect.isclass(thing) and issubclass(thing, tuple):  # a NamedTuple is its fields
        return f"```python\n{inspect.getsource(thing)}```"
    text = show_doc(thing, renderer=BasicMarkdownRenderer)._repr_markdown_()
    text = text[text.index("```python"):]
    if inspect.isclass(thing):
        text = text.replace("```python\ndef ", "```python\nclass ", 1)
    return text


def module_page(module: ModuleType, notebook: str, title: str) -> str:
    """Everything that a module exports, in its own order."""
    parts = [f"# {module.__name__}", f"> {module.__doc__}",
             f"Built step by step in [{title}](../{notebook.removesuffix('.ipynb')}.md)."]
    constants = []
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            value = " ".join(repr(thing).split())
            constants.append(f"{name} = {value if len(value) <= 80 else type(thing).__name__ + '(…)'}")
            continue
        parts += [f"## {name}", described(thing)]
        for method, body in vars(thing).items() if inspect.isclass(thing) else ():
            body = getattr(body, "__func__", body)
            if inspect.isfunction(body) and not method.startswith("_") and body.__doc__:
                parts += [f"### {name}.{method}", described(body)]
    if constants:
        parts += ["## Constants", "```python\n" + "\n".join(constants) + "\n```"]
    return "\n\n".join(parts) + "\n"


# Hooks of MkDocs -------------------------------------------------------------------------------

def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: the order of the front page's table."""
    groups = {title: [] for title, _ in GROUPS}
    modules = []
    for path, name in reading_order().items():
        title = next(title for title, pattern in GROUPS if re.match(pattern, path))
        groups[title].append({name: path.replace(".ipynb", ".md")})
        if module := module_of(nbformat.read(NBS / path, as_version=4)):
            modules.append({module.removeprefix("mcd_edu."): f"api/{module}.md"})
    config.nav = [{"Home": "index.md"}, *({title: pages} for title, pages in groups.items() if pages),
                  {"API": modules}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of all notebooks and modules, and the pictures that notebooks show."""
    for path, name in {"index.ipynb": "Home", **reading_order()}.items():
        text, pictures = notebook_page(path)
        folder = posixpath.dirname(path)
        files.append(File.generated(config, path.replace(".ipynb", ".md"), content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, posixpath.join(folder, picture), content=content))
        if module := module_of(nbformat.read(NBS / path, as_version=4)):
            page = module_page(import_module(module), path, name)
            files.append(File.generated(config, f"api/{module}.md", content=page))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    def drawn(match: re.Match) -> str:
        formula = BRACKET.sub(r"\1{}[", html.unescape(match[2]))
        return convert(formula, display="block" if match[1] == "div" else "inline")
    return MATH.sub(drawn, content)
