"""What compute-sanitizer watches: on the GPU, for which this also compiles it, and as far as it goes without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import every_kernel
from benchmarks.every_kernel import DTYPES, LAYOUTS, TRANSFORMS, Layout
from fastd2o.losses import GROUPED_OBJECTIVES
from fastd2o.ops.backends import supported


def needs(backend: str, device: str, dtype: torch.dtype) -> None:
    if (why := supported(backend, device, dtype)) is not None:
        pytest.skip(why)


@pytest.mark.gpu
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
class TestOnTheGpu:
    def test_tokens(self, backend: str, dtype: torch.dtype, transform: dict[str, Any]) -> None:
        needs(backend, "cuda", dtype)
        every_kernel.of_tokens(backend, "cuda", dtype, transform)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_tiles(self, backend: str, dtype: torch.dtype, transform: dict[str, Any], layout: Layout) -> None:
        needs(backend, "cuda", dtype)
        every_kernel.of_tile(backend, "cuda", dtype, transform, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", GROUPED_OBJECTIVES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_groups_on_the_gpu(backend: str, objective: str) -> None:
    needs(backend, "cuda", torch.float32)
    every_kernel.of_groups(backend, "cuda", objective)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter works out both sides of a choice
@pytest.mark.parametrize(
    ("backend", "layout", "dtype"),
    [("cpu", LAYOUTS[3], torch.float32), ("torch", LAYOUTS[3], torch.float16), ("triton", LAYOUTS[0], torch.float16)],
    ids=str,
)
def test_tiles_without_a_gpu(backend: str, layout: Layout, dtype: torch.dtype) -> None:
    needs(backend, "cpu", torch.float32)
    every_kernel.of_tile(backend, "cpu", dtype, TRANSFORMS[1], layout)


def test_a_backend_that_is_not_here_is_no_success() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is here")
    with pytest.raises(SystemExit, match=r"benchmarks\.every_kernel: .*cuda"):
        every_kernel.main(["--backend", "cuda"])
