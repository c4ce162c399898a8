"""What rows mean: every accepted format becomes a :class:`Group`, one prompt with its negative and its positives.

======================================  ==================================================================
columns                                 group
======================================  ==================================================================
``prompt, chosen, rejected``            negative ``rejected``, positive ``chosen``
``chosen, rejected``                    the same; the prompt is what the two begin with (see below)
``prompt, rejected``                    a negative alone
``prompt, completion, label``           a positive where ``label`` is true, a negative where it is false
``anchors`` beside any negative         a list of completions sampled from a model: the positives of D2O
``anchor_cut`` beside ``anchors``       a list of booleans: true where a length limit cut the anchor
``chosen_cut``, ``rejected_cut``, …     a boolean: true where a length limit cut the completion of that name
======================================  ==================================================================

Each is *standard* (text) or *conversational* (lists of ``{"role", "content"}`` messages), the same style in the whole
row. Text is joined as it is: a space between prompt and completion has to be in one of them. A column that is None
counts as absent, an empty list of anchors does not; columns not named here are ignored. Where a row fits several
formats, the first that fits is meant.

*Implicit prompts.* Conversations: the messages that both begin with. Text: the longest common beginning, cut back to
just before its last run of whitespace, so that no word is split and the space stays with the completion.

*Reference log-probabilities*, optional: ``ref_chosen_logps``, ``ref_rejected_logps``, ``ref_completion_logps``
(numbers), ``ref_anchor_logps`` (one per anchor), and the same with the prefix ``harmful_`` for D2O's second reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from fastd2o.data.prefix import common_prefix_length
from fastd2o.data.rows import Origin, Row
from fastd2o.errors import DataError

Message: TypeAlias = Mapping[str, Any]
Messages: TypeAlias = tuple[Message, ...]
Content: TypeAlias = str | Messages
Positives: TypeAlias = Literal["auto", "chosen", "anchors"]

POSITIVES: tuple[Positives, ...] = ("auto", "chosen", "anchors")
FORMATS = "{prompt, chosen, rejected}, {chosen, rejected}, {prompt, rejected}, {prompt, completion, label}"


@dataclass(frozen=True)
class Completion:
    """One way to answer a prompt.

    Attributes:
        content: text, or messages.
        ref_logp: the reference model's log-probability, summed over its tokens, if the row gives it.
        harmful_ref_logp: the same of D2O's harmful reference.
        cut: whether a length limit cut it, so that its last token is not where the answer ends.
    """

    content: Content
    ref_logp: float | None = None
    harmful_ref_logp: float | None = None
    cut: bool = False

    @property
    def blank(self) -> bool:
        """Whether there is nothing to read in it."""
        if isinstance(self.content, str):
            return not self.content.strip()
        return not any(message["content"].strip() or message.get("tool_calls") for message in self.content)


@dataclass(frozen=True)
class Group:
    """A prompt with at most one negative and any number of positives, as text or messages.

    Wherever the completions of a group are listed, the negative comes first.

    Attributes:
        line: the row it came from.
        prompt: text, or messages.
        negative: what the model should not say, if the row has it.
        positives: the anchors, or the chosen completion; may be empty.
        sampled: whether the positives are anchors, drawn from a model rather than written.
    """

    line: int
    prompt: Content
    negative: Completion | None
    positives: tuple[Completion, ...]
    sampled: bool

    @property
    def completions(self) -> tuple[Completion, ...]:
        """The negative, if any, then the positives."""
        return self.positives if self.negative is None else (self.negative, *self.positives)

    @property
    def conversational(self) -> bool:
        """Whether prompt and completions are messages."""
        return not isinstance(self.prompt, str)


def parse_row(row: Row, *, positives: Positives = "auto", origin: Origin | None = None) -> Group:
    """Interpret one row.

    Args:
        row: a row of :func:`fastd2o.data.load_rows`.
        positives: ``"auto"`` takes the anchors where the row has that column, else the chosen completion; ``"chosen"``
            and ``"anchors"`` take only those. An empty list of anchors was sampled, and nothing came of it: no
            positive.
        origin: how error messages refer to the dataset.

    Raises:
        DataError: the columns fit no format, or one holds the wrong type. The message names the line and the fix.
    """
    where = (origin or Origin("dataset", "row")).at(row.line)
    columns = {name: value for name, value in row.data.items() if value is not None}
    prompt, negative, chosen = _prompt_and_answers(columns, where)
    anchors = _anchors(columns, where) if negative is not None else ()
    sampled = positives == "anchors" or (positives == "auto" and negative is not None and "anchors" in columns)
    group = Group(row.line, prompt, negative, anchors if sampled else chosen, sampled)
    for completion in group.completions:
        _check_completion(completion, group.prompt, where)
    return group


def parse_prompt(row: Row, *, origin: Origin | None = None) -> Group:
    """Interpret one row of which only the prompt counts: a ``prompt`` column is enough, answers are left out.

    Args:
        row: a row of :func:`fastd2o.data.load_rows`.
        origin: how error messages refer to the dataset.

    Raises:
        DataError: there is no prompt, or it holds the wrong type. The message names the line and the fix.
    """
    where = (origin or Origin("dataset", "row")).at(row.line)
    columns = {name: value for name, value in row.data.items() if value is not None}
    if "prompt" in columns:
        prompt = _content(columns["prompt"], f"{where}: prompt")
    else:
        prompt, *_ = _prompt_and_answers(columns, where)
    return Group(row.line, prompt, None, (), False)


def _prompt_and_answers(
    columns: Mapping[str, Any], where: str
) -> tuple[Content, Completion | None, tuple[Completion, ...]]:
    """The prompt, the negative if any, and the chosen completion if any."""
    if "rejected" in columns and ("prompt" in columns or "chosen" in columns):
        negative = _completion(columns, "rejected", where)
        if "prompt" not in columns:
            return _split_implicit_prompt(negative, _completion(columns, "chosen", where), where)
        chosen = (_completion(columns, "chosen", where),) if "chosen" in columns else ()
        return _content(columns["prompt"], f"{where}: prompt"), negative, chosen
    if {"prompt", "completion", "label"} <= columns.keys():
        prompt = _content(columns["prompt"], f"{where}: prompt")
        completion = _completion(columns, "completion", where)
        label = columns["label"]
        if label not in (True, False):
            raise DataError(
                f"{where}: label is {label!r}. Fix: true for a completion to keep, false for one to unlearn"
            )
        return (prompt, None, (completion,)) if label else (prompt, completion, ())
    raise DataError(
        f"{where}: the columns {', '.join(map(str, columns)) or '(none)'} fit no format. Fix: name them as in one of "
        f"{FORMATS}, with an optional list of anchors beside a negative"
    )


def _completion(columns: Mapping[str, Any], name: str, where: str) -> Completion:
    return Completion(
        _content(columns[name], f"{where}: {name}"),
        _logp(columns, f"ref_{name}_logps", where),
        _logp(columns, f"harmful_ref_{name}_logps", where),
        _switch(columns.get(f"{name}_cut", False), f"{where}: {name}_cut"),
    )


def _anchors(columns: Mapping[str, Any], where: str) -> tuple[Completion, ...]:
    anchors = columns.get("anchors", ())
    if isinstance(anchors, str) or not isinstance(anchors, Sequence):
        raise DataError(
            f"{where}: anchors is a {type(anchors).__name__}. Fix: give a list of completions in the prompt's style"
        )
    contents = [_content(anchor, f"{where}: anchors[{index}]") for index, anchor in enumerate(anchors)]
    ref_logps = _anchor_logps(columns, "ref_anchor_logps", len(contents), where)
    harmful_ref_logps = _anchor_logps(columns, "harmful_ref_anchor_logps", len(contents), where)
    cut = _per_anchor(columns, "anchor_cut", len(contents), "booleans", where) or [False] * len(contents)
    cut = [_switch(value, f"{where}: anchor_cut[{index}]") for index, value in enumerate(cut)]
    return tuple(map(Completion, contents, ref_logps, harmful_ref_logps, cut))


def _switch(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"{what} is {value!r}. Fix: true where a length limit cut the completion, else false")
    return value


def _anchor_logps(columns: Mapping[str, Any], name: str, count: int, where: str) -> Sequence[float | None]:
    values = _per_anchor(columns, name, count, "numbers", where)
    if values is None:
        return [None] * count
    return [_number(value, f"{where}: {name}[{index}]") for index, value in enumerate(values)]


def _per_anchor(columns: Mapping[str, Any], name: str, count: int, kind: str, where: str) -> Sequence[Any] | None:
    """A column with one value for each anchor, or None if the row has none."""
    values = columns.get(name)
    if values is not None and (isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count):
        raise DataError(f"{where}: {name} must be a list of {count} {kind}, one per anchor. Fix: correct or remove it")
    return values


def _logp(columns: Mapping[str, Any], name: str, where: str) -> float | None:
    return _number(columns[name], f"{where}: {name}") if name in columns else None


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{what} is {value!r}. Fix: give a finite number, or remove the column")
    return float(value)


def _content(value: Any, what: str) -> Content:
    if isinstance(value, str):
        return _text(value, what)
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        if not value:
            raise DataError(f"{what} is an empty list. Fix: give at least one message")
        return tuple(_message(message, f"{what}[{index}]") for index, message in enumerate(value))
    raise DataError(
        f"{what} is a {type(value).__name__}; expected text or a list of messages. "
        'Fix: write it as "…" or as [{"role": "…", "content": "…"}]'
    )


def _message(message: Mapping[str, Any], what: str) -> Message:
    # Arrow tables fill every key that some other message has with None; templates test for presence.
    fields = {name: value for name, value in message.items() if value is not None}
    if not isinstance(fields.get("role"), str):
        raise DataError(f'{what} has no role. Fix: every message needs "role" and "content"')
    content = fields.get("content", "" if "tool_calls" in fields else None)
    if not isinstance(content, str):
        raise DataError(
            f"{what}: content is a {type(content).__name__}. Fix: give text; images and lists of parts are unsupported"
        )
    return {**fields, "content": _text(content, f"{what}: content")}


def _text(value: str, what: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a surrogate pair ({error}). Fix: remove or repair that character"
        ) from error
    return value


def _split_implicit_prompt(
    negative: Completion, chosen: Completion, where: str
) -> tuple[Content, Completion, tuple[Completion]]:
    """Take what both begin with as the prompt (TRL calls the format an implicit prompt)."""
    if isinstance(negative.content, str) is not isinstance(chosen.content, str):
        raise DataError(f"{where}: chosen and rejected differ in style. Fix: make both text, or both lists of messages")
    length = common_prefix_length(negative.content, chosen.content)
    if isinstance(negative.content, str):
        words = re.match(r".*\S(?=\s)", negative.content[:length], re.DOTALL)
        length = words.end() if words else 0
    else:
        # At least the last message of each answers the prompt, even when the two conversations are the same.
        length = min(length, len(negative.content) - 1, len(chosen.content) - 1)
    if length == 0:
        raise DataError(f"{where}: chosen and rejected share no beginning to be the prompt. Fix: add a prompt column")
    return chosen.content[:length], _drop_prefix(negative, length), (_drop_prefix(chosen, length),)


def _drop_prefix(completion: Completion, length: int) -> Completion:
    return replace(completion, content=completion.content[length:])


def _check_completion(completion: Completion, prompt: Content, where: str) -> None:
    if isinstance(completion.content, str) is not isinstance(prompt, str):
        styles = ("text", "messages") if isinstance(prompt, str) else ("messages", "text")
        raise DataError(
            f"{where}: the prompt is {styles[0]} but a completion is {styles[1]}. Fix: write the row in one style, or "
            "remove the prompt column if chosen and rejected hold whole conversations"
        )
    if not isinstance(prompt, str) and completion.content[: len(prompt)] == prompt:
        raise DataError(
            f"{where}: a completion repeats the messages of the prompt. Fix: remove them from the completion, or "
            "remove the prompt column if chosen and rejected hold whole conversations"
        )
