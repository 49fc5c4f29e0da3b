# The README's commands. Each makes what it needs (.venv, pinned packages, the native library) and
# re-uses what is there.

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PYTHONS := python3.11 python3 python3.12 python3.13 python3.10
# The compiler's command for a recipe; without CXX the first that there is, as in csrc/build.py.
COMPILER = $(if $(filter default,$(origin CXX)),$$(command -v g++ || command -v clang++ || echo c++),$(CXX))
WORKERS ?= 2
TRITON ?= 3.9
PTX ?= 75 80 90
RESULTS ?= device
OUT ?= build/gpu
MINUTES ?= 30
# CPU kernels for the instruction sets of this machine; the wheel has all.
export ATTNFAST_ISAS ?= native

# A file in .venv whose name holds the checksum of the requirements it stands for.
stamp = $(VENV)/.$(1)-$(firstword $(shell cksum < $(2)))
RUNTIME := $(call stamp,runtime,requirements/runtime.txt)
TEST := $(call stamp,test,requirements/test.txt)
LINT := $(call stamp,lint,requirements/lint.txt)
BENCH := $(call stamp,bench,requirements/bench.txt)
WHEEL := $(call stamp,wheel,requirements/wheel.txt)
DOCS := $(call stamp,docs,requirements/docs.txt)
DEMO := $(call stamp,demo,requirements/demo.txt)
TRITON_LATEST := $(call stamp,triton,requirements/triton.txt)
EDITABLE := $(call stamp,editable,pyproject.toml)

# Python compiles a module when it is first imported; compiling all of them here took a minute of three.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile
# $(1) what is installed, $(2) pip's arguments: one line when it fails, the rest in a log.
install = @echo "installing $(1)" && $(PIP) $(2) 2> $(VENV)/pip.log || { \
  echo "attnfast: could not install $(1): $$(grep ERROR $(VENV)/pip.log | tail -n 1)" \
    "(is there a network? pip's messages are in $(VENV)/pip.log)" >&2; exit 1; }
done = @rm -f $(VENV)/.$(1)-* && touch $@

# What cross-compiling needs is there.
cross = @for tool in $(1); do command -v $$tool > /dev/null || { \
  echo "attnfast: no $$tool: install it (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)" >&2; exit 1; }; done

BUILD := $(PY) -m build --no-isolation
FROM_TORCH := $(foreach l,libtorch*.so libc10*.so libgomp.so.1 libcuda.so.1,--exclude '$(l)')
REPAIR := PATH="$(BIN):$$PATH" $(PY) -m auditwheel repair --wheel-dir dist $(FROM_TORCH) --only-plat --plat

ASAN_ENV = ATTNFAST_NATIVE=build/native-asan/_native.so PYTHONMALLOC=malloc \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$(foreach l,asan ubsan,$$($(COMPILER) -print-file-name=lib$(l).so))"
ASAN_TESTS := $(patsubst %,tests/backends/test_%.py,table layouts decode)

.PHONY: help demo translate lens test test-cuda test-triton test-ptx aarch64 test-distributed distributed aot lint bench gpu wheel wheel-aarch64 hub test-abi docs asan venv build emulator ptx cuda clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:  ## list these commands
	@sed -n 's/^\([a-z0-9-]*\):.*  ## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

demo: build $(DEMO)  ## semantic search with a trained encoder, then a translation Transformer: torch's attention and ours
	$(PY) -m demo.search $(ARGS)
	$(PY) -m demo.translation

translate: build $(DEMO)  ## the second half of the demo alone; ARGS="--lang fr" passes arguments to it
	$(PY) -m demo.translation $(ARGS)

lens: build $(TEST) $(DEMO) $(BENCH)  ## a report of MiniLM's heads, what windows on them do, and a training that goes wrong, plain and steered
	$(PY) -m demo.lens $(ARGS)
	$(PY) -m demo.collapse

test: build emulator $(TEST) $(DEMO) $(BENCH) $(TRITON_LATEST)  ## run the tests; ARGS="-k varlen" passes arguments to pytest
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-cuda: emulator $(TEST)  ## every test of the CUDA kernels, on the CPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal --backend cuda tests/backends $(ARGS)

test-triton: build $(TEST) $(TRITON_LATEST)  ## every test of the Triton kernels, in Triton's interpreter
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal --backend triton tests/backends $(ARGS)

