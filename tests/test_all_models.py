"""The notebook with one table of all models runs without result files, and shows those that are there."""

from pathlib import Path

import pytest
from notebooks import read_parameters, run_notebook

from mcd_edu.experiments import run_one
from mcd_edu.training import make_toy_set
from mcd_edu.variants import VARIANTS, Run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "experiments" / "all_models.ipynb"
SETTINGS = {"music_avqa": {"clips": 4, "epochs": 1}}


@pytest.fixture
def show(tmp_path, monkeypatch):
    """Run the notebook on a toy set in a temporary folder; all that it shows, as one text."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    make_toy_set(tmp_path / "data" / "music_avqa", num_train=6, num_val=2, num_test=5, per_video=4)

    def show(**options) -> str:
        folders = {name: str(tmp_path / name) for name in ("data", "results", "work")}
        found = run_notebook(NOTEBOOK, tmp_path / "out.ipynb", {**folders, "seeds": 1, "settings": SETTINGS, **options}, 200)
        outputs = [output for cell in found.cells for output in cell.get("outputs", [])]
        return "\n".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)
    return show


def test_it_says_what_is_missing(show, tmp_path):
    text = show()
    number = sum("music_avqa" in variant.datasets for variant in VARIANTS.values())
    assert f"{number} runs, 0 of them done" in text and "MCD-clips4-seed0" in text and "make tables" in text
    assert not (tmp_path / "results").exists() and not (tmp_path / "work").exists()


def test_it_shows_what_is_there_and_no_more(show, tmp_path):
    for run in (Run("AVST-style", clips=4, training={"epochs": 1}), Run("MCD", clips=4, training={"epochs": 1}),
                Run("MCD", 0, training={"epochs": 1}), Run("alignment", 7, 4, training={"epochs": 1})):
        run_one(run, tmp_path / "data" / "music_avqa", tmp_path / "results", tmp_path / "work", show_progress=False)
    text = show()
    assert "2 of them done" in text and "Missing: late_fusion-clips4-seed0" in text
    for line in ("\n| MCD | 1 |", "\n| AVST-style | 1 |", "\n| question prior | ", "music_avqa, all questions: MCD above"):
        assert line in text
    assert "| alignment |" not in text


def test_the_parameters_that_train_everything():
    assert read_parameters(ROOT / "params" / "all_models.yaml") == {"train_missing": True}
