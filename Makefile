# Everything happens in $(VENV). `make test TORCH=torch==2.13.0` uses another torch. FUSED_EMA_CUDA and FUSED_EMA_EXT
# (see README.md) are respected.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch
ARGS ?=
OUT ?= build/bench

PY := $(VENV)/bin/python
BUILD_SOURCES := $(wildcard csrc/*) setup.py pyproject.toml fused_ema/_version.py $(wildcard fused_ema/_build/*.py)

# The name of a stamp says what it was made for. The checkout holds one extension at a time, and its stamp lies next to
# it, so that an environment rebuilds it instead of using that of another environment. The .json is written with the
# extension: if it is newer than the stamp, something else has built the extension.
key = $(firstword $(shell echo '$(1)' | cksum))
TORCH_STAMP := $(VENV)/.torch-$(call key,$(TORCH))
BUILD_STAMP := build/.made-$(call key,$(VENV) $(TORCH) $(FUSED_EMA_EXT) $(FUSED_EMA_CUDA) $(TORCH_CUDA_ARCH_LIST))

.PHONY: help setup demo test test-all test-long ci-full sanitize sanitize-plans soak mutants coverage fuzz fuzz-sources fuzz-plans lint docs bench audit clean
.PHONY: gpu gpu-build gpu-test gpu-sanitize gpu-bench gpu-sweep gpu-counters

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

setup: $(BUILD_STAMP)  ## environment and extension, for the torch and the compilers that are there

demo: setup  ## train a small network with averaged weights: accuracy, and the cost of the update
	@$(PY) examples/demo.py $(ARGS)

# One process per core, each with one OpenMP thread that does not spin; more threads would only wait for each other.
# Tests that need several threads set their number themselves.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q tests -n auto --maxprocesses 16 --dist worksteal
test: setup  ## the tests that are not marked slow, in about five minutes; options for pytest in ARGS
	@$(PYTEST) -m 'not slow' $(ARGS)

test-all: setup  ## all tests; options for pytest in ARGS
	@$(PYTEST) $(ARGS)

tests = $(foreach name,$(1),$(or $(shell find tests -name 'test_$(name).py'),tests/test_$(name).py))
test-long: setup  ## 100,000 random cases, 10,000 sequences of changes, 2000 processes killed while saving: an hour
	@$(PY) -m pytest -q $(call tests,differential stale_plans) $(call tests,files)::test_killed_at_any_moment \
	    --hypothesis-profile=long $(ARGS)

ci-full:  ## everything that CI runs: .ci/run, the slow tests, the oldest PyTorch, sanitizers, fuzzing, site, packaging
	@.ci/full

sanitize: setup sanitize-plans  ## plans, the extension and concurrent updates under the sanitizers
	@$(PY) tests/long/instrumented.py address -m 'not slow' -k 'not sharded and not memory_runs_out' \
	    tests/pairs tests/plan tests/runners $(call tests,ema ema_swap)
	@# OpenMP's own threads are not instrumented, so that a parallel loop of theirs reads as a race.
	@$(PY) tests/long/instrumented.py thread -k 'not delay_each_other' tests/plan/test_threads.py

SANITIZERS := -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_PLANS := tests/long/fuzz/fuzz_plans.cpp -Itests -Itests/grid
sanitize-plans:  ## a million random plans over the emulated grid, under the address and undefined-behaviour sanitizers
	@mkdir -p build && $(CXX) $(SANITIZERS) $(FUZZ_PLANS) -o build/fuzz_plans && build/fuzz_plans $(or $(PLANS),1000000)

# ARGS takes libFuzzer's options. Checkpoints get a third of the runs, because each of these reads and writes files.
RUNS ?= 9000
FUZZ_CXX ?= clang++
fuzz: fuzz-sources fuzz-plans  ## RUNS hostile sources, files and plans, guided by coverage

fuzz-sources: setup  ## fuzz what Python reads, with atheris
	@$(PY) -c 'import atheris' 2>/dev/null || $(PY) -m pip install -q atheris
	@$(PY) tests/long/fuzz/fuzz_pairing.py -runs=$(RUNS) -seed=1 -rss_limit_mb=8192 -artifact_prefix=build/ $(ARGS)
	@$(PY) tests/long/fuzz/fuzz_checkpoints.py -runs=$$(($(RUNS) / 3)) -seed=1 -rss_limit_mb=8192 -artifact_prefix=build/ $(ARGS)

fuzz-plans:  ## fuzz plans, which needs clang with libFuzzer
	@mkdir -p build && $(FUZZ_CXX) $(SANITIZERS) -fsanitize=fuzzer -DFUSED_EMA_LIBFUZZER $(FUZZ_PLANS) -o build/fuzz_plans_libfuzzer
	@build/fuzz_plans_libfuzzer -runs=$$(($(RUNS) * 10)) -seed=1 -rss_limit_mb=8192 -artifact_prefix=build/ $(ARGS)

soak: setup  ## a million updates of models that change: ten minutes
	@$(PY) tests/long/soak.py $(ARGS)

coverage: setup  ## branches that the tests reach: 95% of the package, 90% of csrc; half an hour; needs clang and llvm-cov
	@$(PY) -m pip install -q coverage
	@$(PY) tests/long/instrumented.py coverage tests

mutants: setup  ## put faults into a copy, one by one, and check that the tests notice: two hours; parts of names in ARGS
	@$(PY) tests/long/mutants/run.py $(ARGS)

lint: setup  ## ruff, clang-format and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/* tests/*.cpp tests/*/*.cpp tests/*/*/*.cpp benchmarks/*.cpp benchmarks/*.cu)
	$(PY) -m mypy

# The site reads the sources, and so needs neither torch nor the extension. Links out of docs/ hold there as they do in
# the repository, whose layout build/pages repeats.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md docs examples benchmarks fused_ema
docs:  ## the pages and the API as a site, build/site/index.html; broken links and anchors are errors
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import material, mkdocstrings_handlers.python, ruff' 2>/dev/null || \
	    sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d , | xargs $(PY) -m pip install -q --disable-pip-version-check
	@rm -rf build/pages && mkdir -p build/pages && ln -s $(addprefix $(CURDIR)/,$(PAGES)) build/pages
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

bench: setup  ## measure the update against what others do: numbers and plots in OUT; options in ARGS
	@mkdir -p $(OUT)
	@$(PY) benchmarks/bench_update.py --json $(OUT)/results.json --csv $(OUT)/results.csv $(ARGS)
	@$(PY) benchmarks/plot.py $(OUT)/results.json

# On a machine with an NVIDIA GPU, in the environment that is there: nothing is installed. FUSED_EMA_GPU=1 makes a test
# that misses the GPU fail.
GPU_NEEDS := torch ninja setuptools pybind11 pytest hypothesis numpy rich matplotlib
GPU = PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} FUSED_EMA_EXT=1 FUSED_EMA_CUDA=1 FUSED_EMA_GPU=1
XDIST = $$($(PYTHON) -c 'import xdist; print("-n $(1)")' 2>/dev/null)
IN_TEN_MINUTES := --seconds 1 --parts models,averages,device
gpu: gpu-build  ## tests.txt, sanitizer.txt, results.json and plots in OUT, each even if the others fail
	@failed=; $(MAKE) -o gpu-build gpu-test || failed="$$failed gpu-test"; \
	$(MAKE) -o gpu-build gpu-sanitize || failed="$$failed gpu-sanitize"; \
	$(MAKE) -o gpu-build gpu-bench ARGS='$(IN_TEN_MINUTES)' || failed="$$failed gpu-bench"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

gpu-build:  ## the extension, in place, for the GPU that is there
	@mkdir -p $(OUT)
	@for name in $(GPU_NEEDS); do $(PYTHON) -c "import $$name" || exit 1; done
	@arch=$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1; \
	export TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$arch}; \
	$(GPU) $(PYTHON) -m fused_ema build --into fused_ema >$(OUT)/build.txt 2>&1 || { cat $(OUT)/build.txt; exit 1; }

# The first run has the tests on the GPU, file by file in few processes, because some measure how host and device
# overlap, and the tests of tests/hazards.py, so that its table is complete. Without pytest-xdist there is one process.
# With ARGS, one of the two runs may have no test (status 5).
GPU_PYTEST = $(GPU) OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(PYTHON) -m pytest -v tests
gpu-test: gpu-build  ## the whole test suite; options for pytest in ARGS
	@set -o pipefail; { $(GPU_PYTEST) -m 'gpu or hazard' $(call XDIST,4 --dist loadfile) $(ARGS); gpu=$$?; \
	$(GPU_PYTEST) -m 'not gpu and not hazard' $(call XDIST,auto) $(ARGS); [[ "$$gpu $$?" =~ ^(0 0|0 5|5 0)$$ ]]; } \
	    2>&1 | tee $(OUT)/tests.txt | grep -E '^(=|FAILED|ERROR|SKIPPED|[ 0-9][0-9] .* good: |[0-9]+ of )'

gpu-sanitize: gpu-build  ## compute-sanitizer's four tools on a short program over the kernel's cases
	@$(GPU) PYTHON=$(PYTHON) tests/gpu/sanitize_gpu.sh $(OUT)/sanitizer.txt

gpu-bench: gpu-build  ## the benchmark and its plots; options in ARGS
	@$(GPU) $(PYTHON) benchmarks/bench_update.py --json $(OUT)/results.json --csv $(OUT)/results.csv $(ARGS)
	@$(GPU) $(PYTHON) benchmarks/plot.py $(OUT)/results.json

gpu-sweep: gpu-build  ## time variants of the kernel
	@$(GPU) $(PYTHON) benchmarks/bench_sweep.py --json $(OUT)/sweep.json $(ARGS)

SECTIONS := SpeedOfLight MemoryWorkloadAnalysis Occupancy WarpStateStats SchedulerStats LaunchStats
COUNTED := 'GPT-2 small, float32←float32' 'Llama 1.1B, float32←bfloat16' 'Llama 1.1B, bfloat16←bfloat16' ResNet-50
gpu-counters: gpu-build  ## what the hardware counters say of the kernel: counters.txt in OUT
	@$(GPU) ncu --clock-control none $(addprefix --section ,$(SECTIONS)) -k regex:ema_kernel \
	    $(PYTHON) benchmarks/counters.py $(COUNTED) >$(OUT)/counters.txt 2>&1 || { tail -n 5 $(OUT)/counters.txt; exit 1; }

# cuobjdump and nvdisasm come with the CUDA toolkit or from the registry.
audit: setup  ## check the machine code of the CUDA kernels; needs no GPU
	@command -v cuobjdump nvdisasm >/dev/null || $(PY) -m pip install -q nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	@PATH="$$PATH$$(printf ':%s' $(abspath $(VENV))/lib/python*/site-packages/nvidia/*/bin)" $(PY) tests/grid/audit_sass.py

clean:  ## remove everything built except the environment
	rm -rf build dist *.egg-info fused_ema/_C*.so fused_ema/_C*.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# Without a GPU, PyTorch's build for the CPU does as well, and is a tenth of the download. Registries have it as a version
# "+cpu", if they have it.
NO_CUDA_HERE = [ "$$(uname)" = Linux -a '$(FUSED_EMA_CUDA)' != 1 -a ! -e /dev/nvidiactl ] && ! command -v nvidia-smi >/dev/null
$(TORCH_STAMP):
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.torch-*
	@torch='$(TORCH)'; \
	if [ '$(origin TORCH)' = file ] && $(NO_CUDA_HERE); then \
	    cpu=$$($(PY) -m pip index versions torch 2>/dev/null | grep -o '[0-9.]*+cpu' | head -n 1); \
	    if [ "$$cpu" ]; then \
	        torch="torch==$$cpu"; \
	        echo "No NVIDIA GPU here, so this takes a build of PyTorch for the CPU; TORCH=torch takes the newest of all."; \
	    else \
	        echo "No NVIDIA GPU here, but this PyTorch may be a build for CUDA, of gigabytes. For one for the CPU, stop"; \
	        echo "this, and type it again after PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"; \
	    fi; \
	fi; \
	echo "$(VENV): installing $$torch and build tools"; \
	$(PY) -m pip install -q --disable-pip-version-check --upgrade "$$torch" ninja 'setuptools>=77'
	@touch $@

# A failed compilation is an error, unless there is no compiler or the environment says otherwise.
$(BUILD_STAMP): $(TORCH_STAMP) $(BUILD_SOURCES) $(wildcard fused_ema/_C*.json)
	@echo "$(VENV): installing fused_ema, its tools, and the extension for this machine (log: build/make.log)"
	@mkdir -p build && rm -f build/.made-*
	@ext="$(FUSED_EMA_EXT)"; command -v $${CXX:-c++} >/dev/null && ext="$${ext:-1}"; \
	FUSED_EMA_EXT=$$ext $(PY) -m pip install -v --disable-pip-version-check --no-build-isolation \
	    -e '.[test,demo,bench,dev]' >build/make.log 2>&1 || { cat build/make.log; exit 1; }
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps timm ultralytics mmengine  # two of them would bring another torch or OpenCV
	@sed -n 's/^ *\(fused_ema: \)/\1/p' build/make.log
	@$(PY) -m fused_ema
	@touch $@
