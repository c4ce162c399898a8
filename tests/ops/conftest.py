"""Every test of the operators runs on every backend that can serve it here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastd2o.ops import native


@pytest.fixture(scope="module", params=["torch", "cpu"])
def default_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What ``backend=None`` means. A module says by ``pytestmark = pytest.mark.usefixtures("default_backend")`` that it
    is to be run for each."""
    backend: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        if backend == "torch":
            patch.setenv("FASTD2O_NATIVE", "0")
        else:
            patch.delenv("FASTD2O_NATIVE", raising=False)
            try:
                native.load("cpu")
            except native.NativeError as reason:
                pytest.skip(str(reason))
        yield backend
