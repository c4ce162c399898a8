"""Scorers: what a completion is worth, as one number; higher is better.

A scorer is called once for each prompt, with all its completions at once: whatever goes wrong is told with the prompt.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fastd2o.errors import FastD2OError
from fastd2o.loading import check_model
from fastd2o.training.sampling import as_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Candidate: TypeAlias = dict[str, Any]
"""A completion to score: ``prompt`` and ``completion``, text or messages, and the other columns of the prompt's row."""

Scorer: TypeAlias = Callable[[list[Candidate]], Sequence[float]]
"""A batch in, one number for each of it out."""


@dataclass(frozen=True)
class ScorerOptions:
    """Which scorer; exactly one of the three.

    Attributes:
        patterns: regular expressions, looked for anywhere in the completion, upper or lower case. The score is minus
            the number of patterns found: 0 is best. The embedded default: it needs no model and no code.
        function: ``module:function``, a Python callable. The folder that the run was started in is searched first.
        classifier: folder or Hub name of a Hugging Face sequence-classification model, read from safetensors, never
            with code of its own. The score is the logit of ``label``.
        label: ``classifier``: the name or the index of the class; default: the only one, or the last of several.

    Raises:
        ValueError: none or several are given, or one that cannot be read.
    """

    patterns: Sequence[str] | None = None
    function: str | None = None
    classifier: str | None = None
    label: str | int | None = None

    def __post_init__(self) -> None:
        kinds = [option.name for option in fields(self) if option.name != "label"]
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"scorer gives {' and '.join(given) or 'nothing'}; expected exactly one of: {', '.join(kinds)}"
            )
        if self.label is not None and self.classifier is None:
            raise ValueError(f"scorer: label is set, but {given[0]} has no classes. Fix: leave it out")
        if self.patterns is not None:
            _compile(self.patterns)
        if self.function is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.function):
            raise ValueError(f"scorer: function is {self.function!r}; expected 'module:function'")


def load_scorer(options: ScorerOptions, device: torch.device) -> Scorer:
    """The scorer that ``options`` name.

    Raises:
        FastD2OError, FileNotFoundError: it cannot be loaded.
    """
    if options.patterns is not None:
        return PatternScorer(options.patterns)
    if options.function is not None:
        return _import(options.function)
    assert options.classifier is not None
    return ClassifierScorer.load(options.classifier, options.label, device)


@dataclass(frozen=True)
class PatternScorer:
    """Minus the number of patterns that a completion contains."""

    patterns: Sequence[str]

    def __call__(self, batch: list[Candidate]) -> list[float]:
        """One score for each candidate."""
        patterns = _compile(self.patterns)
        return [
            -float(sum(bool(pattern.search(as_text(item["completion"]))) for pattern in patterns)) for item in batch
        ]


@dataclass(frozen=True)
class ClassifierScorer:
    """The logit of one class of a sequence-classification model, for prompt and completion together.

    A conversation is rendered by the chat template of the classifier's own tokenizer. Where that has none, and for
    text, prompt and completion are joined: text as it is, messages by line breaks.

    Attributes:
        model: the classifier, in evaluation mode.
        tokenizer: its own.
        index: of the class.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    index: int

    @classmethod
    def load(cls, name: str, label: str | int | None, device: torch.device) -> ClassifierScorer:
        """Load the classifier ``name``; ``label`` as in :class:`ScorerOptions`.

        Raises:
            FileNotFoundError: there is no such folder.
            FastD2OError: it is no classifier of safetensors, has no such class, or no way to pad.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        check_model(name, "classifier")
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            # Too long a text loses its beginning: the completion, which is judged, is at its end.
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, truncation_side="left")
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FastD2OError(
                f"scorer: no classifier could be loaded from {name!r}: {reason}. Fix: give a sequence-classification "
                "model saved as safetensors with its tokenizer, whose code is in Transformers"
            ) from error
        if info["missing_keys"]:
            raise FastD2OError(
                f"scorer: {name!r} lacks weights of a classifier ({', '.join(sorted(info['missing_keys'])[:3])}), "
                "which would be random. Fix: give a trained sequence-classification model"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        if tokenizer.pad_token_id is None:
            raise FastD2OError(f"scorer: the tokenizer in {name!r} has no pad token. Fix: set one and save it again")
        return cls(model.eval().to(device), tokenizer, _class_index(name, label, model.config.label2id))

    @torch.no_grad()
    def __call__(self, batch: list[Candidate]) -> list[float]:
        """One score for each candidate."""
        texts = [self._render(item) for item in batch]
        rendered = not isinstance(batch[0]["prompt"], str) and bool(self.tokenizer.chat_template)
        inputs = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            add_special_tokens=not rendered,  # a chat template has written them
            return_tensors="pt",
        ).to(self.model.device)
        return [float(score) for score in self.model(**inputs).logits[:, self.index]]

    def _render(self, item: Candidate) -> str:
        prompt, completion = item["prompt"], item["completion"]
        if isinstance(prompt, str):
            return prompt + completion
        if self.tokenizer.chat_template:
            return str(self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
        return as_text([*prompt, *completion])


def score_prompt(scorer: Scorer, row: Mapping[str, Any], completions: Sequence[Any], where: str) -> list[float]:
    """The scores of one prompt's completions, checked.

    Args:
        scorer: what to ask.
        row: the prompt's row, of which the scorer sees every column.
        completions: in the row's own style.
        where: the prompt, for messages.

    Raises:
        FastD2OError: the scorer raised, or gave anything but one finite number for each completion; names the prompt.
    """
    if not completions:
        return []
    batch = [{**row, "completion": completion} for completion in completions]
    with _told(where):
        given = scorer(batch)
        scores = [float(score) + 0.0 for score in given]  # minus no faults is 0, not -0, in files and reports
    if len(scores) != len(completions):
        raise FastD2OError(
            f"the scorer gave {len(scores)} scores for the {len(completions)} completions of {where}. {_KEPT} Fix: one "
            "number for each item of the batch, in order"
        )
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise FastD2OError(
                f"the scorer gave {score} for completion {index + 1} of {where}. {_KEPT} Fix: finite numbers only"
            )
    return scores


_KEPT = "Every finished sample and score is kept."


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # it is the user's code: anything may come
        raise FastD2OError(
            f"the scorer failed on {where}: {type(error).__name__}: {error}. {_KEPT} Fix: mend the scorer, then run "
            "the same again, which goes on with that prompt"
        ) from error


def _import(name: str) -> Scorer:
    module_name, _, path = name.partition(":")
    # A console script does not search the folder it is started in, `python -m` does.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise FastD2OError(
            f"scorer: {name!r} cannot be imported: {error}. Fix: give module:function of a module that Python finds "
            "from the folder that the run is started in"
        ) from error
    if not callable(found):
        raise FastD2OError(f"scorer: {name!r} is a {type(found).__name__}. Fix: name a function")
    return found


def _compile(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"scorer: patterns is {patterns!r}; expected a list of regular expressions, at least one")
    try:
        return [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"scorer: {error.pattern!r} is no regular expression: {error}") from error


def _class_index(name: str, label: str | int | None, classes: Mapping[str, int]) -> int:
    if label is None:
        return len(classes) - 1
    index = classes.get(str(label), label)
    names = ", ".join(sorted(classes, key=classes.__getitem__))
    if not isinstance(index, int) or not 0 <= index < len(classes):
        raise FastD2OError(f"scorer: {name!r} has no class {label!r}. Fix: one of {names}, or its index")
    return index
