"""The table of what was measured on GPUs: what the benchmark writes is what the engine goes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import CASES, Shape
from benchmarks.contest import Inputs
from fastd2o.ops import Plan, measured
from fastd2o.ops.backends import supported
from fastd2o.ops.plan import Algorithm
from fastd2o.ops.triton_tile_ops import TritonTileOps


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, on a machine with a GPU of compute capability 9.0."""
    path = tmp_path / "measured.json"
    path.write_text("{}")
    monkeypatch.setattr(measured, "TABLE", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return path


def fused(algorithm: Algorithm, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> bool:
    plan = Plan.choose(
        tokens=64, hidden_size=32, vocab_size=999, algorithm=algorithm, dtype=dtype, device=device, backend="triton"
    )
    return plan.fused


def entry(way: str, *algorithms: str) -> dict[str, object]:
    """In which this way was the faster for these algorithms."""
    times = {name: {one: 1.0 if one == way else 2.0 for one in measured.WAYS} for name in algorithms}
    return {"milliseconds": {"bfloat16": times}}


def test_the_engine_takes_what_was_faster(table: Path) -> None:
    measured.record("9.0", entry("tiles", "forward", "recompute"))
    assert not fused("forward")
    assert not fused("recompute")
    assert not fused("grouped")  # made of the same kernels
    measured.record("9.0", entry("fused", "forward"))
    assert fused("forward")


def test_what_nobody_has_measured_is_fused(table: Path) -> None:
    assert fused("forward")
    measured.record("9.0", entry("tiles", "forward"))
    measured.record("10.0", entry("tiles", "cringe"))
    assert fused("cringe"), "slower on another GPU"
    assert fused("recompute")
    assert fused("forward", torch.float32)
    assert fused("forward", torch.float32, "cpu")
    assert not fused("unit"), "which no kernel fuses"


def test_another_gpu_keeps_its_entry_and_nothing_is_left_half_written(table: Path) -> None:
    measured.record("9.0", entry("tiles", "forward"))
    measured.record("10.0", entry("fused", "forward"))
    measured.record("9.0", entry("fused", "cringe"))
    assert json.loads(table.read_text()) == {"9.0": entry("fused", "cringe"), "10.0": entry("fused", "forward")}
    assert list(table.parent.iterdir()) == [table]


def test_the_committed_table_is_one() -> None:
    """Every entry of it has all that the benchmark writes, and times of both ways."""
    committed = json.loads(measured.TABLE.read_text())
    assert isinstance(committed, dict)
    for found in committed.values():
        assert set(found) == {"device", "torch", "triton", "date", "shape", "milliseconds"}
        for by_algorithm in found["milliseconds"].values():
            assert set(by_algorithm) == {"forward", "recompute", "cringe"}
            assert all(set(times) == set(measured.WAYS) for times in by_algorithm.values())


def test_the_benchmark_measures_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    if (why := supported("triton", "cpu", torch.float32)) is not None:
        pytest.skip(why)
    called: list[str] = []

    def counted(name: str, method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return method(*arguments)

        return call

    for name in ("fold_product", "grad_product", "topk_product", "fold", "grad", "topk"):
        monkeypatch.setattr(TritonTileOps, name, counted(name, getattr(TritonTileOps, name)))
    inputs = Inputs.random(CASES["trained"], Shape(3, 16, 40, "float32"), "cpu")
    for way, kernels in (("fused", ["fold_product", "grad_product"]), ("tiles", ["fold", "grad"])):
        called.clear()
        inputs.run(tune.contestant(way))
        assert called == kernels
    found = tune.milliseconds({"tokens": 3, "hidden": 16, "vocab": 40}, [torch.float32], "cpu", rounds=1)
    assert set(found) == {"float32"}
    assert set(found["float32"]) == {"forward", "recompute", "cringe"}
    for times in found["float32"].values():
        assert list(times) == list(measured.WAYS)
        assert all(ms > 0 for ms in times.values())


def test_what_is_measured_stays_when_the_rest_takes_too_long(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shape: object, dtypes: tuple[torch.dtype], *_: object) -> dict[str, object]:
        if dtypes[0] == tune.DTYPES[1]:
            raise KeyboardInterrupt
        return {"bfloat16": {"forward": {"fused": 2.0, "tiles": 1.0}}}

    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "check_backend", lambda name: None)
    monkeypatch.setattr(tune, "milliseconds", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    with pytest.raises(KeyboardInterrupt):
        tune.main([])
    assert not fused("forward")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    before = measured.TABLE.read_bytes()
    with pytest.raises(SystemExit, match="there is no NVIDIA GPU here"):
        tune.main([])
    assert measured.TABLE.read_bytes() == before
