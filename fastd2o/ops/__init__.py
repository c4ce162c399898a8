"""Differentiable operators: hidden states and the head's weight in, log-probabilities out, logits never held."""

from fastd2o.ops.backends import backends
from fastd2o.ops.cringe import CringeOutput, linear_cringe
from fastd2o.ops.logprob import (
    LogoddsOutput,
    LogprobOutput,
    linear_logodds,
    linear_logprob,
    sequence_logprob,
    shift_labels,
)
from fastd2o.ops.plan import Plan

__all__ = [
    "CringeOutput",
    "LogoddsOutput",
    "LogprobOutput",
    "Plan",
    "backends",
    "linear_cringe",
    "linear_logodds",
    "linear_logprob",
    "sequence_logprob",
    "shift_labels",
]
