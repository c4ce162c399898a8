# Two commands do everything, set-up included:
#
#   make demo     a tiny model unlearns rude answers from negatives alone; table, picture and model in runs/demo
#   make test     lint, types and tests
#
# Both use .venv and create it when it is missing. `VENV= make test` uses the Python on the PATH and installs nothing.

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

# Operators against the peers that are installed; writes benchmarks/results/<device>-<shape>.json.
bench:
	@$(call PYTHON_WITH,dev) && "$$python" -m benchmarks.logprob $(ARGS)

# Everything that needs a CUDA device, in one command and with the Python on the PATH (or PYTHON=), which needs torch,
# pytest and rich: the GPU tests, then the benchmark.
gpu:
	@python=$${PYTHON:-python3} && "$$python" -m pytest -q tests/gpu && \
	  "$$python" -m benchmarks.logprob --device cuda --tokens 8192 --hidden 4096 $(ARGS)

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
