# Three commands do everything, set-up included:
#
#   make demo     a tiny model unlearns rude answers from negatives alone; table, picture and model in runs/demo
#   make test     lint, types and tests
#   make bench    this library and its peers, measured side by side
#
# They use .venv and create it when it is missing. `VENV= make test` uses the Python on the PATH and installs nothing.

.PHONY: demo test lint bench gpu clean
.DEFAULT_GOAL := help

# The choice of a Python belongs to .ci/setup; it prints its path, and what it does on the way.
PYTHON_WITH = python=$$(.ci/setup $(1))

help:
	@sed -n 's/^#   //p' $(MAKEFILE_LIST)

demo:
	@$(call PYTHON_WITH,train) && "$$python" -m fastd2o demo $(ARGS)

test: lint
	@$(call PYTHON_WITH,dev) && echo "tests: pytest on 2 processes, with coverage" && \
	  OMP_NUM_THREADS=1 "$$python" -m pytest -n 2 --dist loadfile -q --cov=fastd2o --cov-report=term:skip-covered $(ARGS)

lint:
	@$(call PYTHON_WITH,dev) && echo "lint: ruff check, ruff format" && "$$python" -m ruff check . && \
	  "$$python" -m ruff format --check . && echo "types: mypy" && "$$python" -m mypy

# This library, the peers that are installed and the bare matrix products; table, JSON, Markdown and pictures in runs/bench.
# ARGS="--quick" takes two minutes.
bench:
	@$(call PYTHON_WITH,dev) && "$$python" -m fastd2o bench $(ARGS)

# Everything that needs a CUDA device, in one command of under eight minutes, with the Python on the PATH (or PYTHON=),
# which needs torch, pytest, rich and ninja: the kernels are compiled and run, the GPU tests, every kernel under
# compute-sanitizer where that works, the table by which the engine chooses, the benchmark. All of it is done even if a
# part fails.
SANITIZER = $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer))
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 $(SANITIZER) --error-exitcode 1 --kernel-name kns=fastd2o
gpu:
	@python=$${PYTHON:-python3}; failed=; \
	echo "gpu: kernels"; "$$python" -m benchmarks.every_kernel || failed="$$failed kernels"; \
	echo "gpu: tests"; "$$python" -m pytest -q tests/gpu || failed="$$failed tests"; \
	if [ -z "$(SANITIZER)" ]; then echo "gpu: there is no compute-sanitizer here"; \
	elif ! $(SANITIZE) "$$python" -c 'import torch; torch.ones(8, device="cuda").sum().item()' >/dev/null 2>&1; then \
	  echo "gpu: compute-sanitizer does not work with this device"; \
	else for tool in memcheck racecheck; do \
	  echo "gpu: $$tool"; $(SANITIZE) --tool $$tool "$$python" -m benchmarks.every_kernel || failed="$$failed $$tool"; \
	done; fi; \
	echo "gpu: fused or not"; "$$python" -m benchmarks.tune || failed="$$failed tune"; \
	echo "gpu: benchmark"; "$$python" -m fastd2o bench --gpu --out $${OUT:-runs/bench-gpu} $(ARGS) || failed="$$failed benchmark"; \
	if [ -n "$$failed" ]; then echo "gpu: failed:$$failed"; exit 1; fi

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
