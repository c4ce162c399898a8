"""``fastd2o plan``: what a training step will take of memory and operations, before anything is allocated."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastd2o.cli.arguments import usage_errors
from fastd2o.cli.libraries import quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PretrainedConfig

    from fastd2o.training.fitting import Alternative
    from fastd2o.training.footprint import Footprint
    from fastd2o.training.head_costs import HeadCost

HELP = "compute the memory and the head's operations of a training step, and what would make it fit a GPU"

_EPILOG = """\
examples:
  fastd2o plan --model MODEL --objective d2o --groups 4 --positives 8 --completion_length 512 --bf16 --gpu h100
  fastd2o plan --model MODEL --lora 16 --dtype bfloat16 --gradient_checkpointing --gpu_memory 24
  fastd2o plan --model config.json --objective dpo --json
Nothing is downloaded and no weight is made: the model's config.json is enough.
"""
_DTYPES = ("float32", "bfloat16", "float16")
_GIB = 1 << 30


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastd2o plan``."""
    parser.epilog = _EPILOG
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="PATH", help="folder of a model, or its config.json")
    model.add_argument("--lora", type=int, metavar="R", help="train a LoRA adapter of this rank (default: all weights)")
    model.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights")
    batch = parser.add_argument_group("micro-batch")
    batch.add_argument("--objective", default="d2o", metavar="NAME", help="what is optimised")
    batch.add_argument("--groups", type=int, default=8, help="prompts, each with a negative")
    batch.add_argument("--positives", type=int, default=1, metavar="K", help="positives (anchors) of each prompt")
    batch.add_argument("--prompt_length", type=int, default=256, metavar="TOKENS", help="of every prompt")
    batch.add_argument("--completion_length", type=int, default=256, metavar="TOKENS", help="of every completion")
    run = parser.add_argument_group("run")
    run.add_argument("--bf16", action="store_true", help="forward under bfloat16 autocast, weights as they are")
    run.add_argument(
        "--optimizer", choices=("adamw", "adamw_8bit", "adafactor", "sgd"), default="adamw", help="its states"
    )
    run.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in the backward")
    run.add_argument("--precompute_ref_log_probs", action="store_true", help="no reference model in the step")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="micro-batches of a step")
    run.add_argument("--memory_budget", type=int, metavar="BYTES", help="of the fused head (default: 1 GiB)")
    device = parser.add_argument_group("device")
    device.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the step is to run")
    device.add_argument("--gpu", metavar="NAME", help="say whether it fits: rtx4090, a100-80, h100, ... (see docs)")
    device.add_argument("--gpu_memory", type=float, metavar="GIB", help="the same for a GPU of this size")
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Compute and print; a step that does not fit is a finding, not a failure."""
    import torch

    from fastd2o.training.fitting import alternatives, needed
    from fastd2o.training.footprint import TrainingStep, footprint
    from fastd2o.training.head_costs import head_costs

    with quiet_libraries():
        config = _read_config(args.model)
    with usage_errors():
        capacity = _capacity(args)
        step = TrainingStep(
            model=config,
            objective=args.objective,
            groups=args.groups,
            positives=args.positives,
            prompt_length=args.prompt_length,
            completion_length=args.completion_length,
            lora_rank=args.lora,
            dtype=getattr(torch, args.dtype),
            bf16=args.bf16,
            optimizer=args.optimizer,
            gradient_checkpointing=args.gradient_checkpointing,
            precompute_ref_log_probs=args.precompute_ref_log_probs,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            memory_budget=args.memory_budget,
            device=args.device,
        )
    found = footprint(step)
    instead: list[Alternative] = []
    if capacity is not None and needed(found.peak) > capacity:
        instead = alternatives(found, capacity, _progress)
    report = _report(found, head_costs(found), args.gpu, capacity, instead)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def _capacity(args: argparse.Namespace) -> int | None:
    """Bytes of the GPU that was named, if one was.

    Raises:
        ValueError: there is no such GPU, or the plan is not for one.
    """
    from fastd2o.training.fitting import GPUS

    if args.gpu is None and args.gpu_memory is None:
        return None
    if args.device != "cuda":
        raise ValueError(f"--gpu and --gpu_memory are of a GPU, and --device is {args.device}. Fix: leave them out")
    if args.gpu is not None and args.gpu_memory is not None:
        raise ValueError("--gpu and --gpu_memory both say how large the GPU is. Fix: give one of them")
    if args.gpu is None:
        if args.gpu_memory <= 0:
            raise ValueError(f"--gpu_memory is {args.gpu_memory}, expected GiB above 0")
        return int(args.gpu_memory * _GIB)
    if args.gpu not in GPUS:
        raise ValueError(
            f"--gpu {args.gpu!r} is unknown, expected one of: {', '.join(GPUS)}. Fix: --gpu_memory, in GiB"
        )
    return GPUS[args.gpu] * _GIB


def _read_config(model: str) -> PretrainedConfig:
    from transformers import AutoConfig

    from fastd2o.errors import FastD2OError

    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"--model: there is no {str(file)!r}. Fix: give the folder of a model or its config.json; nothing is "
            "downloaded for a plan"
        )
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason, fix = str(error).strip().splitlines()[0], "give the config.json that save_pretrained writes"
        if "trust_remote_code" in str(error):
            reason = "it needs code that comes with the model, which is not run for a plan."
            fix = "plan a model of the same shape that Transformers knows"
        raise FastD2OError(
            f"--model: {str(file)!r} is no configuration that can be planned with: {reason} Fix: {fix}"
        ) from error


def _progress(options: str) -> None:
    if sys.stderr.isatty():
        print(f"fastd2o: trying {options}", file=sys.stderr)


def _report(
    found: Footprint, costs: list[HeadCost], gpu: str | None, capacity: int | None, instead: list[Alternative]
) -> dict[str, Any]:
    """Everything as JSON-ready values, sizes in bytes."""
    from dataclasses import asdict

    from fastd2o.training.fitting import needed

    step = found.step

    def verdict(peak: int) -> dict[str, Any]:
        return {"peak": peak, "needed": needed(peak), "fits": capacity is not None and needed(peak) <= capacity}

    return {
        "model": {
            "name": (step.model.architectures or [step.model.model_type])[0],
            "parameters": found.parameters,
            "trained": found.trained,
            "hidden_size": found.head[0].hidden_size,
            "vocab_size": found.head[0].vocab_size,
        },
        "batch": {
            "objective": step.objective,
            "groups": step.groups,
            "sequences": step.rows,
            "length": step.length,
            "counted": step.counted,
        },
        "head": {"frozen": found.head_frozen, "ways": [asdict(cost) for cost in costs]},
        "memory": {"moments": found.moments, "fullest": found.fullest, "peak": found.peak},
        "gpu": None if capacity is None else {"name": gpu, "bytes": capacity, **verdict(found.peak)},
        "alternatives": [{"options": other.options, **verdict(other.footprint.peak)} for other in instead],
    }


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=False)
    model, batch, memory = report["model"], report["batch"], report["memory"]
    trained = "all train" if model["trained"] == model["parameters"] else f"{_count(model['trained'])} train"
    console.print(
        f"{model['name']}: {_count(model['parameters'])} parameters, {trained}; hidden size {model['hidden_size']:,}, "
        f"vocabulary {model['vocab_size']:,}"
    )
    console.print(
        f"{batch['objective']}: {batch['groups']:,} groups, {batch['sequences']:,} sequences of {batch['length']:,} "
        f"tokens, of which {batch['counted']:,} count"
    )
    console.print(_head_table(report["head"]["ways"]))
    console.print(_WHAT_IS_SKIPPED[report["head"]["frozen"]])
    console.print(_memory_table(memory["moments"], memory["fullest"]))
    if report["gpu"] is not None:
        gpu = report["gpu"]
        console.print(
            f"{gpu['name'] or 'GPU'} with {gpu['bytes'] / _GIB:.4g} GiB: {'fits' if gpu['fits'] else 'does not fit'}. "
            f"The step needs {gpu['needed'] / _GIB:.1f} GiB: {gpu['peak'] / _GIB:.1f} of tensors, 5 % for what falls "
            "between the allocator's blocks, and 1 for CUDA."
        )
    if report["alternatives"]:
        console.print(_alternatives_table(report["alternatives"]))


# What can be left out of the backward, by whether the head is frozen.
_WHAT_IS_SKIPPED = {
    False: (
        "Groups whose every coefficient is exactly 0 (a hinge that is met, a weight of 0) cost nothing in the "
        "backward. Saturated groups have small coefficients, not 0: --coefficient_tol of fastd2o train leaves those "
        "out as well, at an error it reports."
    ),
    True: (
        "The head is frozen: its work is done in the forward, before coefficients are known, so no group can be "
        "skipped there."
    ),
}


def _head_table(ways: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="Head of a micro-batch (→: what this step does)", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("way", no_wrap=True)
    table.add_column("what is done", overflow="fold")
    for name in ("tokens T", "T·D·V", "TFLOP", "MiB beyond gradients"):
        table.add_column(name, justify="right")
    for way in ways:
        table.add_row(
            "→" if way["chosen"] else "",
            way["name"],
            way["what"],
            f"{way['tokens']:,}",
            f"{way['factor']:.3g}",
            f"{way['flops'] / 1e12:.3g}",
            f"{way['extra_bytes'] / (1 << 20):,.0f}",
        )
    return table


def _memory_table(moments: dict[str, dict[str, int]], fullest: str) -> Table:
    from rich.table import Table

    table = Table(title="Memory when each part of a step takes most, GiB (→: the peak)", title_justify="left")
    table.add_column("")
    for moment in moments:
        table.add_column(f"→ {moment}" if moment == fullest else moment, justify="right")
    parts = {part: None for taken in moments.values() for part, size in taken.items() if size}
    for part in sorted(parts, key=_PARTS.index):
        sizes = [taken.get(part, 0) for taken in moments.values()]
        table.add_row(part, *(f"{size / _GIB:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("all", *(f"{sum(taken.values()) / _GIB:.2f}" for taken in moments.values()))
    return table


_PARTS = ("weights", "reference", "optimizer", "gradients", "activations", "head", "working memory")


def _alternatives_table(alternatives: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    fits = alternatives[0]["fits"]
    title = "It fits with" if fits else "Nothing that was tried fits; what comes nearest"
    table = Table(title=f"{title} (options of fastd2o train)", title_justify="left")
    table.add_column("options", overflow="fold")
    table.add_column("peak, GiB", justify="right")
    table.add_column("needs, GiB", justify="right")
    for other in alternatives:
        table.add_row(other["options"], f"{other['peak'] / _GIB:.1f}", f"{other['needed'] / _GIB:.1f}")
    return table


def _count(parameters: int) -> str:
    """39,712; 494 M; 8.03 B."""
    if parameters < 1e6:
        return f"{parameters:,}"
    size, unit = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    return f"{parameters / size:.3g} {unit}"
