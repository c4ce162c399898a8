"""The demo's alignments: the same start, steps, batch, learning rate and β for D2O and for what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerCallback

from fastd2o.cli.demo_measure import Examiner, Scores
from fastd2o.cli.demo_report import Outcome
from fastd2o.cli.progress import ProgressBar
from fastd2o.training import PreferenceConfig, PreferenceTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUPS_PER_STEP = 12
# The papers' 0.1 for β and α suits answers of hundreds of tokens; these have a dozen, and log-ratios to match.
BETA = 1.0
_CURVE_POINTS = 20


def align(
    objective: str,
    start: Path,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    examiner: Examiner,
    *,
    output_dir: Path,
    learning_rate: float,
    steps: int,
    seed: int,
) -> Outcome:
    """Train the model in the folder ``start`` on ``rows``, save it to ``output_dir``, and judge it on the way too."""
    model = AutoModelForCausalLM.from_pretrained(start)
    follower = _FollowScores(examiner)
    config = PreferenceConfig(
        str(output_dir),
        objective=[objective],
        beta=None if objective == "gradient_ascent" else BETA,
        alpha=BETA if objective == "d2o" else None,
        learning_rate=learning_rate,
        max_steps=steps,
        warmup_steps=steps // 10,
        per_device_train_batch_size=GROUPS_PER_STEP,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    trainer = PreferenceTrainer(model, config, rows, tokenizer, callbacks=[follower])
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(ProgressBar)
    trainer.train()
    trainer.save_model()
    return Outcome(objective, examiner.score(model), examiner.interview(model), follower.curve)


class _FollowScores(TrainerCallback):
    """Scores the model before the first step, and then about twenty times."""

    def __init__(self, examiner: Examiner) -> None:
        self.examiner = examiner
        self.curve: list[tuple[int, Scores]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.curve.append((0, self.examiner.score(model)))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        interval = max(1, state.max_steps // _CURVE_POINTS)
        if state.global_step % interval == 0 or state.global_step == state.max_steps:
            self.curve.append((state.global_step, self.examiner.score(model)))
