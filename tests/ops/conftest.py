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


# What Triton's interpreter, a thousand times slower than the kernels, is put through: the shapes are small.
_INTERPRETED = {
    "test_matches_the_oracle",
    "test_mixed_dtypes_compute_in_the_dtype_of_hidden",
    "test_leading_dimensions_and_strides_do_not_matter",
    "test_an_expanded_bias",
    "test_extreme_logits",
    "test_nan_is_not_hidden_and_stays_in_its_row",
    "test_padding_columns_take_no_part",
    "test_statistics_leave_padding_columns_out",
    "test_everything_ignored_is_a_zero_that_is_still_connected",
    "test_without_waiting_for_the_device_nothing_changes",
    "test_two_runs_give_the_same_bits",
    "test_value_and_gradients",
    "test_fewer_finite_alternatives_than_k",
    "test_no_finite_alternative_costs_nothing",
    "test_counters_carry_the_draw_along_with_the_data",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the interpreter would take too long for, and what would run on ``torch`` twice."""

    def left_out(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("default_backend") != "triton":
            return False
        name = item.name.partition("[")[0]
        return name not in _INTERPRETED or parameters.get("dtype") in (torch.float64, torch.bfloat16)

    gone = [item for item in items if left_out(item)]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in gone]
