"""``RoundsConfig``: every choice of a run of rounds, checked before anything is loaded."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from transformers.training_args import OptimizerNames

from fastd2o.data import Needs, load_rows
from fastd2o.errors import FastD2OError
from fastd2o.training.config import PreferenceConfig
from fastd2o.training.objectives import Mixture
from fastd2o.training.rounds.scorers import ScorerOptions
from fastd2o.training.rounds.watch import Limits
from fastd2o.training.sampling import SamplingOptions

# What the driver decides for each round's trainer, or cannot serve.
_NOT_IN_TRAIN = {
    "output_dir": "each round has a folder of its own in output_dir",
    "overwrite": "a run of rounds goes on where it stopped",
    "resume_from_checkpoint": "a run of rounds goes on where it stopped",
    "save_only_model": "a round could not go on from such a checkpoint",
    "push_to_hub": "upload the last round's model yourself",
    "eval_strategy": "the samples of every round are its evaluation",
    "eval_on_start": "the samples of every round are its evaluation",
}
_KEPT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # their state is tensors alone
_NOT_IN_SAMPLING = {"num_anchors": "it is num_samples"}


@dataclass(frozen=True)
class RoundsConfig:
    """What a run of rounds does.

    ``sampling``, ``train``, ``scorer`` and ``limits`` are mappings, as they stand in a YAML file.

    Attributes:
        model: folder of the model to begin with, or its name on the Hub.
        dataset: the prompts: whatever :func:`fastd2o.data.load_rows` reads from a path. The builder ``anchors`` takes
            the rows with a negative; the others take every row with a prompt and look at nothing else of it.
        output_dir: where everything of the run is kept.
        rounds: how many times to sample and train.
        num_samples: N (D2O: K), completions drawn for each prompt.
        builder: what is made of a prompt's scored completions: ``pairs``, the highest against the lowest, ties dropped
            (Iterative DPO, PCO); ``anchors``, the row's negative against all of them (D2O); ``labels``, each by itself,
            good or bad, balanced (CRINGE).
        scorer: see :class:`~fastd2o.training.rounds.scorers.ScorerOptions`.
        train: fields of :class:`fastd2o.PreferenceConfig`, for the training of one round: steps, epochs and the
            learning-rate schedule are a round's. The seed of round r is ``seed + r − 1``, so that rounds shuffle anew.
        sampling: fields of :class:`~fastd2o.training.sampling.SamplingOptions`, but ``num_anchors``. The seed of round
            r is ``seed + r − 1`` too. The default of ``instruction`` is ``harmless`` for the builder ``anchors``, whose
            signal it is, and none for the others, which judge what the policy says of itself.
        threshold: ``labels``: a score of at least this is good. It has no default: scores have no common scale.
        base_dataset: rows that every round trains on as well, such as the labelled data that CRINGE adds to. Default:
            none, so that a round trains on its own policy's completions alone.
        reference: the reference of a round's loss: ``original``, the model that the run began with, or ``previous``,
            the model that the round begins with. Default ``original``: what a departure costs is then measured from one
            fixed point, and rounds cannot add up to a drift that no loss sees; ``previous`` learns faster and has no
            such bound.
        optimizer: ``reset`` or ``keep`` the optimiser's state from round to round. Default ``reset``: its moments are
            averages of gradients on the last round's data, and the learning rate begins its schedule anew anyway;
            ``keep`` also costs the disk two more models.
        generator: ``transformers`` or ``vllm``. Default ``transformers``: nothing more to install, and the samples do
            not depend on batching.
        limits: see :class:`~fastd2o.training.rounds.watch.Limits`. Default: none, everything is measured and nothing
            stops a run.
        attn_implementation: as for Transformers; default: its choice.
        trust_remote_code: run code that comes with the model; never with a scorer.

    Raises:
        ValueError: a value that cannot work; the message says which, what was expected, and the fix.
        FastD2OError: this is one of several processes.
    """

    model: str
    dataset: str
    output_dir: str
    rounds: int
    num_samples: int
    builder: Literal["pairs", "anchors", "labels"]
    scorer: Mapping[str, Any]
    train: Mapping[str, Any]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = None
    base_dataset: str | None = None
    reference: Literal["original", "previous"] = "original"
    optimizer: Literal["reset", "keep"] = "reset"
    generator: Literal["transformers", "vllm"] = "transformers"
    limits: Mapping[str, Any] = field(default_factory=dict)
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise FastD2OError("rounds run as one process. Fix: start them without torchrun")
        for name, valid in (
            ("builder", ("pairs", "anchors", "labels")),
            ("reference", ("original", "previous")),
            ("optimizer", ("reset", "keep")),
            ("generator", ("transformers", "vllm")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of: {', '.join(valid)}")
        for name in ("scorer", "train", "sampling", "limits"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a mapping of options")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; expected at least 1")
        if self.builder == "pairs" and self.num_samples < 2:
            raise ValueError(
                f"num_samples is {self.num_samples}, but a pair is made of two completions of a prompt. Fix: "
                "num_samples=2 or more"
            )
        self._check_numbers()
        self._check_threshold()
        self.scorer_options()
        self.sampling_options(1)
        self._check_optimizer(OptimizerNames(self.training(1).optim).value)
        self._check_objective(Mixture(self.training(1)))

    def _check_numbers(self) -> None:
        """TrainingArguments looks at no types: text would come to light once a round has sampled."""
        for option in fields(PreferenceConfig):
            value = self.train.get(option.name)
            number = isinstance(option.default, int | float) and not isinstance(option.default, bool)
            if number and isinstance(value, str):
                raise ValueError(
                    f"train: {option.name} is the text {value!r}, expected a number. Fix: in YAML 1.1, write 1.0e-4 "
                    "for 1e-4"
                )

    def _check_threshold(self) -> None:
        if self.builder != "labels":
            if self.threshold is not None:
                raise ValueError(f"threshold is set, but the builder {self.builder} reads none. Fix: leave it out")
        elif self.threshold is None:
            raise ValueError(
                "threshold is missing: the builder labels needs it. Fix: give the lowest score of a good one"
            )
        elif isinstance(self.threshold, bool) or not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold!r}; expected a finite number")

    def _check_optimizer(self, name: str) -> None:
        if self.optimizer == "keep" and name not in _KEPT_OPTIMIZERS:
            raise ValueError(
                f"optimizer is 'keep', but the state of {name} is not kept. Fix: train with optim "
                f"{' or '.join(_KEPT_OPTIMIZERS)}, or optimizer 'reset'"
            )

    def _check_objective(self, mixture: Mixture) -> None:
        names = " ".join(objective.name for objective, *_ in mixture.parts)
        if self.builder == "labels" and mixture.needs is Needs.PAIR:
            raise ValueError(
                f"the builder labels makes single completions, but the objective {names} needs pairs. Fix: objective "
                "cringe, kto or unlikelihood, or the builder pairs"
            )
        if self.reference == "previous" and not mixture.reference:
            raise ValueError(f"reference is 'previous', but the objective {names} has no reference. Fix: leave it out")
        saturates = any(objective.saturates for objective, *_ in mixture.parts)
        if self.watch().max_saturated is not None and not saturates:
            raise ValueError(
                f"limits: max_saturated is set, but the objective {names} has no margin to saturate. Fix: leave it out"
            )

    def scorer_options(self) -> ScorerOptions:
        """The section ``scorer``."""
        return ScorerOptions(**_known("scorer", self.scorer, _names(ScorerOptions)))

    def watch(self) -> Limits:
        """The section ``limits``."""
        return Limits(**_known("limits", self.limits, _names(Limits)))

    def sampling_options(self, round_: int) -> SamplingOptions:
        """How round ``round_`` samples."""
        given = _known("sampling", self.sampling, _names(SamplingOptions), _NOT_IN_SAMPLING)
        default = {"instruction": SamplingOptions.instruction if self.builder == "anchors" else None}
        options = {**default, **given}
        return SamplingOptions(self.num_samples, **{**options, "seed": options.get("seed", 0) + round_ - 1})

    def training(self, round_: int, **driver: Any) -> PreferenceConfig:
        """How round ``round_`` trains; ``driver``: fields that only the driver sets."""
        given = _known("train", self.train, _names(PreferenceConfig), _NOT_IN_TRAIN)
        seed = given.get("seed", PreferenceConfig.seed) + round_ - 1
        return PreferenceConfig(**{**given, "seed": seed, "output_dir": self.output_dir, **driver})

    def fingerprint(self) -> dict[str, Any]:
        """Every choice that the outcome of a round depends on, and a digest of the datasets' rows, by name: as JSON.

        How many rounds there are, and where they stop, is not among them: a run may be made longer. The model is known
        by its name; that its weights stay as they are is the caller's to see to.
        """
        free = ("output_dir", "rounds", "limits")
        chosen = {name: value for name, value in json.loads(json.dumps(asdict(self))).items() if name not in free}
        rows = {
            f"rows of {name}": _digest(path)
            for name, path in (("dataset", self.dataset), ("base_dataset", self.base_dataset))
            if path is not None
        }
        return {**chosen, **rows}


def _names(kind: type[Any]) -> list[str]:
    return [option.name for option in fields(kind) if option.init]


def _known(
    section: str, given: Mapping[str, Any], names: Iterable[str], elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """``given``, if every name in it is one of ``names`` and none is decided ``elsewhere``."""
    for name in given:
        if elsewhere is not None and name in elsewhere:
            raise ValueError(f"{section}: {name} cannot be set: {elsewhere[name]}. Fix: leave it out")
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"{section}: unknown option {name!r}{hint}")
    return dict(given)


def _digest(path: str | Path) -> str:
    digest = hashlib.sha256()
    for row in load_rows(path):
        digest.update(json.dumps([row.line, row.data], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
