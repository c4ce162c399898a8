"""From messages to text: the chat template is applied to the whole conversation, and the completion is located in it.

Rendering prompt and completion apart would move the boundary: templates add headers between turns, strip whitespace,
and some rewrite earlier turns once a later one exists (dropping old reasoning, for example).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastd2o.data.formats import Completion, Group, Message, Messages
from fastd2o.data.prefix import common_prefix_length
from fastd2o.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a template can do to a prompt, as the report puts it.
REWRITTEN_TURNS = "earlier turns rewritten by the chat template"
OTHER_OPENING = "the chat template begins an answer otherwise than its generation prompt"


class BadRow(Exception):
    """A row that cannot be used; whether that stops the run or drops the row is the caller's ``bad_rows``."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True)
class PromptSuffix:
    """Text appended to the prompt (to the last user message of a conversation), one for each role of the completion.

    NAT, "Learning From Failure" (Wang et al. 2024), trains on right and wrong answers under different prompts.
    """

    positive: str
    negative: str


@dataclass(frozen=True)
class Rendered:
    """The text of one sequence, prompt and completion together.

    Attributes:
        text: what is tokenised, once.
        boundary: the completion is ``text[boundary:]``.
        conversational: whether a chat template wrote the text, special tokens included.
        closed: whether the text ends with a special token that stops generation.
        repair: how the prompt in the text differs from the prompt rendered alone, if it does.
        cut: whether a length limit cut the completion; then nothing follows its last word, neither EOS nor what the
            template closes a turn with.
    """

    text: str
    boundary: int
    conversational: bool
    closed: bool
    repair: str | None = None
    cut: bool = False


class Renderer:
    """Renders the completions of a group, each behind the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_suffix: PromptSuffix | None = None) -> None:
        self.tokenizer = tokenizer
        self.prompt_suffix = prompt_suffix
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._stops = (*tokenizer.all_special_tokens, *special)

    def __call__(self, group: Group) -> list[Rendered]:
        """Render every completion of a group, in the order of ``group.completions``.

        Raises:
            BadRow: the chat template refuses the conversation, or a suffix has no user message to go to.
            DataError: the group is a conversation and the tokenizer has no chat template.
        """
        if group.conversational and not self.tokenizer.chat_template:
            raise DataError(
                "the dataset is conversational but the tokenizer has no chat template. Fix: set "
                "tokenizer.chat_template (or add chat_template.jinja to the model directory), or give prompts and "
                "completions as text"
            )
        return [self._render(group, completion) for completion in group.completions]

    def _render(self, group: Group, completion: Completion) -> Rendered:
        suffix = ""
        if self.prompt_suffix is not None:
            suffix = self.prompt_suffix.negative if completion is group.negative else self.prompt_suffix.positive
        prompt, answer = group.prompt, completion.content
        if isinstance(prompt, str) and isinstance(answer, str):
            opening = prompt + suffix
            return Rendered(opening + answer, len(opening), conversational=False, closed=False, cut=completion.cut)
        assert not isinstance(prompt, str)
        assert not isinstance(answer, str)
        rendered = self._render_conversation(_with_suffix(prompt, suffix) if suffix else prompt, answer)
        return self._without_closing(rendered, prompt, answer) if completion.cut else rendered

    def _render_conversation(self, prompt: Messages, answer: Messages) -> Rendered:
        text = self._apply_template([*prompt, *answer])
        opening = self._apply_template(prompt, add_generation_prompt=True)
        boundary, repair = len(opening), None
        if not text.startswith(opening):
            boundary = self._find_answer(prompt, answer, text, opening)
            repair = OTHER_OPENING if text.startswith(self._apply_template(prompt)) else REWRITTEN_TURNS
        closed = text.rstrip().endswith(self._stops)
        return Rendered(text, boundary, conversational=True, closed=closed, repair=repair)

    def _without_closing(self, rendered: Rendered, prompt: Messages, answer: Messages) -> Rendered:
        """Leave off what the template puts behind the last word: what two conversations that differ there share."""
        last = answer[-1]
        other = self._apply_template([*prompt, *answer[:-1], {**last, "content": _other(last["content"])}])
        closing = common_prefix_length(rendered.text[::-1], other[::-1])
        return replace(rendered, text=rendered.text[: len(rendered.text) - closing], cut=True)

    def _find_answer(self, prompt: Messages, answer: Messages, text: str, opening: str) -> int:
        """Where the answer begins in a conversation that does not begin with its prompt rendered alone.

        The common prefix of the two is no use: it ends at the first earlier turn that was rewritten, and all that
        follows, the user's words too, would be trained on. The same conversation with another answer is rewritten in
        the same way, so the two texts part where the answer begins.
        """
        first, *rest = answer
        other_answer = {"role": first["role"], "content": _other(first["content"])}
        parting = common_prefix_length(text, self._apply_template([*prompt, other_answer, *rest]))
        # The template may begin both answers with the same words (an empty thought). Those belong to the answer, which
        # starts right after the generation prompt, where that is found behind the last message of the prompt.
        before = self._apply_template(prompt)
        header = opening[len(before) :] if opening.startswith(before) else ""
        other_prompt = {**prompt[-1], "content": _other(prompt[-1]["content"])}
        other_text = self._apply_template([*prompt[:-1], other_prompt, *answer])
        asked = len(text) - common_prefix_length(text[::-1], other_text[::-1])
        found = text.rfind(header, asked, parting) if header else -1
        return parting if found < 0 else found + len(header)

    def _apply_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:
            raise BadRow(
                f"refused by the chat template ({error})", "give the roles and fields that the template expects"
            ) from error
        assert isinstance(text, str)
        return text


def _other(content: str) -> str:
    """A content that differs from another in its first and its last character."""
    stripped = content.strip()
    return next(digit for digit in "012" if digit not in (stripped[:1], stripped[-1:]))


def _with_suffix(prompt: Messages, suffix: str) -> Messages:
    for index in range(len(prompt) - 1, -1, -1):
        if prompt[index]["role"] == "user":
            message = {**prompt[index], "content": prompt[index]["content"] + suffix}
            return (*prompt[:index], message, *prompt[index + 1 :])
    raise BadRow("no user message to take the prompt suffix", "give every prompt a message with the role user")