test-ptx: build emulator ptx $(TEST) $(TRITON_LATEST)  ## the compiled kernels, their PTX executed on the CPU; PTX="80 90" for sm_80 and sm_90
	@for arch in $(PTX); do echo "the PTX for sm_$$arch"; \
	  OMP_NUM_THREADS=1 ATTNFAST_PTX=$$arch $(PY) -m pytest -n $(WORKERS) --dist worksteal \
	    --backend triton --backend cuda tests/backends $(ARGS) || exit 1; done

aarch64: build $(TEST)  ## the CPU kernels compiled for aarch64, and every case run by each of its instruction sets in qemu
	$(call cross,aarch64-linux-gnu-g++ qemu-aarch64)
	@CXX=aarch64-linux-gnu-g++ ATTNFAST_ISAS=all $(PY) setup.py -q build_recorded
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -o timeout=3600 --every-case tests/test_aarch64.py $(ARGS)

test-distributed: build emulator $(TEST) $(TRITON_LATEST)  ## the case table over 2 and 4 processes, by every method and layout, and layers over them
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal --every-case \
	  tests/test_context_parallel.py tests/test_parallel_layers.py $(ARGS)

distributed: build  ## train on a sequence of 32k tokens over two processes, and alone: the losses agree
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --nproc-per-node 2 examples/long_context.py $(ARGS)

aot: build $(TRITON_LATEST) build/triton-3.6/.installed  ## compile the Triton kernels for every architecture, without a GPU; TRITON=3.6 or 3.9
	PYTHONPATH=$(if $(filter 3.6,$(TRITON)),build/triton-3.6) $(PY) -m tools.aot $(ARGS)

build/triton-3.6/.installed: | $(RUNTIME)
	$(call install,triton 3.6 for make aot,--no-deps --target build/triton-3.6 triton==3.6.0)
	@touch $@

