# Everything a checkout needs: `make demo`, `make test`. The first call makes .venv and builds; later ones reuse it.
PYTHON ?= python3
OUT ?= out
BIN := .venv/bin
STAMP := .venv/installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
# The GPU checks run where nothing can be installed too: there the checkout itself is used, with PYTHON.
HERE = $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))

# A process for each core: threads that wait for each other cost small tests more than they give.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
INTERPRETED = TRITON_INTERPRET=1 $(PYTEST)

# Tests on a copy of the package that a sanitizer (GCC's) watches: folder, FASTGEN_CUDA, FASTGEN_SANITIZE, what
# is loaded first, tests.
define checked
	FASTGEN_CUDA=$(2) FASTGEN_SANITIZE=$(3) $(BIN)/python setup.py build --build-base $(1) --build-lib $(1)/lib
	rm -rf $(1)/lib/tests
	cp -r tests pyproject.toml $(1)/lib
	$(if $(filter host,$(2)),cp fastgen/_cpu.abi3.so $(1)/lib/fastgen)
	cd $(1)/lib && $(SANITIZERS) LD_PRELOAD="$(foreach lib,$(4) stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))" \
	  $(CURDIR)/$(BIN)/python -m pytest $(5)
endef
SANITIZERS := ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=ignore_noninstrumented_modules=1

.PHONY: demo test test-triton test-cuda-host test-cuda-races wheel test-wheel test-matrix bench bench-full gpu fuzz sanitize lint format clean install

demo: $(STAMP)
	$(BIN)/fastgen demo --out "$(OUT)/demo"

test: $(STAMP)
	$(PYTEST)

# The ops' tests over Triton's kernels, interpreted on the CPU, and what the compiler makes of every kernel.
test-triton: $(STAMP)
	$(INTERPRETED) tests/ops tests/models/test_triton.py tests/test_kernels.py -k "triton or kernel"
	FASTGEN_BACKEND=triton $(INTERPRETED) tests/ops/test_fuzz.py

# The CUDA kernels, compiled for the CPU (csrc/cuda/host.h), watched for addresses and undefined behaviour, and
# for races; the other ops are as they are.
HOSTED := $(foreach op,upfirdn2d bias_act filtered_lrelu filtered_bias_act conv2d_resample modulated_conv2d \
  sample_triplane grid_sample render_triplane golden,tests/ops/test_$(op).py)
test-cuda-host: $(STAMP)
	$(call checked,build/cuda-host,host,1,asan ubsan,-n auto $(HOSTED) -k cuda-host)

test-cuda-races: $(STAMP)
	$(call checked,build/cuda-races,host,thread,tsan,$(HOSTED) -k "cuda-host and (forward or gradients or deterministic)")

# One for every Python from 3.10 on and every torch from 2.11 on; PyTorch's libraries stay PyTorch's.
wheel: $(STAMP)
	rm -rf build/wheel build/lib* dist/*.whl
	FASTGEN_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0;12.0+PTX" $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude "libc10*" --exclude "libtorch*" --exclude "libcuda*" \
	  --wheel-dir dist build/wheel/*.whl
	$(BIN)/python -m fastgen.kernels.sass dist/*.whl
	test $$(stat -c %s dist/*.whl) -lt 25000000

# In new environments: the tests of the ops on the CPU, with the oldest and the newest torch; test-matrix: those
# of models and of fastgen.compat too.
PYTHONS := python3.10 python3.13
TESTED := tests/ops -k cpu
test-wheel:
	rm -rf "build/wheel-test"
	mkdir -p "build/wheel-test"
	cp -r tests pyproject.toml "build/wheel-test"
	cd "build/wheel-test" && set -e; for python in $(PYTHONS); do for torch in "torch==2.11.*" torch; do \
	  $$python -m venv --clear env; env/bin/python -m pip install -q "$$torch" $(CURDIR)/dist/*.whl pytest pytest-xdist hypothesis scipy onnx onnxruntime; \
	  env/bin/python -c "import torch, fastgen; print(torch.__version__, fastgen.__file__)"; \
	  OMP_NUM_THREADS=1 env/bin/python -m pytest -n auto $(TESTED); done; done

test-matrix:
	$(MAKE) test-wheel TESTED="tests/ops tests/models tests/compat tests/test_export.py -k 'not reference'"

# What `fastgen bench` and benchmarks/curves.py say of images, and every op beside plain PyTorch, in 15 minutes;
# bench-full, in an hour, has all routes, batches, sizes and training steps: what benchmarks/results is made of.
bench: KINDS := kept
bench: CASES := not image and not compile and not training
bench: ONLY := --rounds 3 --only teacher student-compact
bench-full: KINDS := kept returned
bench-full: CASES := not image
bench-full: BATCHES := --batch 1 8 $(addprefix --student ,$(wildcard $(OUT)/demo/student.safetensors))
bench bench-full: $(STAMP)
	mkdir -p "$(OUT)"
	for memory in $(KINDS); do \
	  $(BIN)/python -m pytest benchmarks -k "$(CASES)" --memory=$$memory --benchmark-json="$(OUT)/$$memory.json"; done
	$(BIN)/python benchmarks/report.py $(KINDS:%="$(OUT)/%.json") --out "$(OUT)/bench"
	$(BIN)/fastgen bench --preset ffhq512 $(ONLY) --json "$(OUT)/ffhq512.json"
	$(BIN)/fastgen bench --preset toy $(ONLY) $(BATCHES) --json "$(OUT)/toy.json"
	$(BIN)/python benchmarks/images.py "$(OUT)/ffhq512.json" "$(OUT)/toy.json" --out "$(OUT)/bench"
	$(BIN)/python benchmarks/curves.py --out "$(OUT)/bench"

# All that a machine with a GPU can say, in ten minutes; one step of it: make gpu STEP=bench; DRY_RUN=1
# rehearses on the CPU. Where make install has not run, PYTHON has to have torch, numpy, safetensors, pytest,
# pytest-benchmark, matplotlib and ninja.
gpu:
	$(HERE) benchmarks/gpu.py --out "$(OUT)/gpu" $(foreach step,$(STEP),--step $(step)) $(if $(DRY_RUN),--dry-run)

# Random calls of the ops, many of them; tensors beyond 2^31 elements, for which 14 GB of memory must be free; a
# run that is killed 20 times.
fuzz: $(STAMP)
	FASTGEN_FUZZ=2000 $(BIN)/python -m pytest tests/ops/test_fuzz.py
	FASTGEN_BIG=1 $(BIN)/python -m pytest tests/ops/test_robust.py
	FASTGEN_KILLS=20 $(BIN)/python -m pytest tests/train/test_distributed.py -k killed_at

# The ops' tests on a copy of the package whose CPU library checks addresses and undefined behaviour (GCC).
sanitize: $(STAMP)
	$(call checked,build/sanitize,0,1,asan ubsan,tests/ops)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*)

install: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "setuptools>=77" ninja "torch>=2.11"
	$(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv build dist *.egg-info fastgen/*.so
