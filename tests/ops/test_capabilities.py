"""The CPU kernels as they are compiled for other processors than this one: AVX2, and any."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastd2o
from fastd2o.ops import native
from tests.ops.oracle import Case, full_logits, logprob, make_case, relative_error, rms_error

ROOT = Path(__file__).parents[2]
KERNELS = Path(__file__).with_name("test_cpu_kernels.py")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {"logit_scale": 1.2, "softcap": 25.0, "temperature": 0.8}

# What depends on the width of a register or on its instructions: products, exponentials, the rest of a row, NaN.
SELECTED = "product or exponential or sees_nan or first_of_equals or smaller_columns or test_fold or test_grad"


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    try:
        native.load("cpu")
    except native.NativeError as reason:
        pytest.skip(str(reason))


def gradients_of(value: Tensor, coef: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad((value * coef.to(value.dtype)).sum(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def leaves_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to(dtype).clone().requires_grad_() for name, tensor in case.tensors.items()}


def cringe_of(logits: Tensor, target: Tensor, positive: Tensor) -> Tensor:
    """The loss of a given draw, from full logits."""
    negative, drawn = (logits.gather(1, ids.clamp_min(0)[:, None])[:, 0] for ids in (target, positive))
    return torch.nn.functional.softplus(negative - drawn).masked_fill(target < 0, 0.0)


def eager_logits(leaves: dict[str, Tensor]) -> Tensor:
    """Rounded once to the leaves' dtype, as ordinary code has them; the transform in float32."""
    raw = torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves["bias"]).float()
    return full_logits(raw[..., None], torch.ones(1, 1), **OPTIONS)[..., 0]


def test_the_library_is_the_one_for_the_capability_asked_for() -> None:
    wanted = os.environ.get("ATEN_CPU_CAPABILITY", native.cpu_capability()).upper()
    assert torch.backends.cpu.get_cpu_capability() == wanted
    mapped = set(re.findall(r"/(cpu-[A-Z0-9]+)-[0-9a-f]+\.so$", Path("/proc/self/maps").read_text(), re.MULTILINE))
    assert mapped == {f"cpu-{wanted}"}


@pytest.mark.parametrize("operator", ["linear_logprob", "linear_cringe"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, operator: str) -> None:
    """float32 to 1e-5 of float64; 16 bits are no worse than eager code's 16-bit logits with a float32 softmax."""
    case = make_case(tokens=77, hidden_size=70, vocab_size=1503, dtype=dtype, scale=2.0, **OPTIONS)
    leaves, eager, exact = leaves_of(case, dtype), leaves_of(case, dtype), leaves_of(case, torch.float64)
    arguments = (leaves["hidden"], leaves["weight"], case.target)
    options: dict[str, Any] = {"bias": leaves["bias"], "backend": "cpu", **OPTIONS}
    if operator == "linear_logprob":
        value = fastd2o.linear_logprob(*arguments, **options)
        right, rounded = logprob(case.logits(exact), case.target), logprob(eager_logits(eager), case.target)
    else:
        out = fastd2o.linear_cringe(*arguments, seed=3, **options)
        value = out.loss
        logits = case.logits(exact)
        right = cringe_of(logits, case.target, out.positive)
        rounded = cringe_of(eager_logits(eager), case.target, out.positive)
        counted = case.target >= 0
        others = logits.detach().scatter(1, case.target.clamp_min(0)[:, None], -torch.inf)
        rank = (others > logits.detach().gather(1, out.positive.clamp_min(0)[:, None])).sum(1)
        assert (rank[counted] < 5).all()
        assert torch.equal(out.positive == -1, ~counted)
    ours, theirs, expected = (
        {"value": result.detach()} | gradients_of(result, case.coef, tensors)
        for result, tensors in ((value, leaves), (rounded, eager), (right, exact))
    )
    for name, result in ours.items():
        if dtype == torch.float32:
            assert relative_error(result, expected[name]) <= 1e-5, name
        else:
            # 5 % is the spread between two orders of summation where both sides round the same gradient.
            error = rms_error(result, expected[name])
            assert error <= (1.0 if name == "value" else 1.05) * rms_error(theirs[name], expected[name]), name


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="capabilities to choose from are x86-64's")
@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_in_a_process_with_another_capability(capability: str) -> None:
    """The tests above, and those of the kernels that depend on it; the first time, its kernels are compiled."""
    here = native.cpu_capability()
    if native.CAPABILITIES.index(capability) < native.CAPABILITIES.index(here):
        pytest.skip(f"this processor has {here}")
    if not native.cpu_library(capability).found() and native.cannot_build("cpu"):
        pytest.skip(str(native.cannot_build("cpu")))
    this = Path(__file__).name
    selected = f"({this} or {KERNELS.name}) and (({SELECTED}) or library or values) and not another and not refused"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, __file__, str(KERNELS)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability.lower()}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.splitlines()[-1]
    print(f"{capability}: {summary}")
    assert re.match(r"\d+ passed, \d+ deselected", summary), summary
