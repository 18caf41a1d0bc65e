# `make demo` and `make test` each work alone on a fresh machine with Python 3.11, gcc and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Everything but torch is pinned by requirements.lock. A machine without an NVIDIA driver gets the CPU build of torch
# that constraints-cpu.txt pins; with a driver, pip chooses the build.
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
PINS   := -c requirements.lock $(if $(GPU),,-c constraints-cpu.txt)
LOCKS  := requirements.lock constraints-cpu.txt
WORKERS ?= 2

.PHONY: demo test lint docs env env-dev bench gpu slurm-up slurm-down lock clean

demo: $(VENV)/.runtime
	$(BIN)/hpc-neuro demo out=runs/demo $(ARGS)

test: lint
	OMP_NUM_THREADS=1 slurm/dev_cluster/with.sh $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, in build/docs; open build/docs/index.html
docs: $(VENV)/.dev
	$(BIN)/python -m tools.write_docs --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	for tool in cache infer links metrics pyramid student tracing train tubular zero; do echo "== $$tool"; $(BIN)/python -m tools.bench.$$tool || exit 1; done

# what only a machine with an NVIDIA GPU can show: the tests of its kernels, then its benchmarks
gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python -m tools.bench.tubular --device cuda --repeats 10
	$(BIN)/python -m tools.bench.tune_tubular
	$(BIN)/python -m tools.bench.student --device cuda --size base --crop 96 96 96 --batch 16
	$(BIN)/python -m tools.bench.train --ranks 1 --size base --crop 96 96 96 --batch 16

# a real one-machine Slurm for the tests marked `slurm`; `make test` brings it up and ends it by itself
slurm-up:
	slurm/dev_cluster/up.sh
slurm-down:
	slurm/dev_cluster/down.sh

env: $(VENV)/.runtime
env-dev: $(VENV)/.dev

# torch first: a package resolved before it would pull a build of several GB; DeepSpeed must not compile its CUDA ops
$(VENV)/.torch: $(LOCKS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(PINS) torch
	touch $@

$(VENV)/.runtime: $(VENV)/.torch setup.py
	DS_BUILD_OPS=0 $(BIN)/pip install -q --disable-pip-version-check $(PINS) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime setup.py
	DS_BUILD_OPS=0 $(BIN)/pip install -q --disable-pip-version-check $(PINS) -e '.[dev]'
	touch $@

# Resolve all dependencies anew, without the old lock, and write what was installed. Run `make test` afterwards.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q --disable-pip-version-check -c constraints-cpu.txt torch
	DS_BUILD_OPS=0 build/lock/bin/pip install -q --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	head -n 1 requirements.lock > requirements.lock.new
	build/lock/bin/pip freeze --exclude-editable | grep -v -E '^(torch|torchvision|triton)==' >> requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf build/lock

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache
