"""Preference and unlearning losses: log-probabilities in, loss out. Pure functions, no vocabulary in sight."""

from fastd2o.losses.cringe import cringe_loss, cringe_token_loss, pairwise_cringe_gate, pairwise_cringe_loss
from fastd2o.losses.d2o import D2OTerms, d2o_logits, d2o_loss
from fastd2o.losses.dpo import DPO_LOSS_TYPES, DPO_SMOOTHED_TYPES, dpo_loss
from fastd2o.losses.fused import GROUPED_OBJECTIVES, GroupedLoss, grouped_loss
from fastd2o.losses.kto import kto_loss, kto_reference_point
from fastd2o.losses.nat import nat_loss
from fastd2o.losses.negatives import gradient_ascent_loss, npo_loss, npo_offset, simnpo_loss, unlikelihood_loss
from fastd2o.losses.orpo import orpo_loss
from fastd2o.losses.preference import PREFERENCE_OBJECTIVES, Groups, PreferenceOutput, linear_preference_loss
from fastd2o.losses.simpo import simpo_loss

__all__ = [
    "DPO_LOSS_TYPES",
    "DPO_SMOOTHED_TYPES",
    "GROUPED_OBJECTIVES",
    "PREFERENCE_OBJECTIVES",
    "D2OTerms",
    "GroupedLoss",
    "Groups",
    "PreferenceOutput",
    "cringe_loss",
    "cringe_token_loss",
    "d2o_logits",
    "d2o_loss",
    "dpo_loss",
    "gradient_ascent_loss",
    "grouped_loss",
    "kto_loss",
    "kto_reference_point",
    "linear_preference_loss",
    "nat_loss",
    "npo_loss",
    "npo_offset",
    "orpo_loss",
    "pairwise_cringe_gate",
    "pairwise_cringe_loss",
    "simnpo_loss",
    "simpo_loss",
    "unlikelihood_loss",
]
