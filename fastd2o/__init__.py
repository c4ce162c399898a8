"""FastD2O: train language models from what they should not say.

Everything public is a name of this module. Only torch is needed to import it; what needs Transformers is imported on
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastd2o import losses
from fastd2o.errors import DataError, FastD2OError, FastD2OWarning
from fastd2o.losses import Groups, PreferenceOutput, linear_preference_loss
from fastd2o.ops import (
    CringeOutput,
    LogoddsOutput,
    LogprobOutput,
    Plan,
    backends,
    linear_cringe,
    linear_logodds,
    linear_logprob,
    sequence_logprob,
)

if TYPE_CHECKING:
    from fastd2o.models import attach, detach
    from fastd2o.training import PreferenceConfig, PreferenceTrainer

__version__ = "0.1.0"

# Name -> the module that holds it. These need the `train` extra.
_LAZY = {
    "attach": "fastd2o.models",
    "detach": "fastd2o.models",
    "PreferenceConfig": "fastd2o.training",
    "PreferenceTrainer": "fastd2o.training",
}

__all__ = [
    "CringeOutput",
    "DataError",
    "FastD2OError",
    "FastD2OWarning",
    "Groups",
    "LogoddsOutput",
    "LogprobOutput",
    "Plan",
    "PreferenceConfig",
    "PreferenceOutput",
    "PreferenceTrainer",
    "__version__",
    "attach",
    "backends",
    "detach",
    "linear_cringe",
    "linear_logodds",
    "linear_logprob",
    "linear_preference_loss",
    "losses",
    "sequence_logprob",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastd2o' has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastd2o"):
            raise
        raise ModuleNotFoundError(
            f"fastd2o.{name} needs {error.name!r}, which is not installed. Fix: pip install 'fastd2o[train]'",
            name=error.name,
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
