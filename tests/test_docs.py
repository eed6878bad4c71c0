"""The site of all notebooks: every page is there, its links hold, and it needs no other site."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from docs import as_mkdocs, module_of, notebook_page, on_page_content, readable_cells, reading_order
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ["index.ipynb", *reading_order()]


class Loaded(HTMLParser):
    """What a page loads, and what it links to."""
    def __init__(self, text: str):
        super().__init__()
        self.files, self.links, self.formulas = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "source", "iframe"): self.files.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.files.append(values["href"])
        if tag == "a": self.links.append(values.get("href") or "")
        self.formulas += tag == "math"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site; a warning, such as a link to nowhere, is an error."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_the_site_is_whole(site):
    formulas = 0
    for path in NOTEBOOKS:
        text = (site / path.replace(".ipynb", ".html")).read_text(encoding="utf-8")
        page = Loaded(text)
        formulas += page.formulas
        assert not [file for file in page.files if re.match(r"(https?:)?//", file)], path
        assert not re.search(r"arithmatex|colab-badge|#\| (export|hide)|%pip", text), path
        if path != "index.ipynb":
            colab = f"https://colab.research.google.com/github/mcd-edu/mcd_edu/blob/main/nbs/{path}"
            assert colab in page.links, path
    assert formulas > 200
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "mcd_edu").rglob("*.py")
               if path.name not in ("__init__.py", "_modidx.py")}
    assert {f"api/{module}.html" for module in modules} <= pages
    for css in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:", css.read_text(encoding="utf-8")), css

    layers = (site / "api" / "mcd_edu.layers.html").read_text(encoding="utf-8")
    words = " ".join(re.sub(r"<[^>]+>", "", layers).split())
    assert "heads h; each is e = d / h wide" in words  # the comment behind a parameter
    assert "../03_layers.html" in Loaded(layers).links
    found = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "MultiHeadAttention" in found and "What goes wrong without" in found


def test_links_lists_and_code_for_mkdocs():
    page = "See [a](../09_model.ipynb#top), [b](../../LICENSE), [c](https://x.org):\n- one\n- two\n\n`[d](e.ipynb)`\n"
    assert as_mkdocs(page, "train") == (
        "See [a](../09_model.md#top), [b](https://github.com/mcd-edu/mcd_edu/blob/main/LICENSE), [c](https://x.org):"
        "\n\n- one\n- two\n\n`[d](e.ipynb)`\n")
    assert as_mkdocs("[p](../params)", "") == "[p](https://github.com/mcd-edu/mcd_edu/tree/main/params)"
    fenced = "```\nx\n- [y](z.ipynb)\n```"
    assert as_mkdocs(fenced, "") == fenced


def test_directives_decide_what_is_shown():
    book = new_notebook(cells=[new_code_cell("#| default_exp samples.x"), new_code_cell("#| hide\nsecret = 1"),
                               new_code_cell("#| export\nx = 1"), new_code_cell("x"), new_markdown_cell("text")])
    assert module_of(book) == "mcd_edu.samples.x"
    shown = [(cell.source, cell.metadata.get("title")) for cell in readable_cells(book)]
    assert shown == [("x = 1", "mcd_edu/samples/x.py"), ("x", None), ("text", None)]


def test_pictures_come_along():
    text, pictures = notebook_page("03_layers.ipynb")
    assert pictures and all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert all(f"({name})" in text for name in pictures)


@pytest.mark.parametrize("formula", [
    r"q^\ell = q^{\ell-1} + W_\ell [h_v ; h_a]",
    r"\begin{cases} [a] & b \\ [c] & d \end{cases}",
])
def test_formulas_become_mathml(formula):
    shown = on_page_content(f'<div class="arithmatex">\\[{formula}\\]</div>', None, None, None)
    assert shown.startswith("<math") and 'display="block"' in shown and "arithmatex" not in shown
