"""What the demo measures: on lessons that no training saw, and on the memory that the model's head takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastd2o
from fastd2o.cli.demo_world import Lesson, World
from fastd2o.data import Needs, PreferenceCollator, build_dataset
from fastd2o.memory import measure_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_NEW_TOKENS = 48
_GENERATION_BATCH = 256
_HEAD_TOKENS = 512
_LARGE_VOCABULARY = 128_256  # Llama 3's


@dataclass(frozen=True)
class Scores:
    """How the model sees written answers to held-out questions.

    Attributes:
        bad_logprob: log-probability of a whole bad answer in nats, mean over the answers.
        good_perplexity: of the good answers, per token.
    """

    bad_logprob: float
    good_perplexity: float


@dataclass(frozen=True)
class Answers:
    """What the model itself answers to held-out questions, drawn from its own distribution without any instruction.

    Attributes:
        texts: one answer for each of ``lessons``.
        bad_rate: share that the world's rule calls bad.
        helpful_rate: share that gives a right step and is not bad. What remains is neither: off the subject, or broken.
        distinct_2: distinct pairs of neighbouring words, of all such pairs in an answer; mean over the answers. It is 1
            unless they go round in circles.
        distinct_2_overall: the same over all answers together: how varied they are.
    """

    lessons: Sequence[Lesson]
    texts: Sequence[str]
    bad_rate: float
    helpful_rate: float
    distinct_2: float
    distinct_2_overall: float


class Examiner:
    """Judges a model by held-out lessons.

    Args:
        world: knows which answers are bad, and which are helpful.
        lessons: the held-out lessons.
        tokenizer: of every model that will be judged.
        samples: answers drawn for each lesson.
        seed: of those draws.
    """

    def __init__(
        self, world: World, lessons: Sequence[Lesson], tokenizer: PreTrainedTokenizerBase, *, samples: int, seed: int
    ) -> None:
        self.world = world
        self.lessons = [lesson for lesson in lessons for _ in range(samples)]
        self.tokenizer = tokenizer
        self.seed = seed
        dataset = build_dataset([lesson.row() for lesson in lessons], tokenizer, needs=Needs.PAIR, positives="chosen")
        self._batch = PreferenceCollator(tokenizer.pad_token_id)(dataset.groups)

    @torch.no_grad()
    def score(self, model: PreTrainedModel) -> Scores:
        """Score the written answers; one forward, cheap enough to follow a training with."""
        batch = self._batch
        training = model.training
        output = fastd2o.attach(model.eval())(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], fused=True
        )
        model.train(training)
        logps = output.log_probs.sum(-1)
        good = batch["positive_rows"][:, 0]
        tokens = (batch["labels"][good] != -100).sum()
        return Scores(
            bad_logprob=logps[batch["negative_row"]].mean().item(),
            good_perplexity=math.exp(-logps[good].sum().item() / tokens.item()),
        )

    @torch.no_grad()
    def interview(self, model: PreTrainedModel) -> Answers:
        """Draw fresh answers; the same model and seed give the same ones."""
        torch.manual_seed(self.seed)
        model.eval()
        texts: list[str] = []
        for start in range(0, len(self.lessons), _GENERATION_BATCH):
            prompts = self.tokenizer.apply_chat_template(
                [lesson.prompt for lesson in self.lessons[start : start + _GENERATION_BATCH]],
                tokenize=False,
                add_generation_prompt=True,
            )
            inputs = self.tokenizer(
                prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
            )
            output = model.generate(  # type: ignore[operator]  # nn.Module's attributes may be tensors
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=_MAX_NEW_TOKENS,
            )
            texts += self.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        pairs = [list(pairwise(text.split())) for text in texts]
        helpful = [self.world.is_helpful(lesson.task, text) for lesson, text in zip(self.lessons, texts, strict=True)]
        return Answers(
            lessons=self.lessons,
            texts=texts,
            bad_rate=sum(map(self.world.is_bad, texts)) / len(texts),
            helpful_rate=sum(helpful) / len(texts),
            distinct_2=sum(map(_distinct, pairs)) / len(pairs),
            distinct_2_overall=_distinct([pair for answer in pairs for pair in answer]),
        )


def _distinct(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of ``pairs`` that differ; 1 where there are none to repeat."""
    return len(set(pairs)) / len(pairs) if pairs else 1.0


@dataclass(frozen=True)
class HeadMemory:
    """Peak bytes of forward and backward of a head, beyond its inputs; the gradients of both are among them.

    Attributes:
        tokens, vocabulary: the shape of the logits that only ``full`` holds.
        full: logits, log-softmax, gather.
        fused: :func:`fastd2o.linear_logprob`.
    """

    tokens: int
    vocabulary: int
    full: int
    fused: int


def measure_heads(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> list[HeadMemory]:
    """Measure the head on a batch of D2O: under the model's own vocabulary, and under one of the usual size.

    The weights of the second are random, of the same spread: memory does not depend on them.
    """
    batch = PreferenceCollator(tokenizer.pad_token_id)(build_dataset(rows, tokenizer, needs=Needs.PAIR).groups)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    with torch.no_grad():
        hidden, weight = fastd2o.attach(model)(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            fused=lambda hidden, weight, **options: (hidden, weight),
        ).head
    tokens, targets = hidden[:, :-1][counted][:_HEAD_TOKENS], labels[counted][:_HEAD_TOKENS]
    large = torch.randn(_LARGE_VOCABULARY, weight.shape[1], generator=torch.Generator().manual_seed(0))
    return [measure_head(tokens, head, targets) for head in (weight, large.mul_(weight.std()))]


def measure_head(hidden: Tensor, weight: Tensor, target: Tensor) -> HeadMemory:
    """Measure both ways to the log-probabilities of ``target``, from the allocator's own records.

    Args:
        hidden: [T, D], the last hidden states of the tokens that count.
        weight: [V, D], the head.
        target: [T] int64.
    """

    def full(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs = F.log_softmax(hidden @ weight.T, dim=-1)
        return logprobs.gather(-1, target[:, None])[:, 0]

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return fastd2o.linear_logprob(hidden, weight, target)

    def peak(logprob: Callable[[Tensor, Tensor], Tensor]) -> int:
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        return measure_memory(lambda: torch.autograd.grad(logprob(*inputs).sum(), inputs), warm_up=False).peak

    return HeadMemory(len(target), len(weight), peak(full), peak(fused))
