# Every target can be run again; what is already done is skipped.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

DEMO_PROMPT ?= a red ball moving left on a black background
DEMO_VIDEO  ?= demo.mp4

.DEFAULT_GOAL := help
.PHONY: help venv demo test bench lint native clean

help:
	@echo "make demo    install into $(VENV), then make $(DEMO_VIDEO) from a sentence"
	@echo "make test    run the tests"
	@echo "make bench   run the benchmarks"
	@echo "make lint    ruff and mypy"
	@echo "make native  build the C library and run its tests (CMake, ninja, a C++17 compiler)"
	@echo "make venv    only the environment: developer tools and an editable install"
	@echo "make clean   remove what was built; keeps $(VENV)"

venv: $(STAMP)

# An environment that is already there is adopted: only its existence counts, not its age.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What the native core is built from counts too: an edit there rebuilds it, and only what the edit touches.
CORE := CMakeLists.txt $(wildcard cmake/*.cmake) $(shell find csrc -type f -not -path 'csrc/tests/*')

$(STAMP): pyproject.toml setup.py constraints.txt $(CORE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/lumiere-fast generate "$(DEMO_PROMPT)" -o $(DEMO_VIDEO) --overwrite
	@echo "The video is $(abspath $(DEMO_VIDEO))"

# One thread a worker: the tests' tensors are small, and more threads than cores slow one another down. A file
# runs in one worker, since its tests share what one of them built; tests/conftest.py has the long ones go first.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# cmake and ninja may be the system's or, after `make venv`, the environment's.
native: export PATH := $(abspath $(BIN)):$(PATH)
native:
	cmake -S . -B build/native -G Ninja -DLF_WERROR=ON
	cmake --build build/native
	ctest --test-dir build/native --output-on-failure

# Without the stamp, since the next `make` has to build the native core again.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f lumiere_fast/_native.* lumiere_fast/_native_build.json $(STAMP)
	find lumiere_fast kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
