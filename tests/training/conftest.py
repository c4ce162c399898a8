from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastd2o import PreferenceTrainer
from tests.training import tiny


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, here and in the processes that some tests start; and quicker for a model this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., PreferenceTrainer]:
    """``tiny.make_trainer`` in a folder of its own."""

    def make(**options: Any) -> PreferenceTrainer:
        return tiny.make_trainer(options.pop("output_dir", tmp_path / "out"), **options)

    return make
