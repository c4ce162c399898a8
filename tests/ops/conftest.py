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
    is to be run for each. Triton's kernels run in its interpreter, and what that cannot do runs on ``torch``."""
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what would run on ``torch`` twice, dtypes that Triton's interpreter does not have; and the memory that
    the interpreter uses, which tells nothing."""

    def pointless(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        elsewhere = parameters.get("dtype") in (torch.float64, torch.bfloat16)
        return parameters.get("default_backend") == "triton" and (elsewhere or item.path.stem == "test_memory")

    left_out = [item for item in items if pointless(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
