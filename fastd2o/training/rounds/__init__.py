"""Rounds: sample from the policy, score, build groups, train, and again from the trained model.

One driver for Iterative DPO, PCO (iterated Pairwise Cringe), iterated CRINGE, and D2O with anchors drawn anew.
"""

from fastd2o.training.rounds.builders import Built, ScoredRow, build_anchors, build_labels, build_pairs
from fastd2o.training.rounds.config import RoundsConfig
from fastd2o.training.rounds.driver import RoundRecord, read_records, run_rounds
from fastd2o.training.rounds.scorers import ScorerOptions
from fastd2o.training.rounds.watch import Limits, Measures

__all__ = [
    "Built",
    "Limits",
    "Measures",
    "RoundRecord",
    "RoundsConfig",
    "ScoredRow",
    "ScorerOptions",
    "build_anchors",
    "build_labels",
    "build_pairs",
    "read_records",
    "run_rounds",
]
