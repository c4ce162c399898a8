"""Data: rows in many formats become groups of tokenised sequences, and those become batches.

The stages, each a module: ``rows`` (read), ``formats`` (interpret), ``render`` (chat template), ``tokenize`` (ids and
boundary), ``groups`` (truncate), ``dataset`` (all of them in turn, with a ``report``), ``collator`` (batch).
"""

from __future__ import annotations

from fastd2o.data.collator import PreferenceCollator
from fastd2o.data.dataset import Needs, PreferenceDataset, build_dataset
from fastd2o.data.formats import Completion, Group, parse_row
from fastd2o.data.groups import TokenizedGroup, TokenizedSequence
from fastd2o.data.render import PromptSuffix
from fastd2o.data.report import DataReport
from fastd2o.data.rows import Origin, Row, load_rows

__all__ = [
    "Completion",
    "DataReport",
    "Group",
    "Needs",
    "Origin",
    "PreferenceCollator",
    "PreferenceDataset",
    "PromptSuffix",
    "Row",
    "TokenizedGroup",
    "TokenizedSequence",
    "build_dataset",
    "load_rows",
    "parse_row",
]
