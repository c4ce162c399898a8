"""Which backend serves a call, what happens where the best one cannot be had, and what is said then."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastd2o
from fastd2o.ops import native
from fastd2o.ops.backends import _PREFERRED, BACKENDS, Sizes, check_backend, resolve, supported
from tests.ops.oracle import make_case, relative_error

NATIVE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels() -> None:
    try:
        native.load("cpu")
    except native.NativeError as reason:
        pytest.skip(str(reason))


def test_every_backend_works_or_has_a_reason_with_a_fix() -> None:
    reasons = fastd2o.backends()
    assert tuple(reasons) == BACKENDS == ("torch", "cpu", "triton", "cuda")
    assert reasons["torch"] is None
    assert reasons["cpu"] == native.unavailable("cpu")
    for name, reason in reasons.items():
        if reason is None:
            check_backend(name)
            continue
        with pytest.raises(
            ValueError, match=f"^backend='{name}' cannot serve: .*Fix: .*backend='torch', or None"
        ) as error:
            check_backend(name)
        assert reason in str(error.value)
        assert str(error.value).count("Fix: ") == 1


@pytest.mark.parametrize("name", ["auto", "tpu", "CPU", "", "native"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    message = f"backend='{name}' is unknown. Known: torch, cpu, triton, cuda, or None for the best that works here"
    for refuse in (lambda: check_backend(name), lambda: resolve(name, "cpu", torch.float32)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            refuse()


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_the_best_on_the_cpu_is_compiled(kernels: None, dtype: torch.dtype) -> None:
    assert supported("cpu", "cpu", dtype) is None
    assert resolve(None, "cpu", dtype) == resolve("cpu", "cpu", dtype) == "cpu"
    assert resolve("torch", "cpu", dtype) == "torch"
    plan = fastd2o.Plan.of(torch.zeros(3, 8, dtype=dtype), torch.zeros(11, 8, dtype=dtype))
    assert plan.backend == "cpu"


def test_float64_is_served_by_torch_alone(kernels: None) -> None:
    assert resolve(None, "cpu", torch.float64) == "torch"
    for backend in ("cpu", "cuda"):
        assert supported(backend, backend, torch.float64) == "it has no float64 arithmetic"
    hidden, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    target = torch.tensor([0, 10, 4])
    assert fastd2o.Plan.of(hidden, weight).backend == "torch"
    assert fastd2o.linear_logprob(hidden, weight, target).dtype == torch.float64
    message = r"backend='cpu' cannot serve: it has no float64 arithmetic\. Fix: backend='torch', or None"
    for operator in (fastd2o.linear_logprob, fastd2o.linear_logodds, fastd2o.linear_cringe):
        with pytest.raises(ValueError, match=message):
            operator(hidden, weight, target, backend="cpu")


def test_a_backend_of_another_device_is_refused() -> None:
    assert supported("cpu", "cuda", torch.float32) == "its kernels run on cpu, and hidden is on cuda"
    assert supported("cuda", "cpu", torch.float32) == "its kernels run on cuda, and hidden is on cpu"
    assert resolve("torch", "cuda", torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match=r"backend='cuda' cannot serve: .*Fix: .*backend='torch', or None"):
        fastd2o.linear_logprob(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="cuda")


# ---- what Triton's kernels cannot serve ------------------------------------------------------------------------------

# Machine (the interpreter, or a GPU's compute capability, or neither) and call -> the reason; "" where they serve.
INTERPRETER, NOTHING = "interpreter", None
REASONS: list[tuple[Any, str, torch.dtype, Sizes | None, str]] = [
    (INTERPRETER, "cpu", torch.float16, Sizes(9, 64, 100, k=64), ""),
    (INTERPRETER, "cpu", torch.bfloat16, None, "Triton's interpreter cannot multiply bfloat16"),
    (INTERPRETER, "cpu", torch.float64, None, "it has no float64 arithmetic"),
    (INTERPRETER, "mps", torch.float32, None, "its kernels run on cuda, and hidden is on mps"),
    (INTERPRETER, "cuda", torch.float32, None, "TRITON_INTERPRET is set, under which its kernels run on the CPU only"),
    (INTERPRETER, "cpu", torch.float32, Sizes(k=65), "it keeps at most 64 candidates, and k=65"),
    (
        INTERPRETER,
        "cpu",
        torch.float32,
        Sizes(vocab_size=2**31),
        "columns of the vocabulary, and the call has 2147483648",
    ),
    (INTERPRETER, "cpu", torch.float32, Sizes(hidden_size=2**31), "hidden entries, and the call has 2147483648"),
    (INTERPRETER, "cpu", torch.float32, Sizes(tokens=2**31), "tokens, and the call has 2147483648"),
    (NOTHING, "cuda", torch.float32, None, "there is no CUDA device"),
    (NOTHING, "cpu", torch.float32, None, "there is no CUDA device"),
    ((7, 5), "cuda", torch.float32, None, "need compute capability 8.0 or above, and this GPU has 7.5"),
    ((8, 0), "cpu", torch.float32, None, "its kernels run on cuda, and hidden is on cpu"),
    ((8, 0), "cuda", torch.float64, None, "it has no float64 arithmetic"),
    ((9, 0), "cuda", torch.bfloat16, Sizes(9, 64, 100, k=5), ""),
    ((9, 0), "cuda", torch.bfloat16, Sizes(k=65), "it keeps at most 64 candidates, and k=65"),
]


@pytest.mark.parametrize(("machine", "device", "dtype", "sizes", "reason"), REASONS)
def test_triton_has_a_reason_by_name_and_the_next_backend_serves_without_one(
    machine: Any, device: str, dtype: torch.dtype, sizes: Sizes | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from fastd2o.kernels import configs

    monkeypatch.setattr(configs, "INTERPRETED", machine is INTERPRETER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: isinstance(machine, tuple))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: machine)
    monkeypatch.setitem(_PREFERRED, device, ("triton", "torch"))
    call = (device, dtype, sizes)
    if not reason:
        assert supported("triton", *call) is None
        assert resolve("triton", *call) == resolve(None, *call) == "triton"
        return
    assert reason in str(supported("triton", *call))
    with pytest.raises(ValueError, match=f"^backend='triton' cannot serve: .*{reason}.*backend='torch', or None"):
        resolve("triton", *call)
    assert resolve(None, *call) == "torch"


def test_without_triton_the_reason_is_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(_PREFERRED, "cpu", ("triton", "torch"))
    with pytest.raises(ValueError, match=r"'triton' cannot serve: .* Fix: pip install 'fastd2o\[triton\]'; or"):
        resolve("triton", "cpu", torch.float32)
    assert resolve(None, "cpu", torch.float32) == "torch"


def test_an_operator_asks_for_the_sizes_of_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    if (why := supported("triton", "cpu", torch.float32)) is not None:
        pytest.skip(why)
    hidden, weight, target = torch.randn(2, 4), torch.randn(70, 4), torch.tensor([3, 69])
    message = "^backend='triton' cannot serve: it keeps at most 64 candidates, and k=65. Fix: backend='torch', or None"
    for given in ({"backend": "triton"}, {"plan": fastd2o.Plan.of(hidden, weight, cringe=True, backend="triton")}):
        with pytest.raises(ValueError, match=message):
            fastd2o.linear_cringe(hidden, weight, target, k=65, **given)
    expected = fastd2o.linear_cringe(hidden, weight, target, k=65, seed=0, backend="torch")
    monkeypatch.setitem(_PREFERRED, "cpu", ("triton", "torch"))
    found = fastd2o.linear_cringe(hidden, weight, target, k=65, seed=0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    with FakeTensorMode():
        huge = torch.empty(2**31, 4)
        with pytest.raises(ValueError, match="columns of the vocabulary, and the call has 2147483648"):
            fastd2o.Plan.of(torch.empty(2, 4), huge, backend="triton")
        assert fastd2o.Plan.of(torch.empty(2, 4), huge).backend == "torch"


# ---- without kernels -------------------------------------------------------------------------------------------------

# Several calls of each kind, by default and by name; what came out, and every warning, though none is filtered.
PROGRAM = """
import json, sys, warnings
import torch
import fastd2o

