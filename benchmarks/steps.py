"""One optimiser step of the trainer, references, policy, backward and update, with three ways to log-probabilities.

Ours, the same trainer with full logits, then log-softmax in float32 (eager), and with TRL's ``ChunkedLogProbFunction``:
the other two take the place of FastD2O's operators in the trainer's scoring, and everything else stays. A small Llama
with random weights in bfloat16, made from its configuration.

Memory is the most that was alive, gradients included, beyond weights and the optimiser's state; the longest completion
is the one with which it stays within the budget. The error is that of all gradients together, against a model in
float64.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastd2o.ops import Plan
from fastd2o.ops.grouped import Grouped, Layout

from .contestants import Logprob, eager_logprob
from .instruments import Mark, Run, peak
from .race import Patience, race
from .results import Contest, Row

if TYPE_CHECKING:
    from fastd2o import PreferenceTrainer

    from .scale import Scale

OURS = "fastd2o"
# Beyond this it is no rounding of bfloat16 in a small model.
WRONG = 0.25
# Completions are tried in multiples of so many tokens, and none longer than that.
_GRAIN, _LONGEST = 8, 2048
# What was done, which nobody asks of those who are no part of FastD2O.
_NO_PLAN = Plan.choose(tokens=1, hidden_size=1, vocab_size=2, algorithm="forward", dtype=torch.float32, device="cpu")
# In the words of allocators, of CUDA and of oneDNN.
_OUT_OF_MEMORY = ("alloc", "out of memory", "create a memory")
# What a trainer that is given batches asks of its tokenizer.
_NO_TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)


@dataclass(frozen=True)
class Step:
    """What is trained: an objective with so many positives, all weights or LoRA's."""

    title: str
    objective: str
    positives: int
    lora: bool = False


STEPS = {
    "step-d2o": Step("a step of D2O, K = 4", "d2o", 4),
    "step-d2o-lora": Step("a step of D2O, K = 4, LoRA", "d2o", 4, lora=True),
    "step-dpo": Step("a step of DPO", "dpo", 1),
}


@dataclass(frozen=True)
class StepShape:
    """Of the model and its batch of one group.

    Attributes:
        completion: tokens.
        hidden: D, a multiple of 64.
        layers: of the model.
        vocab: V.
        prompt: tokens.
        budget: bytes for which the longest completion is sought; 0 for none.
    """

    completion: int
    hidden: int
    layers: int
    vocab: int
    prompt: int = 32
    budget: float = 4e8

    @property
    def fields(self) -> dict[str, Any]:
        """As results keep it."""
        return {**asdict(self), "budget": int(self.budget), "dtype": "bfloat16"}


def measure(
    name: str,
    shape: StepShape,
    device: str,
    contestants: list[str],
    patience: Patience,
    scale: Scale,
    progress: Callable[[float], None],
) -> Contest:
    """The contestants, taking turns; each has a trainer of its own, of the same weights."""
    rows = [Row(contestant, device if contestant == OURS else None) for contestant in contestants]
    for number, row in enumerate(rows):
        with row.catching():
            row.extra_megabytes = scale(weigh, name, shape, device, row.contestant) / 1e6
            if shape.budget:
                row.longest = scale(longest, name, shape, device, row.contestant)
        progress((number + 1) / len(rows) / 2)
    with tempfile.TemporaryDirectory() as folder:
        with FlopCounterMode(display=False) as counter:
            exact = Training(name, shape, device, "eager", folder, torch.float64).gradient()
        steps: dict[str, Run] = {}
        for row in (row for row in rows if row.error is None):
            with row.catching():
                steps[row.contestant] = step = Training(name, shape, device, row.contestant, folder)
                row.check({"gradient": float(step.gradient().sub_(exact).norm() / exact.norm())}, WRONG)
        race(rows, steps, OURS, patience, device, lambda share: progress((1 + share) / 2))
    return Contest(name, shape.fields, "", counter.get_total_flops(), rows)


def weigh(name: str, shape: StepShape, device: str, contestant: str) -> int:
    """Bytes at the peak of a step, gradients included, beyond weights and the optimiser's state."""
    with tempfile.TemporaryDirectory() as folder:
        step = Training(name, shape, device, contestant, folder)
        step()
        return peak(step, device)


def longest(name: str, shape: StepShape, device: str, contestant: str) -> int:
    """Tokens of the longest completion that stays within the budget, to one part in eight and up to 2048; 0 if none
    does."""
    with tempfile.TemporaryDirectory() as folder:
        # A short batch first: it makes the optimiser's state.
        step = Training(name, replace(shape, completion=_GRAIN), device, contestant, folder)
        step()

        def fits(completion: int) -> bool:
            step.batch = _batch(STEPS[name], replace(shape, completion=completion), device)
            try:
                return peak(step, device) <= shape.budget
            except MemoryError:
                return False
            except RuntimeError as error:  # torch has no other type for what the CPU's allocator refuses
                if not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
                    raise
                return False

        low, high = 0, _GRAIN
        while low < _LONGEST and fits(high):
            low, high = high, 2 * high
        if low == _LONGEST:
            return low
        while high - low > max(_GRAIN, low // 8):
            middle = (low + high) // 2 // _GRAIN * _GRAIN
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


class Training:
    """Takes one optimiser step on a batch, whenever it is called."""

    def __init__(
        self,
        name: str,
        shape: StepShape,
        device: str,
        contestant: str,
        folder: str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.instead = CONTESTANTS[contestant]
        self.trainer = _trainer(STEPS[name], shape, device, Path(folder) / f"{contestant} {dtype}", dtype)
        self.batch = _batch(STEPS[name], shape, device)
        self.optimizer = self.trainer.create_optimizer()

    def __call__(self, mark: Mark = lambda: None) -> None:
        """References, policy and its backward, update; the mark is called before the backward."""
        self._backward(mark)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self) -> Tensor:
        """Of everything that trains, one after the other, in float64; no step is taken."""
        self._backward(lambda: None)
        found = torch.cat([p.grad.flatten().double() for p in self._trained if p.grad is not None])
        self.optimizer.zero_grad()
        return found

    def _backward(self, mark: Mark) -> None:
        model = self.trainer.model.train()
        with self.instead():
            loss = self.trainer.compute_loss(model, dict(self.batch))
            mark()
            loss.backward()

    @property
    def _trained(self) -> list[Tensor]:
        return [p for p in self.trainer.model.parameters() if p.requires_grad]


def _trainer(step: Step, shape: StepShape, device: str, folder: Path, dtype: torch.dtype) -> PreferenceTrainer:
    """A trainer without data: its steps are given their batches."""
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastd2o import PreferenceConfig, PreferenceTrainer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 64),
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
    )
    # In bfloat16 first, so that all contestants and the exact one have the same weights.
    llama: Any = LlamaForCausalLM(config)
    options: dict[str, Any] = {"memory_budget": int(shape.budget / 4)} if shape.budget else {}
    return PreferenceTrainer(
        llama.to(device, torch.bfloat16).to(dtype),
        PreferenceConfig(
            str(folder), objective=[step.objective], use_cpu=device == "cpu", save_strategy="no", **options
        ),
        processing_class=_NO_TOKENIZER,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if step.lora else None,
    )


def _batch(step: Step, shape: StepShape, device: str) -> dict[str, Tensor]:
    """A negative and its positives, of random tokens, under one prompt."""
    from fastd2o.data import PreferenceCollator
    from fastd2o.data.groups import TokenizedGroup, TokenizedSequence

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab, (1 + step.positives, shape.completion), generator=generator)
    prompt = torch.randint(shape.vocab, (shape.prompt,), generator=generator).tolist()
    sequences = tuple(TokenizedSequence((*prompt, *row), len(prompt)) for row in tokens.tolist())
    group = TokenizedGroup(1, sequences, negative=0, positives=tuple(range(1, len(sequences))))
    return {name: value.to(device) for name, value in PreferenceCollator(0)([group]).items()}


@contextmanager
def _instead(logprob: Logprob) -> Iterator[None]:
    """Score by another way to log p."""
    from fastd2o.training import scoring

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
        return Grouped(loss(part._replace(logodds=logodds)), nothing > 0, nothing.sum(), None, _NO_PLAN, 1)

    with mock.patch.multiple(scoring, linear_grouped=policy, linear_logprob=reference):
        yield


def _trl() -> AbstractContextManager[None]:
    from .contestants import peer

    return _instead(peer("trl chunked").logprob)


CONTESTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    OURS: nullcontext,
    "eager": lambda: _instead(eager_logprob),
    "trl chunked": _trl,
}
