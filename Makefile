PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# One stamp a set of extras: pip runs only when pyproject.toml or constraints.txt changed.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

demo: $(VENV)/.models  ## compile ResNet-18 and MiniLM, check the numbers, time them beside PyTorch
	$(BIN)/python examples/demo.py

test: $(VENV)/.models,test,cuda  ## run the tests
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.lint build/types/graphwright  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.models,peers  ## compare with eager, inductor, onnxruntime and openvino
	$(BIN)/python benchmarks/models.py

bench-arm: $(VENV)/.models  ## instructions and modelled cycles of ARM code (Debian: qemu-user llvm-19)
	$(BIN)/python benchmarks/arm.py

fuzz: $(VENV)/.models,test  ## 20,000 random models through the passes and the compiler; goes on where it stopped
	$(BIN)/python tests/fuzz.py

mutate: $(VENV)/.models,test  ## remove every guard of every pass, one at a time: a test has to fail
	$(BIN)/python tests/mutate_guards.py

# mypy finds the package by its name through this link: the repository root is the package.
build/types/graphwright:
	mkdir -p build/types
	ln -sfn ../.. $@

.PHONY: help demo test lint bench bench-arm fuzz mutate
.PRECIOUS: $(VENV)/.%
