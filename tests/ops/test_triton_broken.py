"""A Triton that is too old or broken is a reason why the backend cannot serve; nothing else comes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastd2o
from fastd2o.ops.backends import _PREFERRED, Sizes, resolve, supported

triton = pytest.importorskip("triton")

import fastd2o.kernels.logprob  # noqa: E402

UPGRADE = r"Fix: pip install -U 'fastd2o\[triton\]'"


def too_old_for_knobs(monkeypatch: pytest.MonkeyPatch) -> str:
    not_imported_yet(monkeypatch, "configs")
    monkeypatch.delattr(triton, "knobs")
    return rf"Triton {re.escape(triton.__version__)} cannot be used \(AttributeError: .*'knobs'\)\. {UPGRADE}"


def too_old_for_descriptors(monkeypatch: pytest.MonkeyPatch) -> str:
    not_imported_yet(monkeypatch, "logprob")
    monkeypatch.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
    return rf"Triton .* cannot be used \(ModuleNotFoundError: .*tensor_descriptor.*\)\. {UPGRADE}"


def checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "fastd2o.kernels", None)
    return r"its kernels are not installed \(.*fastd2o\.kernels.*\)\. Fix: pip install -e \. in the checkout"


def not_imported_yet(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(sys.modules, f"fastd2o.kernels.{name}")
    monkeypatch.delattr(fastd2o.kernels, name)


BREAKAGES = [too_old_for_knobs, too_old_for_descriptors, checkout_that_is_not_installed]


@pytest.mark.parametrize("break_it", BREAKAGES)
def test_what_cannot_be_imported_is_a_reason(
    break_it: Callable[[pytest.MonkeyPatch], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = break_it(monkeypatch)
    assert re.fullmatch(reason, str(fastd2o.backends()["triton"]))
    for device in ("cpu", "cuda"):
        assert re.fullmatch(reason, str(supported("triton", device, torch.float32, Sizes())))
        with pytest.raises(ValueError, match=f"^backend='triton' cannot serve: {reason}; or backend='torch', or None"):
            resolve("triton", device, torch.float32)
        monkeypatch.setitem(_PREFERRED, device, ("triton", "torch"))
        assert resolve(None, device, torch.float32, Sizes()) == "torch"


PROGRAM = """
import torch, fastd2o
hidden, weight = torch.ones(2, 4), torch.ones(8, 4)
print(fastd2o.linear_logprob(hidden, weight, torch.tensor([3, 5])).exp().round(decimals=5).tolist())
print(fastd2o.backends()["triton"])
"""


def test_beside_a_broken_triton_everything_else_works(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('of another\\nglibc')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "FASTD2O_NATIVE": "0"}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    values, reason = result.stdout.splitlines()
    assert values == "[0.125, 0.125]"
    assert re.fullmatch(
        rf"Triton of an unknown version cannot be used \(ImportError: of another glibc\)\. {UPGRADE}", reason
    )
