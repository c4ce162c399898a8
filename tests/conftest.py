"""Settings that all tests share."""

import contextlib
import gc
import os
from collections import Counter

import pytest
import torch

# Where there is no GPU, Triton's interpreter runs its kernels on the CPU. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

with contextlib.suppress(ImportError):  # the GPU tests do without it
    from hypothesis import settings

    # A busy machine is not a wrong result: no test fails for the time that it took.
    settings.register_profile("fastd2o", deadline=None)
    settings.load_profile("fastd2o")


_TRACED_CASES = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that processes end together. Coverage sees the first cases of each test, and none
    of Triton's interpreter: it would double the time of all, and sees nothing inside a kernel."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    cases: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        if "triton" in item.nodeid or cases[test] > _TRACED_CASES:
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_is_looked_through() -> None:
    """A run of rounds collects garbage between its phases; in the process of a long session that would take a second
    each time."""
    gc.collect()
    gc.freeze()
