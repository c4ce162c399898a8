"""Runs that cannot be had inside the test process: killed, short of disk, or one of several. Arguments: NAME FOLDER."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fastd2o import FastD2OError
from tests.training.tiny import GradientRecorder, losses, make_model, make_rows, make_trainer

RESUMABLE: dict[str, Any] = {
    "objective": ["d2o", "cringe"],
    "train_dataset": make_rows(10),
    "max_steps": -1,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "linear",
    "disable_dropout": False,
}
"""Nine steps in three epochs; saves fall between logs and inside epochs."""


def dropout_model() -> torch.nn.Module:
    """Dropout, so that the state of the random generators shows in the losses."""
    return make_model(attention_dropout=0.1)


class KillAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SmallDisk(TrainerCallback):
    """From a step on, no file may grow beyond a few kilobytes: what a full disk does to a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def killed(out: Path) -> None:
    """Dies in the middle of its fifth step."""
    make_trainer(out, model=dropout_model(), callbacks=[KillAtStep(4)], **RESUMABLE).train()


def killed_while_saving(out: Path) -> None:
    """Dies when the second checkpoint has its weights but nothing else."""
    trainer = make_trainer(out, model=dropout_model(), **RESUMABLE)
    tokenizer = trainer.processing_class
    saved = type(tokenizer).save_pretrained

    class Deadly(type(tokenizer)):  # type: ignore[misc]
        def save_pretrained(self, folder: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return saved(self, folder, **kwargs)

    tokenizer.__class__ = Deadly
    trainer.train()


def full_disk(out: Path) -> None:
    trainer = make_trainer(out, model=dropout_model(), callbacks=[SmallDisk(3)], **RESUMABLE)
    try:
        trainer.train()
    except FastD2OError as error:
        print(error)


def full_disk_at_the_end(out: Path) -> None:
    trainer = make_trainer(out, max_steps=1)
    trainer.train()
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        trainer.save_model()
    except FastD2OError as error:
        print(error)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


DISTRIBUTED: dict[str, dict[str, Any]] = {
    "d2o": {"objective": "d2o"},
    "mixture": {"objective": ["dpo", "unlikelihood", "cringe"], "objective_weights": [1, 0.5, 2]},
    "kto": {"objective": "kto", "gradient_accumulation_steps": 1, "max_steps": 4},
    "online": {"objective": "d2o", "online_after": 1, "resample_every": 2, "online_max_new_tokens": 6}
    | {"online_instruction": "w1"},
}
"""Gradients must not depend on the number of processes (KTO: in one micro-batch, which its reference point is of)."""


def distributed_options(name: str, processes: int) -> dict[str, Any]:
    """Windows of four groups, split over so many processes."""
    return {
        "model": make_model(dtype=torch.float64),
        "train_dataset": make_rows(16),
        "eval_dataset": make_rows(5, seed=1),
        "ref_model": make_model(seed=1, dtype=torch.float64),
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 2 // processes,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        **DISTRIBUTED[name],
    }


def measure(out: Path, processes: int) -> dict[str, Any]:
    """Gradients, losses and evaluation of every run in :data:`DISTRIBUTED`."""
    results = {}
    for name in DISTRIBUTED:
        recorder = GradientRecorder()
        trainer = make_trainer(out / name, callbacks=[recorder], **distributed_options(name, processes))
        trainer.train()
        results[name] = {
            "gradients": recorder.steps,
            "losses": losses(trainer),
            "logged": [entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry],
            "evaluation": trainer.evaluate(),
            "share": len(trainer.get_eval_dataloader().dataset),  # type: ignore[arg-type]
        }
    return results


def ranks(out: Path) -> None:
    """One of two processes: gradients, evaluation, precomputed references, and checkpoints that resume."""
    processes = int(os.environ["WORLD_SIZE"])
    results = measure(out, processes)
    stored = make_trainer(
        out / "stored",
        precompute_ref_log_probs=True,
        **{**distributed_options("d2o", processes), "model": make_model(), "ref_model": make_model(seed=1)},
    )
    results["precomputed"] = [sequence.ref_logp for sequence in stored.train_dataset.sequences]
    options = {**distributed_options("d2o", processes), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(out / "whole", **options)
    whole.train()
    whole.save_model()
    options |= {"model": make_model(dtype=torch.float64), "ref_model": make_model(seed=1, dtype=torch.float64)}
    resumed = make_trainer(out / "whole", **options)
    resumed.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-2"))
    results["whole"], results["resumed"] = losses(whole), losses(resumed)
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")
    resumed.accelerator.end_training()  # a process that does not leave its group is now and then aborted at its end


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = (killed, killed_while_saving, full_disk, full_disk_at_the_end, ranks)
    {job.__name__: job for job in jobs}[sys.argv[1]](Path(sys.argv[2]))
