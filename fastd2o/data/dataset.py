"""From a source of rows to the dataset a trainer takes."""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch.utils.data import Dataset

from fastd2o.data.formats import POSITIVES, Group, Positives, parse_row
from fastd2o.data.groups import Assembler, TokenizedGroup, TokenizedSequence
from fastd2o.data.render import BadRow, PromptSuffix, Rendered, Renderer
from fastd2o.data.report import DataReport
from fastd2o.data.rows import Origin, Row, Source, load_rows
from fastd2o.data.tokenize import Encoder
from fastd2o.errors import DataError, FastD2OWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

BadRows: TypeAlias = Literal["error", "drop"]
BAD_ROWS: tuple[BadRows, ...] = ("error", "drop")

_CHUNK_ROWS = 256  # tokenised in one call: fast tokenizers work in parallel
_LONG_ROWS = 2_000  # from here on a progress bar is worth showing


class Needs(Enum):
    """What an objective needs a group to hold."""

    PAIR = "a negative and a positive"
    NEGATIVE = "a negative"
    ANY = "a completion"

    def missing(self, negatives: int, positives: int) -> str | None:
        """What a group of so many completions lacks, or None."""
        if self is not Needs.ANY and negatives == 0:
            return "no negative"
        if self is Needs.PAIR and positives == 0:
            return "no positive"
        return None if negatives + positives else "no completion"


_FIX_MISSING = {
    "no negative": "add a rejected column, or rows with label false",
    "no positive": "run `fastd2o sample` to draw anchors for the prompts, or add a chosen or anchors column",
    "no completion": "add rows with a chosen, rejected or anchors column",
}


class PreferenceDataset(Dataset[TokenizedGroup]):
    """Tokenised groups, in memory, in the order of their rows.

    Attributes:
        groups: the groups.
        report: what became of the rows.
    """

    def __init__(self, groups: Sequence[TokenizedGroup], report: DataReport) -> None:
        self.groups = tuple(groups)
        self.report = report

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> TokenizedGroup:
        return self.groups[index]

    @property
    def sequences(self) -> tuple[TokenizedSequence, ...]:
        """Every sequence, group after group: the order in which :meth:`with_reference` takes its values."""
        return tuple(sequence for group in self.groups for sequence in group.sequences)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the longest sequence of each group, for batches of like length."""
        return [max(len(sequence.input_ids) for sequence in group.sequences) for group in self.groups]

    @property
    def has_reference(self) -> bool:
        """Whether every sequence knows the reference model's log-probability."""
        return all(sequence.ref_logp is not None for sequence in self.sequences)

    @property
    def has_harmful_reference(self) -> bool:
        """Whether every sequence knows the harmful reference model's log-probability."""
        return all(sequence.harmful_ref_logp is not None for sequence in self.sequences)

    def with_reference(
        self, ref_logps: Iterable[float] | None = None, harmful_ref_logps: Iterable[float] | None = None
    ) -> PreferenceDataset:
        """The same groups with reference log-probabilities filled in.

        Args:
            ref_logps: one value for each of :attr:`sequences`, in order; None leaves what is there.
            harmful_ref_logps: the same for D2O's harmful reference.

        Raises:
            ValueError: the number of values differs from the number of sequences.
        """
        sequences = self.sequences
        known = [sequence.ref_logp for sequence in sequences]
        known_harmful = [sequence.harmful_ref_logp for sequence in sequences]
        logps = _one_per_sequence("ref_logps", ref_logps, known)
        harmful_logps = _one_per_sequence("harmful_ref_logps", harmful_ref_logps, known_harmful)
        remaining = (
            replace(sequence, ref_logp=logp, harmful_ref_logp=harmful_logp)
            for sequence, logp, harmful_logp in zip(sequences, logps, harmful_logps, strict=True)
        )
        groups = [replace(group, sequences=tuple(next(remaining) for _ in group.sequences)) for group in self.groups]
        return PreferenceDataset(groups, self.report)

    def fingerprint(self) -> str:
        """A sha256, in hexadecimal, of token ids, boundaries and roles: equal wherever and whenever those are equal.

        Reference log-probabilities do not enter, so the value can serve as the key under which they are stored.
        """
        digest = hashlib.sha256()
        for group in self.groups:
            _update(digest, [len(group.sequences), group.negative, len(group.positives), *group.positives])
            for sequence in group.sequences:
                _update(digest, [len(sequence.input_ids), sequence.completion_start, *sequence.input_ids])
        return digest.hexdigest()


def _one_per_sequence(
    name: str, values: Iterable[float] | None, known: Sequence[float | None]
) -> Sequence[float | None]:
    if values is None:
        return known
    given = [float(value) for value in values]
    if len(given) != len(known):
        raise ValueError(
            f"{name} has {len(given)} values for {len(known)} sequences. Fix: give one for each of dataset.sequences"
        )
    return given


def _update(digest: hashlib._Hash, numbers: list[int]) -> None:
    digest.update(struct.pack(f"<{len(numbers)}q", *numbers))


