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
	  OMP_NUM_THREADS=1 "$$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q --cov=fastd2o --cov-report=term:skip-covered $(ARGS)

lint:
	@$(call PYTHON_WITH,dev) && echo "lint: ruff check, ruff format" && "$$python" -m ruff check . && \
	  "$$python" -m ruff format --check . && echo "types: mypy" && "$$python" -m mypy

# This library, the peers that are installed and the bare matrix products; table, JSON, Markdown and pictures in runs/bench.
# ARGS="--quick" takes two minutes.
bench:
	@$(call PYTHON_WITH,dev) && "$$python" -m fastd2o bench $(ARGS)

# Everything that needs a CUDA device, in eight minutes at most: the kernels are compiled and run; then come the GPU
# tests, the benchmark, the table by which the engine chooses, and every kernel under compute-sanitizer where that
# works. A part that fails or is too slow leaves the others be; ARGS="kernels tests" runs some of them.
#
# It takes the Python on the PATH (or PYTHON=) as it is, and says at once which of its packages are missing: torch,
# setuptools, ninja, pytest and triton; for the benchmark pytest-benchmark, rich, numpy and matplotlib; better with
# hypothesis and pytest-xdist. fastd2o need not be installed; other commands can do without that as well, with
# PYTHONPATH=tests/gpu/site.
#
# In $OUT (default: runs/bench-gpu) lie afterwards gpu.log, with all that was said, results.md, and two files to commit:
# results.json as benchmarks/results/cuda-targets.json, and measured.json, which kernels/triton has already.
gpu:
	@$${PYTHON:-python3} tests/gpu/run.py $(ARGS)

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
