"""Whether a training step fits a GPU, and which changes make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fastd2o.training.footprint import Footprint, TrainingStep
from fastd2o.training.footprint import footprint as measure

GIB = 1 << 30

GPUS: dict[str, int] = {
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "a6000": 48,
    "a100-40": 40,
    "a100-80": 80,
    "h100": 80,
    "h200": 140,
    "b200": 179,
}
"""GiB of memory by the name of the card."""

# What a process has on a GPU beside tensors: CUDA's context, the code of kernels, workspaces of libraries.
_CONTEXT_BYTES = GIB
# What the caching allocator holds in pieces too small to use.
_FRAGMENTATION = 0.05


def needed(peak: int) -> int:
    """Bytes that a GPU must have for tensors of at most ``peak`` bytes: 5 % more for what falls between the allocator's
    blocks, and 1 GiB for CUDA itself. Both are assumptions."""
    return int(peak * (1 + _FRAGMENTATION)) + _CONTEXT_BYTES


@dataclass(frozen=True)
class Alternative:
    """A step with something changed.

    Attributes:
        options: of ``fastd2o train``, that say what.
        footprint: with the change.
    """

    options: str
    footprint: Footprint


def alternatives(
    footprint: Footprint, capacity: int, report: Callable[[str], None] = lambda options: None
) -> list[Alternative]:
    """Each change by itself; then, of all weights and of an adapter, one change after the other until the step fits.

    Changes whose weights, gradients and optimiser states alone are too much are not tried.

    Args:
        footprint: of a step that does not fit.
        capacity: bytes of the GPU.
        report: is told the options that are about to be tried, which takes seconds each.

    Returns:
        Those that fit ``capacity``, small changes first; if none does, up to three that come nearest.
    """
    tried: dict[str, Alternative] = {}

    def fits(options: str, step: TrainingStep) -> bool:
        if options not in tried:
            report(options)
            tried[options] = Alternative(options, measure(step))
        return needed(tried[options].footprint.peak) <= capacity

    for change in _CHANGES:
        for options, step in _applied(footprint.step, (change,)):
            if needed(_lasting(step, footprint.parameters)) <= capacity:
                fits(options, step)
    for ladder in (_WITH_ALL_WEIGHTS, _WITH_AN_ADAPTER):
        rungs = dict(_applied(footprint.step, ladder))
        for options, step in rungs.items():
            hopeless = needed(_lasting(step, footprint.parameters)) > capacity
            # The last is what comes nearest.
            if (not hopeless or options == [*rungs][-1]) and fits(options, step):
                break
    found = list(tried.values())
    fitting = [alternative for alternative in found if needed(alternative.footprint.peak) <= capacity]
    return fitting or sorted(found, key=lambda alternative: alternative.footprint.peak)[:3]


def _lasting(step: TrainingStep, parameters: int) -> int:
    """Bytes of weights, gradients and states, which the optimiser needs all at once, and of the reference."""
    size = step.dtype.itemsize
    if step.lora_rank is not None:
        return parameters * size
    states = {"adamw": 2 * size, "adamw_8bit": 2}.get(step.optimizer, 0)
    return parameters * (2 * size + states + size * step.reference)


# --- the changes ------------------------------------------------------------------------------------------------------

# From a step to the options of the change and the step with it, or None where there is nothing to change.
_Change = Callable[[TrainingStep], "tuple[str, TrainingStep] | None"]


def _applied(step: TrainingStep, changes: Sequence[_Change]) -> Iterator[tuple[str, TrainingStep]]:
    """With the first change, the first two, and so on."""
    options: list[str] = []
    for change in changes:
        changed = change(step)
        if changed is not None:
            option, step = changed
            options.append(option)
            yield " ".join(options), step


def _checkpointing(step: TrainingStep) -> tuple[str, TrainingStep] | None:
    if step.gradient_checkpointing:
        return None
    return "--gradient_checkpointing", replace(step, gradient_checkpointing=True)


def _one_group(step: TrainingStep) -> tuple[str, TrainingStep] | None:
    if step.groups == 1:
        return None
    micro_batches = step.groups * step.gradient_accumulation_steps
    return (
        f"--per_device_train_batch_size 1 --gradient_accumulation_steps {micro_batches}",
        replace(step, groups=1, gradient_accumulation_steps=micro_batches),
    )


def _columns_of_the_reference(step: TrainingStep) -> tuple[str, TrainingStep] | None:
    if not step.reference or step.lora_rank is not None:
        return None
    return "--precompute_ref_log_probs", replace(step, precompute_ref_log_probs=True)


def _autocast(step: TrainingStep) -> tuple[str, TrainingStep] | None:
    if step.bf16 or step.dtype != torch.float32:
        return None
    return "--bf16", replace(step, bf16=True)


def _eight_bit_states(step: TrainingStep) -> tuple[str, TrainingStep] | None:
    if step.optimizer != "adamw":
        return None
    return "--optim adamw_bnb_8bit", replace(step, optimizer="adamw_8bit")


def _half_weights(step: TrainingStep) -> tuple[str, TrainingStep] | None:
    if step.dtype != torch.float32:
        return None
    return "--dtype bfloat16", replace(step, dtype=torch.bfloat16)


def _adapter(step: TrainingStep) -> tuple[str, TrainingStep] | None:
    if step.lora_rank is not None:
        return None
    return "--use_peft", replace(step, lora_rank=16)


def _shorter(step: TrainingStep) -> tuple[str, TrainingStep] | None:
    if step.completion_length == 1:
        return None
    shorter = replace(step, completion_length=step.completion_length // 2)
    return f"--max_length {shorter.length}", shorter


_CHANGES = (
    _checkpointing,
    _one_group,
    _columns_of_the_reference,
    _autocast,
    _eight_bit_states,
    _half_weights,
    _adapter,
    _shorter,
)
_WITH_ALL_WEIGHTS = (_checkpointing, _one_group, _columns_of_the_reference, _eight_bit_states, _half_weights)
_WITH_AN_ADAPTER = (_adapter, _half_weights, _checkpointing, _one_group, _shorter)
