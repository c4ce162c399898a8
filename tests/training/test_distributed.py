"""Two processes, gloo, DDP: what one process does with both batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.tiny import assert_same_gradients, make_model, make_trainer
from tests.training.worker import DISTRIBUTED, distributed_options, measure


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out, root = tmp_path_factory.mktemp("ranks"), Path(__file__).parents[2]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [sys.executable, *command, "-m", "tests.training.worker", "ranks", str(out)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    return measure(tmp_path_factory.mktemp("alone"), processes=1)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_gradients(ranks, alone, name):
    expected = alone[name]["gradients"]
    for rank in ranks:
        # DDP calls the parameters of the model it wraps module.*
        unwrapped = [
            {parameter.removeprefix("module."): gradient for parameter, gradient in step.items()}
            for step in rank[name]["gradients"]
        ]
        assert_same_gradients(unwrapped, expected)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_losses_and_metrics(ranks, alone, name):
    for rank in ranks:
        assert rank[name]["losses"] == pytest.approx(alone[name]["losses"], rel=1e-6)
        assert rank[name]["logged"] == pytest.approx(alone[name]["logged"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in DISTRIBUTED if name != "kto"])
def test_evaluation_counts_every_group_once(ranks, alone, name):
    """Five groups over two processes."""
    assert [rank[name]["share"] for rank in ranks] == [3, 2]
    for rank in ranks:
        for metric, value in alone[name]["evaluation"].items():
            if "runtime" not in metric and "per_second" not in metric and "preparation" not in metric:
                assert rank[name]["evaluation"][metric] == pytest.approx(value, rel=1e-6, abs=1e-9), metric


def test_precomputed_reference(ranks, tmp_path):
    options = {**distributed_options("d2o", 1), "model": make_model(), "ref_model": make_model(seed=1)}
    alone = make_trainer(tmp_path, precompute_ref_log_probs=True, **options)
    expected = [sequence.ref_logp for sequence in alone.train_dataset.sequences]
    for rank in ranks:
        assert rank["precomputed"] == pytest.approx(expected, rel=1e-6)


def test_checkpoint_resumes(ranks):
    for rank in ranks:
        assert rank["resumed"] == rank["whole"]
        assert len(rank["whole"]) == 4
