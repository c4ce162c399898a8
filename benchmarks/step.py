"""One optimiser step of D2O, policy and reference, with three ways to a log-probability in the same trainer.

    python -m benchmarks.step                             K 11, a Llama of 4 layers with D 512 and vocabulary 128256

Ours, the same trainer with full logits, then log-softmax in float32 (eager), and with TRL's ``ChunkedLogProbFunction``:
the other two take the place of FastD2O's operators in the trainer's scoring, and everything else stays. Full training
and LoRA, in bfloat16, on random weights. They take turns; time is the median, and its ratio to ours the median of those
within a round. Memory is the most that was alive beyond weights, gradients and the optimiser's state. Written to
benchmarks/results/step/. On the CPU the allocator keeps its memory, as in benchmarks/preference.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.instruments import peak, timed
from benchmarks.logprob import machine
from benchmarks.preference import keep_memory
from benchmarks.results import FOLDER, median_ratio
from fastd2o import PreferenceConfig, PreferenceTrainer
from fastd2o.data import PreferenceCollator
from fastd2o.data.groups import TokenizedGroup, TokenizedSequence
from fastd2o.ops import Plan
from fastd2o.ops.grouped import Grouped, Layout
from fastd2o.training import scoring

OURS = "fastd2o"
# What a trainer that is given batches asks of its tokenizer.
NO_TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)
SHAPE = ("positives", "prompt", "completion", "hidden", "layers", "vocab")
Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(argv: list[str] | None = None) -> None:
    """Measure, write, show."""
    arguments = parse(argv)
    keep_memory()
    logging.set_verbosity_error()
    rows = [row for lora in (False, True) for row in measure(arguments, lora)]
    result = {
        "machine": machine(arguments.device),
        "shape": {name: getattr(arguments, name) for name in SHAPE},
        "rows": rows,
    }
    path = arguments.out / f"{arguments.device}-k{arguments.positives}-v{arguments.vocab}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(Console(width=None if sys.stdout.isatty() else 140), result)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--positives", type=int, default=11, help="K, anchors of the group")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER / "step", help="folder to write to")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace, lora: bool) -> list[dict[str, Any]]:
    """The contestants, full training or LoRA, taking turns; each has a trainer of its own, of the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        batch = make_batch(arguments)
        steps = {
            name: Step(make_trainer(arguments, lora, Path(folder) / str(number)), batch, contestant)
            for number, (name, contestant) in enumerate(CONTESTANTS.items())
        }
        losses = {name: step() for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in track(range(arguments.rounds), description="LoRA" if lora else "full"):
            for name, step in steps.items():
                times[name].append(timed(step, arguments.device))
        return [
            {
                "training": "LoRA" if lora else "full",
                "contestant": name,
                "seconds": median(times[name]),
                "over_fastd2o": median_ratio(times[name], times[OURS]),
                "extra_megabytes": (peak(step, arguments.device) - step.gradient_bytes) / 1e6,
                "loss": losses[name],
            }
            for name, step in steps.items()
        ]


class Step:
    """One optimiser step on a batch."""

    def __init__(
        self,
        trainer: PreferenceTrainer,
        batch: dict[str, Tensor],
        contestant: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.trainer, self.batch, self.contestant = trainer, batch, contestant
        self.optimizer = trainer.create_optimizer()

    def __call__(self) -> float:
        """References, policy, backward, update; the loss."""
        model = self.trainer.model.train()
        with self.contestant():
            loss = self.trainer.compute_loss(model, self.batch)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @property
    def gradient_bytes(self) -> int:
        """Of everything that trains."""
        return sum(p.nbytes for p in self.trainer.model.parameters() if p.requires_grad)


def make_trainer(arguments: argparse.Namespace, lora: bool, folder: Path) -> PreferenceTrainer:
    """A trainer without data: its steps are given their batches."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        max_position_embeddings=arguments.prompt + arguments.completion,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).to(arguments.device, torch.bfloat16)
    return PreferenceTrainer(
        model,
        PreferenceConfig(str(folder), objective=["d2o"], use_cpu=arguments.device == "cpu", save_strategy="no"),
        processing_class=NO_TOKENIZER,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )


def make_batch(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """A negative and K anchors of random tokens under one prompt."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(arguments.vocab, (1 + arguments.positives, arguments.completion), generator=generator)
    prompt = torch.randint(arguments.vocab, (arguments.prompt,), generator=generator).tolist()
    sequences = tuple(TokenizedSequence((*prompt, *row), len(prompt)) for row in tokens.tolist())
    group = TokenizedGroup(1, sequences, negative=0, positives=tuple(range(1, len(sequences))))
    return {name: value.to(arguments.device) for name, value in PreferenceCollator(0)([group]).items()}


@contextmanager
def _ours() -> Iterator[None]:
    yield


@contextmanager
def _instead(logprob: Logprob) -> Iterator[None]:
    """Score by another way to log p."""

    def reference(hidden: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Tensor:
        counted = target != scoring.IGNORED
        logp = logprob(hidden[counted], weight, target[counted])
        return logp.new_zeros(target.shape).index_put((counted,), logp)

    def policy(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any, groups: int, **options: Any) -> Grouped:
        """The loss of all groups at once, of log-odds that give this log p back."""
        sequence, group, loss = rest
        flat = target.flatten()
        layout = Layout.of(flat, sequence.flatten(), group, groups, len(weight), scoring.IGNORED)
        logp = logprob(layout.gather(hidden.flatten(0, -2)), weight, layout.gather(flat))
        part = layout.part(range(groups), slice(0, layout.tokens))
        logodds = logp - torch.log1p(-logp.exp().clamp(max=1 - 1e-7))
        nothing = logp.new_zeros(groups)
        plan = Plan.of(hidden, weight)
        return Grouped(loss(part._replace(logodds=logodds)), nothing > 0, nothing.sum(), None, plan, 1)

    with mock.patch.multiple(scoring, linear_grouped=policy, linear_logprob=reference):
        yield


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def _trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # 8192 columns is the chunk that TRL's DPOTrainer passes; no optional outputs.
    result: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ())[0]
    return result


CONTESTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    OURS: _ours,
    "eager": lambda: _instead(_eager),
    "trl chunked": lambda: _instead(_trl),
}


def show(console: Console, result: dict[str, Any]) -> None:
    """A table."""
    console.print(", ".join(f"{name} {value}" for name, value in {**result["machine"], **result["shape"]}.items()))
    table = Table("training", "log p by", "seconds", "/ fastd2o", "MB", "loss")
    for row in result["rows"]:
        table.add_row(
            row["training"],
            row["contestant"],
            f"{row['seconds']:.2f}",
            f"{row['over_fastd2o']:.2f}",
            f"{row['extra_megabytes']:,.0f}",
            f"{row['loss']:.4f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
