"""Every test of the operators runs on every backend that can serve it here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastd2o
from fastd2o.ops import native
from fastd2o.ops.backends import _PREFERRED


@pytest.fixture(scope="module", params=["torch", "cpu", "triton"])
def default_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What ``backend=None`` means. A module says by ``pytestmark = pytest.mark.usefixtures("default_backend")`` that it
    is to be run for each, and a test by ``pytest.mark.backends("torch", ...)`` that it is for some of them alone.
    Triton's kernels run in its interpreter, a thousand times slower: shapes are small."""
    backend: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        if backend == "cpu":
            patch.delenv("FASTD2O_NATIVE", raising=False)
            try:
                native.load("cpu")
            except native.NativeError as reason:
                pytest.skip(str(reason))
        else:
            patch.setenv("FASTD2O_NATIVE", "0")
        if backend == "triton":
            if (why := fastd2o.backends()["triton"]) is not None:
                pytest.skip(why)
            patch.setitem(_PREFERRED, "cpu", ("triton", "torch"))
        yield backend


# Of the dtypes by which tests are parametrised, what each backend serves here: others would run on ``torch`` again.
_SERVED = {
    "torch": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.float16),  # its interpreter cannot multiply bfloat16
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what would run on ``torch`` twice, and what a test's mark ``backends`` does."""

    def left_out(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("default_backend")
        if backend is None:
            return False
        mark = item.get_closest_marker("backends")
        dtype = parameters.get("hidden_dtype", parameters.get("dtype", torch.float32))
        return (mark is not None and backend not in mark.args) or dtype not in _SERVED[backend]

    gone: list[pytest.Item] = []
    kept: list[pytest.Item] = []
    for item in items:
        (gone if left_out(item) else kept).append(item)
    config.hook.pytest_deselected(items=gone)
    items[:] = kept