inputs = torch.load(sys.argv[1])
report = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    report["double"] = fastd2o.linear_logprob(*(t.double() if t.is_floating_point() else t for t in inputs)).tolist()
    report["told for float64"] = [str(w.message) for w in caught]
    values = [fastd2o.linear_logprob(*inputs) for _ in range(3)]
    half = [t.bfloat16() if t.is_floating_point() else t for t in inputs]
    fastd2o.linear_logprob(*half)
    fastd2o.linear_cringe(*inputs)
    report["told"] = [[w.category.__name__, str(w.message)] for w in caught]
    try:
        fastd2o.linear_logprob(*inputs, backend="cpu")
    except ValueError as error:
        report["refused"] = str(error)
    report["told in the end"] = len(caught)
report["values"] = [value.tolist() for value in values]
report["backend"] = fastd2o.Plan.of(*inputs[:2]).backend
report["reason"] = fastd2o.backends()["cpu"]
print(json.dumps(report))
"""


def report_of(tmp_path: Path, environment: dict[str, str], program: str = PROGRAM) -> tuple[dict[str, Any], str]:
    """What the program found in a process with these variables, its results checked; and its stderr."""
    case = make_case(ignored=0.2)
    torch.save([case.hidden, case.weight, case.target], tmp_path / "inputs")
    command = [sys.executable, "-c", program, str(tmp_path / "inputs")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FASTD2O_", "CXX"))}
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    expected, _ = type(case)(case.hidden, case.weight, case.target).oracle()
    for values in report["values"]:
        assert relative_error(torch.tensor(values), expected) <= 1e-5
    assert relative_error(torch.tensor(report["double"], dtype=torch.float64), expected) <= 1e-12
    return report, result.stderr


def obstacles(tmp_path: Path) -> dict[str, tuple[dict[str, str], str]]:
    """What stands in the way, as environment variables -> what the warning has to say."""
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()  # a folder below a file can be made by nobody, not even by root
    return {
        "broken compiler": ({"CXX": "false", "FASTD2O_CACHE": str(empty)}, "did not compile: .*Fix: use g[+][+] 11"),
        "cache that cannot be written": (
            {"FASTD2O_CACHE": str(file / "cache")},
            f"no folder for the compiled kernels can be written .tried: {file}/cache.[.] Fix: set FASTD2O_CACHE to one",
        ),
    }


@pytest.mark.skipif(native.unsupported("cpu") is not None, reason=str(native.unsupported("cpu")))
@pytest.mark.parametrize("what", ["broken compiler", "cache that cannot be written"])
def test_torch_serves_where_kernels_cannot_be_had_and_one_warning_says_why(tmp_path: Path, what: str) -> None:
    path = native.built("cpu")
    if path is not None and path.parent == native.PACKAGED:
        pytest.skip("this installation brings its binaries")
    environment, reason = obstacles(tmp_path)[what]
    report, stderr = report_of(tmp_path, environment)
    assert report["told for float64"] == []  # which would not have had them anyway
    ((category, message),) = report["told"]
    assert category == "FastD2OWarning"
    assert re.search(rf"{reason}.*(?<!\.)\. Until then backend 'torch' serves\.$", message)
    assert re.search(rf"^backend='cpu' cannot serve: .*{reason}.*; or backend='torch', or None", report["refused"])
    assert report["told in the end"] == 1  # who asks by name gets an error, not a warning that torch serves
    assert report["backend"] == "torch"
    assert re.search(reason, report["reason"])
    assert stderr.count("\n") == (what == "broken compiler")  # the line about compiling


def test_who_switches_the_kernels_off_is_not_told_so(tmp_path: Path) -> None:
    report, stderr = report_of(tmp_path, {"FASTD2O_NATIVE": "0"})
    reason = "FASTD2O_NATIVE=0 switches the native kernels off. Fix: unset it"
    assert (report["told"], report["told in the end"], report["backend"], stderr) == ([], 0, "torch", "")
    assert report["reason"] == reason
    assert report["refused"].startswith(f"backend='cpu' cannot serve: {reason}; or backend='torch', or None")


@pytest.mark.skipif(native.unsupported("cpu") is not None, reason=str(native.unsupported("cpu")))
def test_without_a_compiler_the_warning_comes_once_and_not_for_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FASTD2O_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTD2O_NATIVE", raising=False)
    for name, value in (("_loaded", set()), ("_failed", {}), ("PACKAGED", tmp_path)):
        monkeypatch.setattr(native, name, value)
    warnings.simplefilter("always")
    assert resolve(None, "cpu", torch.float64) == resolve("torch", "cpu", torch.float32) == "torch"
    assert not recwarn
    assert [resolve(None, "cpu", dtype) for dtype in NATIVE_DTYPES * 2] == ["torch"] * 6
    assert [str(warning.message) for warning in recwarn] == [
        "CXX=no-such-compiler is not a compiler that can be found. Fix: install g++ 11 or newer, or name a compiler in "
        "CXX. Until then backend 'torch' serves."
    ]
    with pytest.raises(
        ValueError, match=r"backend='cpu' cannot serve: CXX=no-such-compiler is not .*; or backend='torch'"
    ):
        resolve("cpu", "cpu", torch.float32)
    assert len(recwarn) == 1


def test_with_kernels_nothing_is_said(
    kernels: None, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    case = make_case()
    warnings.simplefilter("always")
    by_default = fastd2o.linear_logprob(case.hidden, case.weight, case.target)
    assert torch.equal(by_default, fastd2o.linear_logprob(case.hidden, case.weight, case.target, backend="cpu"))
    assert not recwarn
    assert capfd.readouterr() == ("", "")
