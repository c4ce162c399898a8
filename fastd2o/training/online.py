"""Online D2O: in the middle of a run, the policy itself draws the anchors that the coming steps train on.

D2O (Duan et al., Findings of EMNLP 2024, arXiv 2403.03419) goes on, after a warm-up on anchors drawn beforehand, with
anchors resampled from the policy. Here a *window* is the steps up to the next draw. At its beginning the batches of its
steps are read ahead, so that it is known which rows come; for those, and for no others, anchors are drawn as
:mod:`fastd2o.training.sampling` draws them, scored under the reference, and put in the place of the dataset's own.

What a window trains on depends on the weights at its beginning, on the seed, the step and the rows. A checkpoint inside
a window has other weights, so it takes the window along: a run that is resumed draws nothing twice.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby, islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastd2o.data import (
    Needs,
    Origin,
    PreferenceCollator,
    PreferenceDataset,
    Row,
    TokenizedGroup,
    TokenizedSequence,
)
from fastd2o.data.dataset import GroupBuilder
from fastd2o.data.rows import Source
from fastd2o.errors import DataError, FastD2OError, FastD2OWarning
from fastd2o.training.checkpoints import ONLINE_ANCHORS
from fastd2o.training.files import write_rows
from fastd2o.training.generators import stop_ids
from fastd2o.training.references import References
from fastd2o.training.sampling import SampledRow, SamplingReport, draw_chunks, in_order, read_prompts
from fastd2o.training.scoring import Measure, hash64

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastd2o.training.config import PreferenceConfig


class OnlineAnchors:
    """Draws anchors for the batches to come, and puts them there.

    A row has as many draws as it has anchors in the dataset; equal ones are kept once. A row of which no draw is of use
    keeps the dataset's anchors for the window.

    Args:
        policy: the model in training, not wrapped; attached or not.
        tokenizer: its tokenizer.
        source: the rows that ``dataset`` was made of.
        dataset: the training data, in which rows are found by their line.
        collate: makes a batch.
        config: the run.
        references: what scores the anchors that are drawn.
        log: is given what to log of a draw.

    Raises:
        FastD2OError: nothing ends a sample: neither model nor tokenizer has an end-of-sequence token.
        fastd2o.DataError: a prompt that is too long to be answered, or another row that cannot be sampled.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Source,
        dataset: PreferenceDataset,
        collate: PreferenceCollator,
        config: PreferenceConfig,
        references: References,
        log: Callable[[dict[str, Measure]], None],
    ) -> None:
        if not stop_ids(policy.generation_config, tokenizer):
            raise FastD2OError(
                "neither the model nor its tokenizer has an end-of-sequence token, so no anchor that resample_every "
                "draws would ever end. Fix: set tokenizer.eos_token, or model.generation_config.eos_token_id"
            )
        self.policy, self.tokenizer, self.collate, self.config = policy, tokenizer, collate, config
        self.references, self.log = references, log
        assert config.resample_every is not None
        self._steps = config.resample_every
        self._origin = Origin.of(source)
        try:
            prompts, _ = read_prompts(source, policy, tokenizer, config.sampling)
        except DataError as error:
            raise DataError(f"resample_every (max_new_tokens is online_max_new_tokens here): {error}") from error
        self._prompts = {prompt.line: prompt for prompt in prompts}
        self._own = {group.line: group for group in dataset.groups}
        # The window: the step it ends before, the groups of its rows, and the lines of its batches still to come.
        self._end = 0
        self._groups: dict[int, TokenizedGroup] = {}
        self._ahead: deque[list[int]] = deque()
        self._epoch: Iterator[Mapping[str, Tensor]] | None = None

    def take(
        self, epoch: Iterator[Mapping[str, Tensor]], count: int, *, step: int, max_steps: int
    ) -> list[dict[str, Tensor]]:
        """The batches of a step, with anchors of the window that it lies in; they are drawn if it begins one.

        A window is ``resample_every`` steps, or less at the end of an epoch or of the run.

        Args:
            epoch: the batches of this process that the epoch still holds.
            count: how many the step takes.
            step: steps done so far.
            max_steps: of the run.
        """
        if epoch is not self._epoch:
            if self._epoch is not None:  # not so after a resume, where the window was begun by another run
                self._end = 0
            self._epoch, self._ahead = epoch, deque()
        if not self._ahead:
            if step >= self._end:
                self._end, self._groups = min(step + self._steps, max_steps), {}
            window = self.config.gradient_accumulation_steps
            self._ahead.extend(batch["line"].tolist() for batch in islice(epoch, (self._end - step) * window))
            self._end = step + ceil(len(self._ahead) / window)
            lines = {line for batch in self._ahead for line in batch}
            if not lines <= self._groups.keys():  # it is new, or the run was resumed with batches of another size
                self._groups = self._draw(sorted(lines), step)
        coming = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        return [self.collate([self._groups[line] for line in lines]) for lines in coming]

    def state(self) -> dict[str, Any]:
        """What is left of the window, for a checkpoint: JSON."""
        lines = dict.fromkeys(line for batch in self._ahead for line in batch)
        return {"end": self._end, "groups": [asdict(self._groups[line]) for line in lines]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue the window that :meth:`state` gave."""
        groups = map(_group_of, state["groups"])
        self._end, self._groups, self._epoch = state["end"], {group.line: group for group in groups}, None

    def _draw(self, lines: Sequence[int], step: int) -> dict[int, TokenizedGroup]:
        """The groups of ``lines`` with new anchors, and their reference log-probabilities."""
        begun = time.perf_counter()
        args = self.config
        rows = list(self._sample(lines, step))
        path = Path(args.output_dir) / ONLINE_ANCHORS / f"step-{step}_{args.process_index}.jsonl"
        write_rows(path, in_order(rows))
        builder = GroupBuilder(
            self._origin, self.tokenizer, Needs.PAIR, args.max_length, "anchors", args.truncate_prompt, None
        )
        drawn = [
            _with_others(group, self._own[group.line])
            for group in builder.build([Row(row.line, row.data) for row in rows], progress=False)
        ]
        if drawn:
            dataset = PreferenceDataset(drawn, builder.report)
            self.references.check_fits(dataset, "online")
            drawn = list(self.references.score(dataset, self.collate, args.per_device_train_batch_size).groups)
        elif rows:
            warnings.warn(
                f"no sample of step {step} is of use as an anchor: all are empty or the negative itself. The anchors "
                "of the dataset stay",
                FastD2OWarning,
                stacklevel=2,
            )
        self.log(self._measure(rows, drawn, len(lines), time.perf_counter() - begun))
        return {line: self._own[line] for line in lines} | {group.line: group for group in drawn}

    def _sample(self, lines: Iterable[int], step: int) -> Iterator[SampledRow]:
        """A row of new anchors, none of them twice, for every line that has a prompt and anchors."""

        def anchors(line: int) -> int:
            return len(self._own[line].positives)

        seed = seed_of_step(self.config.seed, step)
        sampled = sorted(filter(self._prompts.__contains__, lines), key=anchors)
        for count, some in groupby(sampled, key=anchors):
            if count == 0:
                continue
            prompts = sorted((self._prompts[line] for line in some), key=lambda prompt: len(prompt.ids), reverse=True)
            options = replace(self.config.sampling, num_anchors=count, seed=seed)
            for chunk in draw_chunks(self.policy, self.tokenizer, prompts, options, progress=False):
                yield from map(_without_repetitions, chunk)

    def _measure(
        self, rows: Sequence[SampledRow], drawn: Sequence[TokenizedGroup], wanted: int, seconds: float
    ) -> dict[str, Measure]:
        counts = SamplingReport()
        for row in rows:
            counts.add(row.counts)
        anchors = [len(group.sequences[place].completion_ids) for group in drawn for place in group.positives]
        measures = {
            "duplicates": (counts.duplicates, counts.anchors),
            "cut": (counts.cut, counts.anchors),
            "given_up": (counts.dropped, counts.anchors + counts.dropped),
            "length": (sum(anchors), len(anchors)),
            "not_drawn": (wanted - len(drawn), wanted),
            "seconds": (seconds, 1),
        }
        device = self.policy.device
        return {
            f"online/{name}": Measure(torch.tensor(total, device=device), torch.tensor(weight, device=device))
            for name, (total, weight) in measures.items()
        }


def seed_of_step(seed: int, step: int) -> int:
    """Of the draws of a step: each draws anew."""
    return hash64(f"{seed} online step {step}")


def _without_repetitions(row: SampledRow) -> SampledRow:
    """The row with equal anchors kept once: each costs forwards and backwards, and says what the first one said."""
    anchors, cut = row.data["anchors"], row.data["anchor_cut"]
    first = [place for place, anchor in enumerate(anchors) if anchor not in anchors[:place]]
    once = {"anchors": [anchors[place] for place in first], "anchor_cut": [cut[place] for place in first]}
    return replace(row, data={**row.data, **once})


def _with_others(drawn: TokenizedGroup, own: TokenizedGroup) -> TokenizedGroup:
    """``drawn`` with the sequences of ``own`` that are neither its negative nor an anchor: KTO's mismatch."""
    others = [sequence for place, sequence in enumerate(own.sequences) if place not in (own.negative, *own.positives)]
    return replace(drawn, sequences=(*drawn.sequences, *others))


def _group_of(state: Mapping[str, Any]) -> TokenizedGroup:
    """The inverse of :func:`dataclasses.asdict`, whose tuples JSON made lists."""
    sequences = (
        TokenizedSequence(**{**sequence, "input_ids": tuple(sequence["input_ids"])}) for sequence in state["sequences"]
    )
    return TokenizedGroup(**{**state, "sequences": tuple(sequences), "positives": tuple(state["positives"])})
