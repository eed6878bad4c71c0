PYTHON    ?= python3
VENV      ?= .venv
TORCH     ?= torch==2.13.0
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NOTEBOOKS  = $(shell find nbs -name '*.ipynb' -not -path '*/.*' -not -path 'nbs/assignments/*' | sort)

DATA       ?= data_samples/music_avqa
DEMO       ?= runs/demo
CHECKPOINT ?= $(DEMO)/checkpoint
CLIP       ?= $(firstword $(sort $(wildcard $(DATA)/videos/*.mp4)))
QUESTIONS  ?= "How many instruments are sounding in the video?" "Is the violin in the video always playing?"

ENCODERS   ?= mcd_edu/weights/encoders

WORKERS     ?= 2
PYTEST_ARGS ?=
# nbdev leaves one blank line after the imports of a module, and none after `from __future__`
EXPORTED_IMPORTS := --config lint.isort.lines-after-imports=1 --config 'lint.isort.no-lines-before=["standard-library"]'

.PHONY: help env demo test lint lab export notebooks readme samples

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(INSTALLED)  ## make .venv with the package and all it needs

$(INSTALLED): settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: env  ## train on the shipped clips, then ask two questions about one of them
	PLOTLY_RENDERER=plotly_mimetype+png $(BIN)/python tools/notebooks.py run nbs/train/music_avqa.ipynb $(DEMO)/music_avqa.ipynb -f params/demo.yaml
	$(BIN)/mcd-edu answer $(CLIP) $(QUESTIONS) --checkpoint $(CHECKPOINT)

test: lint  ## run every check: lint, tests, each notebook from a fresh kernel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: env  ## check the code, and that notebooks, package and README agree
	$(BIN)/ruff check
	$(BIN)/ruff check --isolated --select I --line-length 100 $(EXPORTED_IMPORTS) mcd_edu
	$(BIN)/python tools/notebooks.py check

lab: env  ## open the notebooks
	$(BIN)/jupyter lab nbs

export: env  ## write the package and the README from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/notebooks.py readme

notebooks: env  ## execute all notebooks in place, keeping their outputs
	PLOTLY_RENDERER=plotly_mimetype+png $(BIN)/jupyter nbconvert --to notebook --execute --inplace $(NOTEBOOKS)
	$(BIN)/nbdev_clean

readme: env  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/notebooks.py readme

samples: env  ## make the sample clips anew
	$(BIN)/python -c "from mcd_edu.samples.sample_set import build_sample_set; build_sample_set('$(DATA)', '$(ENCODERS)')"
