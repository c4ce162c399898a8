"""Models and tokenizers by path or Hub name: looked for before anything heavy is imported, and found on disk first.

``flag`` is what the caller's user calls the name: a command-line flag, or an argument."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastd2o.errors import FastD2OError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
_MODEL_FILES = ("config.json", "adapter_config.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_model(name: str, flag: str = "--model") -> None:
    """Raise unless ``name`` is a folder with a model, or the name of one on the Hub that is cached here or can be
    reached.

    What can only be a path is told as missing at once, without a look at the Hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in _MODEL_FILES):
            raise FastD2OError(
                f"{flag}: the folder {name!r} has no config.json, so it holds no model. Fix: give a folder written by "
                "save_pretrained or by fastd2o train"
            )
        return
    if path.exists():
        raise FastD2OError(f"{flag}: {name!r} is a file. Fix: give the folder that holds the model")
    owner_is_a_folder = "/" in name and Path(name.split("/", 1)[0]).is_dir()
    if owner_is_a_folder or name.startswith(".") or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{flag}: there is no folder {name!r}. Fix: check the path of the model")
    _check_on_hub(name, flag)


def _check_on_hub(name: str, flag: str) -> None:
    """One question and a clear answer, where loading would ask for minutes on end when there is no network."""
    import huggingface_hub

    if any(isinstance(huggingface_hub.try_to_load_from_cache(name, file), str) for file in _MODEL_FILES):
        return
    try:
        huggingface_hub.model_info(name, timeout=10)
    except Exception as error:  # no network, offline mode, no such repository, no access: each has a type of its own
        raise FastD2OError(
            f"{flag}: there is no folder {name!r}, and the Hub gave no model of that name ({_first_line(error)}). "
            "Fix: check the path or the name"
        ) from error


def load_model(
    name: str,
    *,
    dtype: str,
    flag: str = "--model",
    device: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model; ``dtype`` is one of :data:`DTYPES`, ``device=None`` leaves it on the CPU.

    Raises:
        FastD2OError: it cannot be loaded, or not whole: nothing starts from weights that are random without anyone
            having asked for it.
    """
    from transformers import AutoModelForCausalLM

    if device is not None:
        _check_device(device)
    # Tensors of another shape are let through to be reported below, with their names.
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _one_line_errors(name, flag, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    model: PreTrainedModel = loaded[0]
    _check_complete(name, flag, loaded[1])
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model


def load_outline(name: str, *, flag: str = "--model", trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model ``name`` without memory for its weights: its vocabulary, the length of its context.

    Raises:
        FastD2OError: its configuration cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _one_line_errors(name, flag, "model"), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        outline: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return outline


def load_tokenizer(name: str, *, flag: str = "--model", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved beside a model."""
    from transformers import AutoTokenizer

    with _one_line_errors(name, flag, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def _check_complete(name: str, flag: str, info: dict[str, Any]) -> None:
    """Raise if ``from_pretrained`` filled a weight with random numbers, which it does for all it does not find."""
    absent, misshapen = sorted(info["missing_keys"]), sorted(key for key, *_ in info["mismatched_keys"])
    problems = [
        f"{_listed(keys)} {what}" for keys, what in ((absent, "missing"), (misshapen, "of another shape")) if keys
    ]
    problems += info["error_msgs"]
    if problems:
        raise FastD2OError(
            f"{flag}: the weights in {name!r} are not those of the causal LM that its config.json describes: "
            f"{'; '.join(problems)}. They would start as random numbers. Fix: give the folder of a whole model, saved "
            "from one that AutoModelForCausalLM loaded"
        )


def _listed(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return f"{shown} and {len(keys) - 3} more are" if len(keys) > 3 else f"{shown} {'is' if len(keys) == 1 else 'are'}"


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such kind, none of that kind, no such number
        raise FastD2OError(
            f"--device: {device!r} cannot be used here: {_first_line(error)}. Fix: cpu, or an accelerator that "
            "`fastd2o doctor` lists, such as cuda or cuda:0"
        ) from error


_COPY_AGAIN = "copy or download the model again"
# What from_pretrained says in many lines or without a way out: what to look for, the reason to give instead (None: its
# own first line), and the fix.
_KNOWN = (
    ("trust_remote_code", None, "add --trust_remote_code if you trust its authors"),
    (
        "Unrecognized configuration class",
        "its architecture is not a causal LM",
        "give a decoder-only model that AutoModelForCausalLM can load",
    ),
    (
        "instantiate the backend tokenizer",
        "it holds no tokenizer that can be read",
        "save the tokenizer beside the model (tokenizer.save_pretrained); one made with sentencepiece or tiktoken also "
        "needs that package",
    ),
    ("while deserializing header", "a .safetensors file in it is cut short or damaged", _COPY_AGAIN),
    ("Weights only load failed", "a .bin file in it is damaged, or holds more than weights", _COPY_AGAIN),
)
_ATTENTION = re.compile(r"attn_implementation|flash.?att|flex.?att", re.IGNORECASE)


@contextlib.contextmanager
def _one_line_errors(name: str, flag: str, what: str) -> Iterator[None]:
    """Turn the many-line failures of ``from_pretrained`` into one that names the flag and the fix."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        text = str(error).replace(name, "")  # a path proves nothing about what went wrong
        if _ATTENTION.search(text):
            raise FastD2OError(
                f"--attn_implementation: {name!r} cannot be loaded with it: {_first_line(error)}. Fix: give one that "
                "this model has and whose package is installed, such as sdpa or eager, or leave it out"
            ) from error
        reason, fix = next(((reason, fix) for mark, reason, fix in _KNOWN if mark in text), (None, None))
        if fix is None and Path(name).expanduser().is_dir():
            fix = f"give a folder that holds the {what} as save_pretrained writes it"
        elif fix is None:
            fix = "check the path; a name on the Hub needs a network, or the model in the local cache"
        raise FastD2OError(
            f"{flag}: no {what} could be loaded from {name!r}: {reason or _first_line(error)}. Fix: {fix}"
        ) from error


def _first_line(error: BaseException) -> str:
    """What went wrong, in the first of the lines that a library has to say about it, without the full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")
