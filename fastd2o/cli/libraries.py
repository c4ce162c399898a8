"""How the commands have the libraries behave: quiet, and on the best device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def default_device() -> str:
    """``"cuda"`` where there is one, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what Transformers and datasets say on a run where nothing is wrong; their errors still come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
