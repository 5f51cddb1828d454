# Every target sets up what it needs, on a fresh machine too; a second call is quick, a changed source is rebuilt.
#   make test                                     in a virtual environment of its own, .venv
#   make test TORCH="torch==2.10.0" VENV=.venv210 with another torch
#   make gpu PYTHON=python3 VENV=none             in an interpreter that has torch, setuptools, pybind11, ninja and pytest
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

.PHONY: help demo test bench gpu lint kernels-check wheel-check clean
.SECONDARY:

help:
	@echo "make demo | test | bench | gpu | lint | kernels-check | wheel-check | clean"

demo: $(STAMPS)/built-cli
	$(PY) -m longattn demo $(ARGS)

# kernels-check runs the ahead-of-time compiles of test_aot.py
test: $(STAMPS)/built-dev
	$(PY) -m pytest tests --ignore=tests/test_aot.py $(ARGS)

kernels-check: $(STAMPS)/built-dev
	$(PY) -m pytest tests/test_aot.py $(ARGS)

bench: $(STAMPS)/built-dev
	$(PY) -m pytest bench -m "not gpu" --benchmark-json=bench/results/$$(date +%F)-cpu.json $(ARGS)

gpu: $(STAMPS)/built-dev
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch sees no NVIDIA GPU")'
	$(PY) -m pytest tests bench -m gpu $(ARGS) --benchmark-json=bench/results/$$(date +%F)-$$($(PY) -c \
	  'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))').json

lint: $(STAMPS)/built-dev
	$(PY) -m ruff check .

wheel-check: $(STAMPS)/built-dev
	$(PY) -m pytest tests/test_build.py -m slow $(ARGS)

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
