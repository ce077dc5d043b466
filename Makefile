# Everything runs in the project's own .venv, made by `make venv` and made again when its inputs change.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY     := .venv/bin/python
STAMP  := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv test check soak speedrun lint format docs demo clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## install the package and its developer tools into .venv

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,notebooks]' -c constraints.txt
	@touch $@

test: $(STAMP)  ## run all tests (pass options as ARGS="-k vq")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

# Each part alone, for one that failed; `make -k check` goes on after a failure.
CHECKS := check-long check-soak check-lowest check-docs check-page
.PHONY: $(CHECKS)

check: $(CHECKS)  ## what `make test` leaves out: launchers, kills at every step, a short soak, lowest versions

check-long: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m long $(ARGS)

check-soak: .venv/.data
	rm -rf outputs/soak
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.soak --attacks 8 --updates 60 --folder outputs/soak

check-lowest: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) tools/lowest_versions.py -- -n 2

check-docs: $(STAMP)
	$(PY) tools/docs_commands.py

check-page: $(STAMP)
	bash tools/browser.sh

# The soak of Hugging Face data needs their package, which nothing else here does.
.venv/.data: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[data]' -c constraints.txt
	@touch $@

soak: .venv/.data  ## attack runs of every kind 20 times each, compare their ends with uninterrupted runs' bit for bit
	rm -rf outputs/soak
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.soak --attacks 20 --folder outputs/soak

speedrun: $(STAMP)  ## train to a stated distance in the fewest CPU-seconds: DATA=folder NET=network [ENTRY=baseline]
	OMP_NUM_THREADS=1 $(PY) benchmarks/speedrun.py --data $(DATA) --network $(NET) --entry $(or $(ENTRY),baseline) --folder outputs/speedrun-$(or $(ENTRY),baseline)

lint: $(STAMP)  ## ruff, pyright and the order of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	$(PY) tools/import_order.py

format: $(STAMP)  ## rewrite files as `make lint` wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: .venv/.docs  ## build the site into outputs/site; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

.venv/.docs: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## train, sample and measure a small model on coloured shapes
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo/run.sh

clean:  ## remove caches and build outputs, keep .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
