"""Models and tokenizers by path or Hub name: looked for before anything heavy is imported, and found on disk first.

``flag`` is what the caller's user calls the name: a command-line flag, or an argument."""

from __future__ import annotations

import contextlib
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FastD2OError(
            f"{flag}: there is no folder {name!r}, and the Hub gave no model of that name ({reason.rstrip('.')}). "
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
    """Load a causal language model; ``dtype`` is one of :data:`DTYPES`, ``device=None`` leaves it on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _one_line_errors(name, flag, "model"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **options)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model


def load_tokenizer(name: str, *, flag: str = "--model", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved beside a model."""
    from transformers import AutoTokenizer

    with _one_line_errors(name, flag, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _one_line_errors(name: str, flag: str, what: str) -> Iterator[None]:
    """Turn the many-line failures of ``from_pretrained`` into one that names the flag and the fix."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            fix = "add --trust_remote_code if you trust its authors"
        elif Path(name).expanduser().is_dir():
            fix = f"give a folder that holds the {what} as save_pretrained writes it"
        else:
            fix = "check the path; a name on the Hub needs a network, or the model in the local cache"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FastD2OError(f"{flag}: no {what} could be loaded from {name!r}: {reason} Fix: {fix}") from error
