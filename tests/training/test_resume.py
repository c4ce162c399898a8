"""A run that is interrupted, by whatever means, and goes on as if it had not been: the same bits, on the CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastd2o import FastD2OError
from tests.training import tiny
from tests.training.worker import RESUMABLE, dropout_model


def run_worker(name: str, out: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "tests.training.worker", name, str(out)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    trainer = tiny.make_trainer(tmp_path_factory.mktemp("whole"), model=dropout_model(), **RESUMABLE)
    trainer.train()
    return trainer


def resume(out: Path, **options):
    trainer = tiny.make_trainer(out, model=dropout_model(), **{**RESUMABLE, **options})
    trainer.train(resume_from_checkpoint=True)
    return trainer


def steps_in(out: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))


def assert_same_run(trainer, expected) -> None:
    """Every log, but for times, and every weight."""
    timing = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    ours, theirs = (
        [{key: value for key, value in entry.items() if key not in timing} for entry in run.state.log_history]
        for run in (trainer, expected)
    )
    assert ours == theirs
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_killed_run_goes_on_with_the_same_bits(tmp_path, uninterrupted):
    assert len(tiny.losses(uninterrupted)) == 3
    died = run_worker("killed", tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert steps_in(tmp_path) == [2, 4]
    assert_same_run(resume(tmp_path), uninterrupted)


def test_killed_while_saving_leaves_no_partial_checkpoint(tmp_path, uninterrupted):
    died = run_worker("killed_while_saving", tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "_incomplete" / "checkpoint-4" / "model.safetensors").exists()
    assert steps_in(tmp_path) == [2]
    assert_same_run(resume(tmp_path), uninterrupted)
    assert not (tmp_path / "_incomplete").exists()


def test_full_disk_keeps_the_last_checkpoint(tmp_path, uninterrupted):
    run = run_worker("full_disk", tmp_path)
    assert run.returncode == 0, run.stderr
    message = run.stdout.strip().splitlines()[-1]
    assert f"saving '{tmp_path}/checkpoint-4' failed" in message
    assert f"the last checkpoint, '{tmp_path}/checkpoint-2', is whole. Fix: free space" in message
    assert not (tmp_path / "_incomplete").exists()
    assert steps_in(tmp_path) == [2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_same_run(resume(tmp_path), uninterrupted)


def test_full_disk_at_the_final_save_keeps_the_model_there(tmp_path):
    run = run_worker("full_disk_at_the_end", tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"saving '{tmp_path}' failed" in run.stdout
    assert not (tmp_path / "_incomplete").exists()


@pytest.mark.parametrize("step", [2, 6])
def test_resumed_from_a_given_checkpoint(tmp_path, uninterrupted, step):
    """In the middle of an epoch, and at its end."""
    trainer = tiny.make_trainer(tmp_path, model=dropout_model(), **RESUMABLE)
    trainer.train(resume_from_checkpoint=f"{uninterrupted.args.output_dir}/checkpoint-{step}")
    assert_same_run(trainer, uninterrupted)


def test_resumed_by_the_setting(tmp_path, uninterrupted):
    folder = f"{uninterrupted.args.output_dir}/checkpoint-4"
    trainer = tiny.make_trainer(tmp_path, model=dropout_model(), resume_from_checkpoint=folder, **RESUMABLE)
    trainer.train()
    assert_same_run(trainer, uninterrupted)


@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"objective": ["npo"], "precompute_ref_log_probs": True},
        {"objective": ["kto"]},
    ],
)
def test_other_runs_resume_too(tmp_path, options):
    whole = tiny.make_trainer(tmp_path / "whole", model=dropout_model(), **{**RESUMABLE, **options})
    whole.train()
    trainer = tiny.make_trainer(tmp_path / "resumed", model=dropout_model(), **{**RESUMABLE, **options})
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_run(trainer, whole)


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(FastD2OError, match=r"no checkpoint to resume from.*Fix"):
        resume(tmp_path)
    trainer = tiny.make_trainer(tmp_path)
    with pytest.raises(FastD2OError, match=r"is not a checkpoint of a training run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_weights_alone_cannot_be_resumed_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "max_steps": 1}
    tiny.make_trainer(tmp_path, **options).train()
    with pytest.raises(FastD2OError, match=r"holds weights only"):
        tiny.make_trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_another_run_cannot_be_resumed(uninterrupted, tmp_path):
    checkpoint = f"{uninterrupted.args.output_dir}/checkpoint-4"
    rows = tiny.make_rows(10)
    other_model: Any = dropout_model()
    with torch.no_grad():
        other_model.lm_head.weight.mul_(1.5)
    for change, told in (
        ({"objective": ["dpo"]}, "objective was .*, now is dpo"),
        ({"beta": 0.3}, r"\w+ beta was 0.1, now is 0.3"),
        ({"train_dataset": rows[:-1]}, "training data was 10 groups, .*, now is 9 groups"),
        ({"train_dataset": [{**rows[0], "prompt": "w9"}, *rows[1:]]}, "training data was 10 groups, .*, now is 10 gro"),
        ({"model": other_model}, "base model was weights .*, now is weights"),
        ({"ref_model": tiny.make_model(1)}, "reference was the model before .*, now is the model given as ref_model"),
    ):
        trainer = tiny.make_trainer(tmp_path, **{**RESUMABLE, "model": dropout_model(), **change})
        with pytest.raises(FastD2OError, match=rf"is of another run: .*{told}.*Fix: give what that run was given"):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_learning_rate_and_steps_are_free(uninterrupted, tmp_path):
    checkpoint = f"{uninterrupted.args.output_dir}/checkpoint-6"
    options = {**RESUMABLE, "learning_rate": 1e-3, "max_steps": 7}
    trainer = tiny.make_trainer(tmp_path, model=dropout_model(), **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 7


def test_a_checkpoint_without_a_note_is_taken_as_it_is(uninterrupted, tmp_path):
    """It may be of another trainer."""
    shutil.copytree(f"{uninterrupted.args.output_dir}/checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "_fastd2o_run.json").unlink()
    assert_same_run(resume(tmp_path), uninterrupted)
