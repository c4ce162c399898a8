"""``PreferenceConfig``: every choice of a run, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from fastd2o.ops.backends import check_backend
from fastd2o.ops.budget import check_budget
from fastd2o.training.objectives import OBJECTIVES, OPTIONS, Objective, find_objective
from fastd2o.training.sampling import INSTRUCTIONS, SamplingOptions


@dataclass
class PreferenceConfig(TrainingArguments):
    """:class:`transformers.TrainingArguments` and the choices of preference training.

    An option of an objective that is left at ``None`` takes that objective's own default, which ``docs/`` lists. One
    that is set although none of the chosen objectives reads it is an error, as is every value outside its range.

    Three defaults of ``TrainingArguments`` differ: ``learning_rate`` is 1e-6 (the usual size for preference losses on a
    whole model; adapters take about 1e-4), ``logging_steps`` is 10, and ``remove_unused_columns`` is False.

    Raises:
        ValueError: a value that cannot work; the message says which, what was expected, and the fix.
    """

    output_dir: str = field(
        default="trainer_output", metadata={"help": "Where checkpoints and the trained model are written."}
    )

    # What is learnt
    objective: list[str] = field(
        default_factory=lambda: ["d2o"],
        metadata={"help": f"What to optimise, one or several of: {', '.join(OBJECTIVES)}."},
    )
    objective_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each objective; default: 1 for each."}
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "How dearly a departure from the reference is paid (the steepness, where there is no reference). "
            "Default: 0.1; simpo 2.0, simnpo 2.5."
        },
    )
    alpha: float | None = field(default=None, metadata={"help": "d2o: weight of the negative. Default: 0.1."})
    label_smoothing: float | None = field(
        default=None,
        metadata={
            "help": "dpo, robust, exo_pair: the share of pairs assumed to be labelled the wrong way round. Default: 0; "
            "exo_pair 0.001."
        },
    )
    length_normalize: bool | None = field(
        default=None,
        metadata={
            "help": "d2o, pairwise_cringe: per-token means in place of sums of log-probabilities. Default: sums."
        },
    )
    allow_no_anchor: bool | None = field(
        default=None,
        metadata={
            "help": "d2o: keep rows that have no anchor, as their negative term alone. Default: they are left out."
        },
    )
    saturation_threshold: float | None = field(
        default=None,
        metadata={
            "help": "d2o: a group with less than this share of its full gradient is logged as saturated. Default: 0.01."
        },
    )
    dpop_lambda: float | None = field(default=None, metadata={"help": "dpop: weight of the penalty. Default: 50."})
    bdpo_lambda: float | None = field(
        default=None, metadata={"help": "bdpo: share of the policy in the rejected mixture, in (0, 1]. Default: 0.5."}
    )
    discopop_tau: float | None = field(
        default=None, metadata={"help": "discopop: temperature of the gate. Default: 0.05."}
    )
    simpo_gamma: float | None = field(default=None, metadata={"help": "simpo: target margin. Default: 0.5."})
    simnpo_delta: float | None = field(default=None, metadata={"help": "simnpo: margin. Default: 0."})
    orpo_lambda: float | None = field(default=None, metadata={"help": "orpo: weight of the odds ratio. Default: 0.1."})
    kto_desirable_weight: float | None = field(
        default=None, metadata={"help": "kto: weight of the positives. Default: 1."}
    )
    kto_undesirable_weight: float | None = field(
        default=None, metadata={"help": "kto: weight of the negatives. Default: 1."}
    )
    unlikelihood_alpha: float | None = field(
        default=None, metadata={"help": "unlikelihood: weight of the negative tokens. Default: 1."}
    )
    cringe_alpha: float | None = field(
        default=None, metadata={"help": "cringe, pairwise_cringe: weight of the negative tokens. Default: 1."}
    )
    cringe_k: int | None = field(
        default=None,
        metadata={"help": "cringe, pairwise_cringe: candidates to contrast a negative token with. Default: 5."},
    )
    cringe_detach_positive: bool | None = field(
        default=None,
        metadata={"help": "cringe, pairwise_cringe: no gradient into the contrasting token. Default: False."},
    )
    cringe_margin: float | None = field(
        default=None, metadata={"help": "pairwise_cringe: log-probability by which a pair is to be apart. Default: 0."}
    )
    cringe_temperature: float | None = field(
        default=None, metadata={"help": "pairwise_cringe: softness of that margin. Default: 1."}
    )
    cringe_detach_gate: bool | None = field(
        default=None, metadata={"help": "pairwise_cringe: the margin only weighs the loss. Default: True."}
    )
    nat_positive_suffix: str | None = field(
        default=None, metadata={"help": "nat: what ends the prompt of a positive. Default: the paper's wording."}
    )
    nat_negative_suffix: str | None = field(
        default=None, metadata={"help": "nat: what ends the prompt of a negative. Default: the paper's wording."}
    )

    # Data
    max_length: int = field(
        default=1024,
        metadata={"help": "Longest sequence, prompt and completion together, in tokens; completions are cut to fit."},
    )
    truncate_prompt: bool = field(
        default=False,
        metadata={"help": "Cut a prompt longer than max_length from the left, instead of calling its row bad."},
    )
    positives: Literal["auto", "chosen", "anchors"] = field(
        default="auto",
        metadata={"help": "Where a row's positives come from: its anchors if it has that column, else chosen (auto)."},
    )
    bad_rows: Literal["error", "drop"] = field(
        default="error",
        metadata={"help": "What becomes of a row that cannot be used: stop, or drop it and report its line."},
    )

    # Reference
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Score the dataset under the reference once, before training, and keep the result on disk."},
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where precomputed reference log-probabilities are kept. Default: in output_dir."},
    )

    # Online D2O
    resample_every: int | None = field(
        default=None,
        metadata={
            "help": "d2o: draw new anchors from the model in training, for the rows of the coming so many steps each "
            "time. Default: the dataset's anchors throughout."
        },
    )
    online_after: int = field(
        default=0, metadata={"help": "resample_every: steps on the dataset's anchors before the first draw."}
    )
    online_instruction: str = field(
        default="harmless",
        metadata={
            "help": f"resample_every: put in front of every prompt, for generation only: a text, or one of "
            f"{', '.join(INSTRUCTIONS)}, none."
        },
    )
    online_max_new_tokens: int = field(
        default=256, metadata={"help": "resample_every: longest anchor drawn, in tokens."}
    )
    online_temperature: float = field(
        default=1.0, metadata={"help": "resample_every: of the softmax that anchors are drawn from, above 0."}
    )
    online_batch_size: int = field(
        default=16, metadata={"help": "resample_every: anchors generated together, in each process."}
    )

    # Model and run
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "The dtype of a model given by its path. Where all weights train, keep float32 and use bf16."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch dropout off, so that policy and reference differ by what was learnt alone."},
    )
    backend: str | None = field(
        default=None,
        metadata={"help": "Backend of the fused head (see `fastd2o doctor`). Default: the best that works."},
    )
    memory_budget: float | None = field(
        default=None,
        metadata={
            "help": "Memory that the fused head may take where it trains, to keep softmax weights between forward and "
            "backward: bytes, or up to 1 a share of the free memory. Default: 1 GiB."
        },
    )
    coefficient_tol: float = field(
        default=0.0,
        metadata={
            "help": "Leave groups out of the gradient whose loss has no derivative larger than this by the log-odds of "
            "any token (saturated ones). Default: only those that are exactly 0 cost nothing."
        },
    )
    vocab_mass_tol: float = field(
        default=0.0,
        metadata={
            "help": "Leave vocabulary columns out of the gradient that together hold no more than this of any token's "
            "softmax. Default: none."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds."})

    # TrainingArguments with another default
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1: a share of all training steps."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Always False: the collator decides what is used."}
    )

    def __post_init__(self) -> None:
        self._check_objectives()
        self._check_options()
        self._check_training_arguments()
        self._check_online()
        super().__post_init__()

    @property
    def objectives(self) -> list[Objective]:
        """The chosen objectives, in the order of ``objective``."""
        return [find_objective(name) for name in self.objective]

    def option(self, objective: Objective, name: str) -> Any:
        """The value of option ``name`` for ``objective``: what was set, or the objective's own default."""
        value = getattr(self, name)
        return objective.options[name] if value is None else value

    @property
    def sampling(self) -> SamplingOptions:
        """How anchors are drawn with ``resample_every``, but for how many and the seed of a step.

        Raises:
            ValueError: a value outside its range.
        """
        try:
            return SamplingOptions(
                num_anchors=1,
                instruction=self.online_instruction,
                max_new_tokens=self.online_max_new_tokens,
                temperature=self.online_temperature,
                batch_size=self.online_batch_size,
                seed=self.seed,
                bad_rows=self.bad_rows,
            )
        except ValueError as error:
            raise ValueError(f"online_{error}") from error

    def _check_objectives(self) -> None:
        names = self.objective.split(",") if isinstance(self.objective, str) else self.objective
        self.objective = [find_objective(name.strip()).name for part in names for name in part.split(",")]
        if not self.objective:
            raise ValueError(f"objective is empty. Fix: choose one or several of: {', '.join(OBJECTIVES)}")
        if len(set(self.objective)) < len(self.objective):
            raise ValueError(
                f"objective is {self.objective}: one is named twice. Fix: name it once and set objective_weights"
            )
        if "nat" in self.objective and len(self.objective) > 1:
            raise ValueError(
                f"objective is {self.objective}: nat puts its own suffix behind every prompt, so it shares no batch "
                "with others. Fix: use nat alone"
            )
        if self.objective_weights is None:
            self.objective_weights = [1.0] * len(self.objective)
        weights = self.objective_weights
        if len(weights) != len(self.objective) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(
                f"objective_weights is {weights}, expected {len(self.objective)} numbers above 0, one for each of "
                f"{self.objective}"
            )

    def _check_options(self) -> None:
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value is None:
                continue
            readers = [objective.name for objective in OBJECTIVES.values() if name in objective.options]
            if not set(readers) & set(self.objective):
                raise ValueError(
                    f"{name} is set, but the objective {' '.join(self.objective)} does not read it "
                    f"({', '.join(readers)} would). Fix: leave {name} out"
                )
            if not option.valid(value):
                raise ValueError(f"{name} is {value!r}, expected {option.expected}")
        if self.label_smoothing == 0 and "exo_pair" in self.objective:
            raise ValueError(
                "label_smoothing is 0, but exo_pair is infinite there. Fix: label_smoothing=0.001, the paper's value"
            )

    def _check_online(self) -> None:
        if self.resample_every is None:
            changed = [
                option.name
                for option in fields(self)
                if option.name.startswith("online_") and getattr(self, option.name) != option.default
            ]
            if changed:
                raise ValueError(
                    f"{changed[0]} is set, but no anchors are drawn in training. Fix: set resample_every as well, or "
                    f"leave {changed[0]} out"
                )
            return
        if not (isinstance(self.resample_every, int) and self.resample_every >= 1):
            raise ValueError(f"resample_every is {self.resample_every!r}, expected a number of steps, at least 1")
        if not (isinstance(self.online_after, int) and self.online_after >= 0):
            raise ValueError(f"online_after is {self.online_after!r}, expected a number of steps, 0 or more")
        if "d2o" not in self.objective:
            raise ValueError(
                f"resample_every draws anchors for d2o, but the objective is {' '.join(self.objective)}. Fix: "
                "objective='d2o', or leave resample_every out"
            )
        if self.positives == "chosen":
            raise ValueError(
                "resample_every draws anchors anew, but positives='chosen' leaves anchors unused. Fix: "
                "positives='anchors', or leave resample_every out"
            )
        _ = self.sampling  # checks its own values

    def _check_training_arguments(self) -> None:
        if not (isinstance(self.max_length, int) and self.max_length >= 2):
            raise ValueError(
                f"max_length is {self.max_length!r}, expected at least 2: a token of prompt and one of completion"
            )
        for name, valid in (
            ("positives", ("auto", "chosen", "anchors")),
            ("bad_rows", ("error", "drop")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of: {', '.join(valid)}")
        check_backend(self.backend)
        check_budget(self.memory_budget)
        for name in ("coefficient_tol", "vocab_mass_tol"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < 1):
                raise ValueError(f"{name} is {value!r}, expected a number in [0, 1)")
        if self.ref_cache_dir is not None and not self.precompute_ref_log_probs:
            raise ValueError(
                "ref_cache_dir is set, but nothing is precomputed. Fix: precompute_ref_log_probs=True as well"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor smooths the cross-entropy of Trainer, which is not used here. Fix: "
                "label_smoothing, for objectives that have it"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns cannot be True: batches are not rows of columns. Fix: leave it out")
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices cannot be False: losses are normalised over all processes. Fix: leave "
                "it out"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy 'batch_rebalance' balances rows, and a batch here is made of groups. Fix: "
                "'random', 'sequential' or 'group_by_length'"
            )
        if self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
            raise ValueError(
                "use_liger_kernel would replace the forward that the fused head lives in. Fix: "
                "liger_kernel_config={'fused_linear_cross_entropy': False} keeps the other kernels"
            )
