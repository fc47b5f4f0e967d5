# The two commands of the README, and the pieces they are made of. Needs Python >= 3.11 and nothing else.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/quickstart
# One that was cut short while it was made has a python, and no pip that works: it gets one. Nothing else in it goes.
VENV := $(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv

.PHONY: quickstart test lint types proof bench docs clean

quickstart: .venv/.quickstart  ## from text to a talking model, in minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/quickstart.sh $(RUN)

test: .venv/.dev lint types  ## what CI runs
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

docs: .venv/.dev  ## docs/ as a site in site/
	$(BIN)/python -m mkdocs build --strict

bench: .venv/.dev  ## the CPU benchmarks; peers that are installed run beside ours
	$(BIN)/python benchmarks/train_cpu.py
	$(BIN)/python benchmarks/decode_cpu.py
	$(BIN)/python benchmarks/tokenize_throughput.py
	$(BIN)/python benchmarks/start.py

proof: .venv/.dev  ## the long proofs: hundreds of kills and resumes, every layout
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[proof]'
	$(BIN)/python -m pytest --proof

.venv/.quickstart: pyproject.toml constraints.txt
	$(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot,hf]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt
	$(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot,hf,track,serve,dev]'
	touch $@ .venv/.quickstart

clean:  ## what was installed or built; models in runs/ stay
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
