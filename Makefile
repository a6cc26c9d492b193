# make demo | test | test-all | examples | onnx | lint | format | docs | models-page
# Everything runs in .venv, which the first target that needs it makes. PYTHON=... picks the interpreter.

PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Each worker takes a run of files, so that what the tests of a file share is made once.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
# LLVM's cheaper passes: a third of the time to compile is saved. `make test-all` and `QUICK= make test` compile
# as users do.
QUICK ?= XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=1"

.PHONY: demo test test-all examples onnx lint format docs models-page clean

demo: .venv/train
	$(BIN)/python -m train.main --config=configs/digits.py:cnn --compare=batch,deconv --seeds=0,1,2 \
		--workdir=runs/demo

test: .venv/test
	$(QUICK) $(PYTEST) -m "not slow"

test-all: .venv/test
	$(PYTEST)

examples: .venv/test
	$(PYTEST) tests/test_examples.py

# In an environment of its own: jax2onnx and the trainer ask for different versions of orbax.
onnx: .venv-onnx/ready
	.venv-onnx/bin/python -m pytest -s tests/onnx_checks.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/pip:
	@test -n "$(PYTHON)" || { echo "netdeconv_jax needs Python 3.11 or newer; set PYTHON=/path/to/it."; exit 1; }
	$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a virtual environment: install its venv package."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@touch $@

.venv/train: .venv/pip pyproject.toml
	@echo "Installing netdeconv_jax and what its trainer needs into .venv (a minute or two, once) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train]"
	@touch $@

.venv/test: .venv/train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train,test]"
	@touch $@

.venv-onnx/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "netdeconv_jax needs Python 3.11 or newer; set PYTHON=/path/to/it."; exit 1; }
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[onnx]" pytest
	@touch $@

docs: .venv/docs
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs
	@echo "build/docs/index.html"

models-page: .venv/test
	$(BIN)/python docs/models_page.py

.venv/docs: .venv/test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train,test,docs]"
	@touch $@

clean:
	rm -rf .venv .venv-onnx runs build dist *.egg-info
