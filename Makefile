# `make quickstart` trains a teacher and distills a DeiT from it. `make test` is the fast tier, `make test-all` everything.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
# A worker takes whole files, in their order, so that module fixtures are built once.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
PLOT := $(BIN)/python -m tools.plot_runs --x minutes --keys test_acc1 --reference "186,78,GPU study"
README_RUNS := deit deit_hard_erasing evit_hard_erasing
FAST := -m "not process and not slurm and not slow and not compile"

.PHONY: quickstart study lint test test-all test-oldest clean

$(VENV)/.installed: requirements.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python main.py @recipes/quickstart_teacher.args
	$(BIN)/python main.py @recipes/quickstart.args
	$(BIN)/python -m tools.summarize output/quickstart_teacher output/quickstart

# The figures and summaries of docs/study.md and README, from the logs of the two machines.
study: $(VENV)/.installed
	for folder in results/study results/study_avx512; do \
		$(PLOT) $$folder/*/ --output $$folder/accuracy.png && \
		$(BIN)/python -m tools.summarize $$folder/*/ --sort folder --format json > $$folder/summary.json && \
		$(BIN)/python -m tools.summarize $$folder/*/ --sort folder || exit 1; \
	done
	$(PLOT) $(README_RUNS:%=results/study_avx512/%) --output results/study_avx512/readme.png

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(PYTEST) $(FAST)

test-all: lint
	$(PYTEST)

# The oldest supported versions, in a virtual environment of their own; more than the fast tier.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt FAST='-m "not process and not slurm and not compile"' test

clean:
	rm -rf .venv .venv-oldest