def build_dataset(
    source: Source,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    needs: Needs,
    max_length: int | None = 1024,
    positives: Positives = "auto",
    bad_rows: BadRows = "error",
    truncate_prompt: bool = False,
    prompt_suffix: PromptSuffix | None = None,
    progress: bool = True,
) -> PreferenceDataset:
    """Read, interpret and tokenise a dataset.

    Args:
        source: what :func:`load_rows` takes.
        processing_class: the tokenizer, or a processor that holds one.
        needs: what every group must hold. Groups that lack it are dropped and counted.
        max_length: tokens of prompt and completion together, at least 2; None for no limit. See
            :class:`~fastd2o.data.groups.Assembler` for what is cut.
        positives: ``"auto"`` takes the anchors where a row has that column, else the chosen completion; ``"chosen"``
            and ``"anchors"`` take only those.
        bad_rows: what to do with a row whose completion is empty, whose prompt is too long, or that the chat template
            refuses: ``"error"`` raises, naming all of them, ``"drop"`` leaves them out and counts them.
        truncate_prompt: cut long prompts on the left instead.
        prompt_suffix: text appended to every prompt, according to the role of the completion.
        progress: show a progress bar when there are many rows and the output is a terminal.

    Returns:
        The dataset. When a row was dropped or repaired, its ``report`` is also given as a :class:`FastD2OWarning`.

    Raises:
        DataError: a row fits no format, rows are bad (``bad_rows="error"``), or no row is left.
        ValueError: an option has a value it cannot have.
    """
    _check_choice("positives", positives, POSITIVES)
    _check_choice("bad_rows", bad_rows, BAD_ROWS)
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length is {max_length}; expected at least 2 (a prompt token and a completion token), or None"
        )
    rows = load_rows(source)
    builder = GroupBuilder(
        Origin.of(source), _tokenizer_of(processing_class), needs, max_length, positives, truncate_prompt, prompt_suffix
    )
    groups = list(builder.build(rows, progress))
    builder.report.kept = len(groups)
    if bad_rows == "error":
        builder.refuse_bad_rows()
    if not groups:
        builder.refuse_empty()
    if not builder.report.clean:
        warnings.warn(str(builder.report), FastD2OWarning, stacklevel=2)
    return PreferenceDataset(groups, builder.report)


class GroupBuilder:
    """Takes rows through the stages and keeps the account; arguments as for :func:`build_dataset`.

    Attributes:
        report: what became of the rows.
    """

    def __init__(
        self,
        origin: Origin,
        tokenizer: PreTrainedTokenizerBase,
        needs: Needs,
        max_length: int | None,
        positives: Positives,
        truncate_prompt: bool,
        prompt_suffix: PromptSuffix | None,
    ) -> None:
        self.needs = needs
        self.positives: Positives = positives
        self.render = Renderer(tokenizer, prompt_suffix)
        self.encode = Encoder(tokenizer)
        self.assemble = Assembler(
            tokenizer, max_length=max_length, truncate_prompt=truncate_prompt, own_prompt=prompt_suffix is None
        )
        self.report = DataReport(origin)
        self.fixes: dict[str, str] = {}  # of bad rows, by reason

    def build(self, rows: Sequence[Row], progress: bool) -> Iterator[TokenizedGroup]:
        """The groups of ``rows``, in order; one that cannot be used is left out and counted."""
        from tqdm import tqdm

        self.report.rows = len(rows)
        quiet = not progress or len(rows) < _LONG_ROWS
        # disable=None: shown on a terminal only.
        with tqdm(total=len(rows), desc="Tokenizing", unit="row", disable=True if quiet else None) as bar:
            for first in range(0, len(rows), _CHUNK_ROWS):
                chunk = rows[first : first + _CHUNK_ROWS]
                yield from self._build_chunk(chunk)
                bar.update(len(chunk))

    def _build_chunk(self, rows: Sequence[Row]) -> Iterator[TokenizedGroup]:
        rendered = list(self._render_rows(rows))
        encoded = iter(self.encode([text for _, texts in rendered for text in texts]))
        for group, texts in rendered:
            sequences = [next(encoded) for _ in texts]
            try:
                assembled = self.assemble(group, sequences)
            except BadRow as bad:
                self._drop_bad(group.line, bad)
                continue
            finished = assembled.group
            if self._lacks(group.line, finished.negative >= 0, len(finished.positives)):
                continue
            for reason in assembled.repairs:
                self.report.repair(reason, group.line)
            for remark in assembled.notes:
                self.report.note(remark, group.line)
            yield finished

    def _render_rows(self, rows: Sequence[Row]) -> Iterator[tuple[Group, list[Rendered]]]:
        for row in rows:
            group = parse_row(row, positives=self.positives, origin=self.report.origin)
            if self._lacks(group.line, group.negative is not None, len(group.positives)):
                continue
            try:
                yield group, self.render(group)
            except BadRow as bad:
                self._drop_bad(group.line, bad)

    def _lacks(self, line: int, negatives: int, positives: int) -> bool:
        missing = self.needs.missing(negatives, positives)
        if missing is not None:
            self.report.drop(missing, line)
        return missing is not None

    def _drop_bad(self, line: int, bad: BadRow) -> None:
        self.report.drop(bad.reason, line)
        self.fixes[bad.reason] = bad.fix

    def refuse_bad_rows(self) -> None:
        """Raise if rows were bad."""
        if self.fixes:
            bad = {reason: self.report.dropped[reason] for reason in self.fixes}
            count = sum(map(len, bad.values()))
            raise DataError(
                f"{self.report.origin.name}: {count} of {self.report.rows} rows cannot be used: {self._listed(bad)}. "
                f'Fix: {"; ".join(self.fixes.values())}; or set bad_rows="drop" to leave them out'
            )

    def refuse_empty(self) -> None:
        """Raise because no row is left."""
        dropped = self.report.dropped
        fixes = dict.fromkeys({**_FIX_MISSING, **self.fixes}[reason] for reason in dropped)
        raise DataError(
            f"{self.report.origin.name}: no row is left; each needs {self.needs.value}: {self._listed(dropped)}. "
            f"Fix: {'; '.join(fixes)}"
        )

    def _listed(self, reasons: dict[str, list[int]]) -> str:
        return "; ".join(self.report.describe(reason, lines) for reason, lines in reasons.items())


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__}; expected a tokenizer, such as "
            "AutoTokenizer.from_pretrained(model)"
        )
    return tokenizer
