"""Every test of the operators runs on every backend that can serve it here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
            if (reason := fastd2o.backends()["triton"]) is not None:
                pytest.skip(reason)
            patch.setitem(_PREFERRED, "cpu", ("triton", "torch"))
        yield backend
