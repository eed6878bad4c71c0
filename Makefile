PYTHON    ?= python3
VENV      ?= .venv
TORCH     ?= torch==2.13.0
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NOTEBOOKS  = $(shell find nbs -name '*.ipynb' -not -path '*/.*' -not -path 'nbs/assignments/*' | sort)

DATA       ?= data_samples/music_avqa
DEMO       ?= runs/demo
CHECKPOINT ?= $(DEMO)/checkpoint
CLIP       ?= $(DATA)/videos/00002611.mp4
QUESTIONS  ?= "How many instruments are sounding in the video?" "Is there a voiceover?" "Is the accordion more rhythmic than the tuba?" "What is the instrument on the left of tuba?"

NOTEBOOK    = PLOTLY_RENDERER=plotly_mimetype+png $(BIN)/python tools/notebooks.py run

WORKERS     ?= 2
DEVICE      ?= cpu
PYTEST_ARGS ?=
# a machine may stand still for minutes: what ran out of time, and that alone, is run once more
AGAIN        = --reruns 1 --only-rerun 'Timeout(Error|Expired)'
FUZZED       := annotations features media questions
FUZZ_SECONDS ?= 3600
# nbdev leaves one blank line after the imports of a module, and none after `from __future__`
EXPORTED_IMPORTS := --config lint.isort.lines-after-imports=1 --config 'lint.isort.no-lines-before=["standard-library"]'

.PHONY: help env demo test lint lab export notebooks readme docs samples encoders weights results tables search claims bench long fuzz

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(INSTALLED)  ## make .venv with the package and all it needs

$(INSTALLED): settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: env  ## train on the shipped clips, then ask about one of them
	$(NOTEBOOK) nbs/train/music_avqa.ipynb $(DEMO)/music_avqa.ipynb -f params/demo.yaml
	$(BIN)/mcd-edu answer $(CLIP) $(QUESTIONS) --checkpoint $(CHECKPOINT)

test: lint  ## run every check: lint, tests, each notebook from a fresh kernel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(AGAIN) $(PYTEST_ARGS)

long: env  ## the checks that `make test` keeps short, at full length: kills, an hour of film, hours of silence
	KILLS=20 LONG_MINUTES=60 SILENT_HOURS=8 $(BIN)/python -m pytest tests/test_kill.py tests/test_long_video.py tests/test_untrusted.py

fuzz: $(FUZZED:%=fuzz-%)  ## hand each reader spoilt bytes for an hour (-j 2: two at a time; Linux)

fuzz-%: $(VENV)/.atheris
	$(BIN)/python tools/fuzz.py $* --seconds $(FUZZ_SECONDS)
	grep -q '"surprises": {}' results/fuzz/$*.json

$(VENV)/.atheris: $(INSTALLED)
	$(BIN)/python -m pip install --quiet atheris
	touch $@

lint: env  ## check the code, and that notebooks, package and README agree
	$(BIN)/ruff check
	$(BIN)/ruff check --isolated --select I --line-length 130 --exclude '*.ipynb' $(EXPORTED_IMPORTS) mcd_edu
	$(BIN)/python tools/notebooks.py check

lab: env  ## open the notebooks
	$(BIN)/jupyter lab nbs

export: env  ## write the package and the README from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python -c "from pathlib import Path; from mcd_edu.assignments import build_course; build_course(Path('nbs/assignments'))"
	$(BIN)/python tools/notebooks.py readme

notebooks: env  ## execute all notebooks in place, keeping their outputs
	PLOTLY_RENDERER=plotly_mimetype+png $(BIN)/jupyter nbconvert --to notebook --execute --inplace $(NOTEBOOKS)
	$(BIN)/nbdev_clean

readme: env  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/notebooks.py readme

docs: env  ## build the site of all notebooks into _docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

samples: env  ## make the sample clips anew, where they are missing
	$(BIN)/mcd-edu samples --out $(DATA)

encoders: env  ## train the shipped encoders anew
	$(NOTEBOOK) nbs/train/encoders.ipynb runs/encoders/encoders.ipynb -f params/encoders.yaml

weights: env  ## train the shipped model anew
	$(NOTEBOOK) nbs/train/music_avqa.ipynb runs/weights/music_avqa.ipynb -f params/sample/music_avqa.yaml
	$(BIN)/python -c "from mcd_edu.hub import halve; halve('mcd_edu/weights/music_avqa')"

bench: env  ## measure speed and memory on this machine, then show it
	$(BIN)/python benchmarks/model.py --bf16 --device $(DEVICE)
	$(NOTEBOOK) nbs/experiments/speed.ipynb runs/bench/speed.ipynb -f params/bench.yaml

tables: env  ## run the missing trainings of the table of all models, then show it
	$(NOTEBOOK) nbs/experiments/all_models.ipynb runs/tables/all_models.ipynb -f params/all_models.yaml

search: env  ## run the missing trainings of the search for defaults, on val, then show it
	$(NOTEBOOK) nbs/experiments/search.ipynb runs/search/search.ipynb -f params/search.yaml

claims: env  ## run the missing trainings of the claims table, then show it
	$(NOTEBOOK) nbs/experiments/claims.ipynb runs/claims/claims.ipynb -f params/claims.yaml

results: env  ## run the trainings whose result files are missing, then show all results
	$(NOTEBOOK) nbs/experiments/sample_results.ipynb runs/results/sample_results.ipynb -f params/results.yaml
