# Every target sets up what it needs, on a fresh machine too; a second call is quick, a changed source is rebuilt.
#   make demo             attention compared and a small Transformer trained, about two minutes; ARGS="--length 8192"
#   make test             everything that needs no GPU, in a virtual environment of its own (.venv)
#   make bench            micro-benchmarks, one JSON in bench/results/
#   make compare          linear attention beside other packages, one JSON in bench/results/
#   make compare-favor    the same for FAVOR+
#   make compare-lsh      the same for LSH attention, and dense attention of the same engine beside torch's
#   make compare-toeplitz  linear attention with relative positions beside torch's ways to write it
#   make compare-reversible  reversible layers beside plain autograd, checkpointing and other packages
#   make compare-reformer  a training step of the Reformer beside other packages
#   make compare-modules  layers, encoders and "auto" beside torch's
#   make gpu              tests and benchmarks of a machine with an NVIDIA GPU, one JSON in bench/results/
#   make lint             ruff
#   make kernels-check    every CUDA and Triton kernel compiled ahead of time
#   make wheel-check      sdist and wheel built and installed into empty environments
#   make clean            what was built, not the virtual environment
# Another torch:                                make test TORCH="torch==2.10.0" VENV=.venv-2.10
# An interpreter with everything, no downloads: make gpu PYTHON=python3 VENV=none
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

BUILD_NEEDS := "setuptools>=77" "pybind11>=2.13" ninja
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
tag = $(shell echo '$(1)' | tr -c 'A-Za-z0-9.\n' _)

ifeq ($(VENV),none)
PY := $(PYTHON)
STAMPS := build/stamps-$(call tag,$(PYTHON))
else
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
endif
PIP := $(PY) -m pip --disable-pip-version-check --quiet
TORCH_READY := $(STAMPS)/$(call tag,$(TORCH))

COMPARISONS := compare compare-favor compare-lsh compare-toeplitz compare-reversible compare-reformer compare-modules
.PHONY: help demo test bench $(COMPARISONS) gpu lint kernels-check wheel-check clean
.SECONDARY:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMPS)/built-cli
	$(PY) -m longattn demo $(ARGS)

# tests hold torch to one thread and compilers have one: each core takes a stretch of them, where pytest-xdist is there to deal them out
PARALLEL = $(shell $(PY) -c "import psutil, xdist" 2>/dev/null && \
	echo --numprocesses logical --maxprocesses 8 --dist worksteal)

# kernels-check runs the ahead-of-time compiles of test_aot.py
test: $(STAMPS)/built-dev
	$(PY) -m pytest tests --ignore=tests/test_aot.py $(PARALLEL) $(ARGS)

kernels-check: $(STAMPS)/built-dev
	$(PY) -m pytest tests/test_aot.py $(PARALLEL) $(ARGS)

bench: $(STAMPS)/built-dev
	$(PY) -m pytest bench --benchmark-json=bench/results/$$(date +%F)-micro.json $(ARGS)

compare: $(STAMPS)/built-dev
	$(PY) bench/compare_linear.py $(ARGS)

compare-favor: $(STAMPS)/built-dev
	$(PY) bench/compare_favor.py $(ARGS)

compare-lsh: $(STAMPS)/built-dev
	$(PY) bench/compare_lsh.py $(ARGS)

compare-toeplitz: $(STAMPS)/built-dev
	$(PY) bench/compare_toeplitz.py $(ARGS)

compare-reversible: $(STAMPS)/built-dev
	$(PY) bench/compare_reversible.py $(ARGS)

compare-reformer: $(STAMPS)/built-dev
	$(PY) bench/compare_reformer.py $(ARGS)

compare-modules: $(STAMPS)/built-dev
	$(PY) bench/compare_modules.py $(ARGS)

gpu: $(STAMPS)/built-dev
	$(PY) bench/gpu.py $(ARGS)

lint: $(STAMPS)/built-dev
	$(PY) -m ruff check .

wheel-check: $(STAMPS)/built-dev
	$(PY) -m pytest tests/test_build.py -m slow $(ARGS)

# the tests also run the widest kernels where the registers are narrow
$(STAMPS)/built-dev: export LONGATTN_EMULATE = 1

clean:
	rm -rf build dist *.egg-info longattn/_C.* longattn/_build.json $(STAMPS)/built-*
	find longattn kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

ifeq ($(VENV),none)
# nothing is downloaded and nothing but longattn itself is installed
$(STAMPS)/built-%: $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	$(PIP) install --no-index --no-deps --no-build-isolation --editable .
	mkdir -p $(STAMPS) && touch $@
else
$(TORCH_READY):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	mkdir -p $(STAMPS) && rm -f $(STAMPS)/* && touch $@

$(STAMPS)/tools: $(TORCH_READY)
	$(PIP) install $(BUILD_NEEDS)
	touch $@

# compiled before it is installed, so that progress and errors show as they come
$(STAMPS)/built-%: $(STAMPS)/tools $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	$(PIP) install --no-build-isolation --editable ".[$*]" "$(TORCH)"
	touch $@
endif
