"""The models of a run, before the first step: loaded, given an adapter, rid of dropout."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fastd2o import loading

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastd2o.training.config import PreferenceConfig


def load_model(model: nn.Module | str | os.PathLike[str], dtype: str, argument: str) -> nn.Module:
    """``model`` itself, or the causal LM at that path or Hub id, in ``dtype``; errors call it ``argument``.

    Raises:
        FileNotFoundError: there is no such folder.
        FastD2OError: there is no such model, or it is not a whole causal LM.
    """
    if isinstance(model, nn.Module):
        return model
    loading.check_model(str(model), argument)
    return loading.load_model(str(model), dtype=dtype, flag=argument)


def load_processing_class(model: nn.Module | str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside ``model``.

    Raises:
        ValueError: ``model`` is a module, which does not say where that is.
        FastD2OError: there is none.
    """
    if isinstance(model, nn.Module):
        raise ValueError(
            "processing_class is missing: a model given as an object brings no tokenizer. Fix: pass the tokenizer"
        )
    return loading.load_tokenizer(str(model), flag="model")


def wrap_peft(model: nn.Module, peft_config: PeftConfig, config: PreferenceConfig) -> nn.Module:
    """``model`` with a new adapter, which alone trains."""
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}, expected a peft.PeftConfig such as peft.LoraConfig(...)"
        )
    if is_peft(model):
        raise ValueError(
            "peft_config is given, and the model has an adapter already. Fix: leave peft_config out to train that "
            "adapter, or model.merge_and_unload() first"
        )
    if config.disable_dropout and getattr(peft_config, "lora_dropout", 0.0) > 0:
        raise ValueError(
            f"lora_dropout is {getattr(peft_config, 'lora_dropout', None)}, but disable_dropout switches dropout off. "
            "Fix: disable_dropout=False, or lora_dropout=0"
        )
    adapted = get_peft_model(cast("PreTrainedModel", model), peft_config)
    if config.gradient_checkpointing:
        # The inputs of the first checkpointed block come from frozen embeddings: without this, no gradient enters it.
        adapted.enable_input_require_grads()
    return adapted


def is_peft(model: nn.Module) -> bool:
    """Whether ``model`` is a PEFT model, whose adapter can be switched off."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def adapter_has_learnt(model: nn.Module) -> bool:
    """Whether a LoRA adapter of ``model`` changes it already: it is made with B = 0, which changes nothing."""
    return any("lora_B." in name and bool(parameter.any()) for name, parameter in model.named_parameters())


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of ``model`` by name, adapters of PEFT left out."""
    adapters = {f".{name}." for name in getattr(model, "peft_config", {})}
    return {
        name: weight
        for name, weight in model.state_dict().items()
        if isinstance(weight, Tensor) and not any(adapter in f"{name}." for adapter in adapters)
    }


def digest(model: nn.Module) -> str:
    """A quick sha256 of the base weights of ``model``, in hexadecimal: names, shapes and some numbers of each.

    It tells models and their fine-tunings apart, in the time that a hash of every byte would take to start.
    """
    sha = hashlib.sha256()
    for name, weight in base_weights(model).items():
        sha.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        # Not where reading a number means gathering it from other processes, or where there is none yet.
        if weight.numel() and type(weight) in (Tensor, nn.Parameter) and not weight.is_meta:
            some = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
            sha.update(some.cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in ``model`` to 0: of layers, and those that attention keeps as plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