lint: $(LINT)  ## ruff, mypy and clang-format, nothing rewritten
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) $(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

bench: build $(TEST) $(BENCH)  ## time attnfast beside all others (quick suites; BENCH_SIZE=full), write results, report and plots
	$(PY) -m pytest bench -q --benchmark-quiet --results="$(RESULTS)" $(ARGS)
	$(if $(ARGS),,$(PY) -m bench report)

gpu:  ## on a machine with a GPU: prove and time everything; OUT=build/gpu MINUTES=30, DRY=1 tries it on the CPU
	$(or $(wildcard $(PY)),python3) tools/gpu --out "$(OUT)" --minutes $(MINUTES) $(if $(filter-out 0,$(DRY)),--dry)

wheel: export ATTNFAST_ISAS = all
wheel: export ATTNFAST_CUDA ?= 1
wheel: export ATTNFAST_CUDA_ARCHS ?= all
wheel: $(WHEEL)  ## one wheel for every Python 3.10+ and torch 2.10+, and the sources, in dist/
	@rm -rf build/lib* build/bdist* build/wheel dist *.egg-info
	$(BUILD) --wheel --outdir build/wheel
	$(BUILD) --sdist --outdir dist
	$(REPAIR) manylinux_2_28_$(shell uname -m) build/wheel/*.whl
	@$(PIP) --no-deps --target build/wheel/installed dist/*.whl
	cd build/wheel && PYTHONPATH=installed ../../$(PY) -m attnfast --check

wheel-aarch64: $(WHEEL) build/torch-aarch64/.installed  ## the wheel for aarch64, cross-compiled, into dist/
	$(call cross,aarch64-linux-gnu-g++)
	@rm -rf build/lib* build/bdist* build/wheel-aarch64
	CXX=aarch64-linux-gnu-g++ ATTNFAST_ISAS=all ATTNFAST_CUDA=0 PYTHONPATH="$$PWD/build/torch-aarch64" \
	  $(PY) setup.py -q bdist_wheel --plat-name linux_aarch64 --dist-dir build/wheel-aarch64
	$(REPAIR) auto build/wheel-aarch64/*.whl

# The headers and libraries of a torch for aarch64, of which nothing runs here.
build/torch-aarch64/.installed: | $(RUNTIME)
	$(call install,torch for aarch64,--no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 --target build/torch-aarch64 \
	  torch==$$($(PY) -c 'import torch; print(torch.__version__.partition("+")[0])'))
	@touch $@

hub: export ATTNFAST_ISAS = all
hub: build $(TEST) build/hub-check/.installed  ## the tree that Hugging Face's kernels library loads, in build/hub/, and loads it
	$(PY) -m tools.hub
	OMP_NUM_THREADS=1 ATTNFAST_HUB=build/hub $(PY) -m pytest -q tests/test_hub.py $(ARGS)

# The newest transformers for Python 3.10, and the kernels library that it takes; later ones want later ones.
build/hub-check/.installed: | $(RUNTIME)
	$(call install,kernels and a transformers that takes it,--no-deps --target build/hub-check kernels==0.17.2 transformers==5.20.2)
	@touch $@

test-abi: wheel  ## install the wheel under Python 3.10 and 3.13, torch 2.10 and the newest; ARGS="--help"
	$(PY) -m tools.abi $(or $(ARGS),--write)

docs: $(RUNTIME) $(DOCS)  ## the documentation, in build/docs/; a warning is an error
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo build/docs/index.html

asan: $(TEST)  ## the case table under AddressSanitizer and UndefinedBehaviorSanitizer
	ATTNFAST_SANITIZE=1 $(PY) setup.py -q build_ext
	OMP_NUM_THREADS=1 $(ASAN_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal --capture=sys \
	  --backend cpu $(ASAN_TESTS) -k "not test_reference" $(ARGS)
	@for isa in $$($(PY) -c 'from csrc import build; print(*[*build.SANITIZED_ISAS][-2::-1])'); do echo "the case table as $$isa"; \
	  OMP_NUM_THREADS=1 $(ASAN_ENV) ATTNFAST_CPU_ISA=$$isa $(PY) -m pytest -n $(WORKERS) --dist worksteal \
	    --capture=sys --backend cpu tests/backends/test_table.py -k "not test_reference" $(ARGS) || exit 1; done

venv: $(RUNTIME) $(TEST) $(LINT)  ## .venv with what building, testing and linting need

build: $(EDITABLE)  ## bring the native library up to date
	@$(PY) setup.py -q build_ext --inplace

emulator: $(RUNTIME)  ## bring the emulator of the CUDA kernels up to date
	@$(PY) setup.py -q build_emulator

ptx: $(RUNTIME)  ## what nvcc makes of the CUDA kernels, where it is: for test-ptx
	@ATTNFAST_CUDA_ARCHS="$(PTX)" $(PY) setup.py -q build_ptx

# Warnings of nvcc, which reads this variable itself, are errors here, but not in users' builds.
cuda wheel: export NVCC_APPEND_FLAGS += -Werror=all-warnings
cuda: build $(TRITON_LATEST)  ## build/native/_native_cuda.so: the CUDA kernels too, where nvcc is; ATTNFAST_CUDA_ARCHS="80 90"
	@$(PY) setup.py -q build_cuda
	@test ! -e build/native/cuda/row_terms.o || $(PY) tools/cuda_resources.py > /dev/null

clean:  ## remove everything built; .venv stays
	rm -rf build dist *.egg-info attnfast/_native.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(PY):
	@case "$$PWD" in *:*) echo "attnfast: the folder's path must be without a colon, which a venv cannot hold, got $$PWD" >&2; exit 1; esac
	@printf '#include <omp.h>\n#include "cpu/simd.h"\n' | $(COMPILER) -std=c++17 -fopenmp -Icsrc -DATTNFAST_ISA=probe \
	  -fsyntax-only -x c++ - 2> /dev/null || { echo "attnfast: no C++ compiler for the kernels ($(COMPILER)): install" \
	  "$$(sed -n 's/.*kernels need \(.*\)"/\1/p' csrc/cpu/simd.h), with OpenMP, or name one in CXX" >&2; exit 1; }
	@set -- $${PYTHON:+"$$PYTHON"}; [ $$# = 1 ] || set -- $(PYTHONS); \
	for p; do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || continue; \
	  echo "creating $(VENV) with $$p"; \
	  "$$p" -m venv $(VENV) > /dev/null 2>&1 && exit; rm -rf $(VENV); \
	  echo "attnfast: $$p -m venv $(VENV) failed: install Python's venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; \
	done; \
	echo "attnfast: no Python 3.10 or later ($$*): install one, or name one in PYTHON" >&2; exit 1

$(RUNTIME): | $(PY)
	@echo "torch is a large download: the first time takes minutes"
	$(call install,requirements/runtime.txt,-r requirements/runtime.txt)
	$(call done,runtime)

$(TEST) $(LINT) $(WHEEL) $(DOCS) $(DEMO) $(BENCH) $(TRITON_LATEST): $(VENV)/.%: | $(RUNTIME)
	$(call install,requirements/$(firstword $(subst -, ,$*)).txt,--no-deps -r requirements/$(firstword $(subst -, ,$*)).txt)
	$(call done,$(firstword $(subst -, ,$*)))

$(EDITABLE): | $(RUNTIME)
	@$(PY) setup.py -q build_ext --inplace
	$(call install,attnfast itself,--no-build-isolation --no-deps -e .)
	$(call done,editable)
