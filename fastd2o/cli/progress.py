"""What a training run shows: a progress bar with the time left, and a readable line for every log."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# The rest of what is measured is in trainer_state.json and goes to --report_to.
_SHOWN = (
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class ProgressBar(ProgressCallback):
    """The bars of Transformers; the lines are those of :class:`LogLines`."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""


class LogLines(TrainerCallback):
    """One line for each log: the step, and the main numbers by name."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line, above the bar if there is one."""
        if state.is_world_process_zero and logs:
            tqdm.write(format_logs(state.global_step, state.max_steps, logs))


def format_logs(step: int, steps: int, logs: dict[str, Any]) -> str:
    """``"step 10/60 | loss 0.6931 | rewards/margins 0.02"``."""
    if "train_runtime" in logs:
        return f"done: {step} steps in {logs['train_runtime']:.0f} s | mean loss {logs['train_loss']:.4g}"
    prefix = "eval_" if "eval_loss" in logs else ""
    numbers = [f"{name} {logs[prefix + name]:.4g}" for name in _SHOWN if prefix + name in logs]
    return " | ".join([f"{'evaluation, ' if prefix else ''}step {step}/{steps}", *numbers])
