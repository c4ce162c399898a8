"""fastd2o build: the native kernels ahead of time, and a reason where that cannot be."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from fastd2o.ops import native

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native kernels are for Linux")
needs_tools = pytest.mark.skipif(native.cannot_build("cpu") is not None, reason=str(native.cannot_build("cpu")))


@needs_tools
@pytest.mark.slow
def test_cpu_kernels_are_built_and_copied(fastd2o, tmp_path):
    here = native.cpu_capability()
    result = fastd2o("build", "--only", "cpu", "--into", tmp_path / "kernels")
    assert result.code == 0
    schema, cpu = result.out.splitlines()
    assert schema.startswith(f"schema (any): {tmp_path}/kernels/schema-any-")
    assert cpu.startswith(f"cpu ({here}): {tmp_path}/kernels/cpu-{here}-")
    assert result.err.count("\n") <= 2  # lines of progress, where something had to be compiled

    again = fastd2o("build", "--only", "cpu", "--capability", here)
    assert (again.code, again.err) == (0, "")
    assert [line.split(": ")[0] for line in again.out.splitlines()] == ["schema (any)", f"cpu ({here})"]
    assert Path(again.out.splitlines()[1].split(": ")[1]) == native.built("cpu")


@needs_tools
@pytest.mark.slow
def test_the_copy_serves_where_the_cache_is_said_to_be(fastd2o, tmp_path, monkeypatch):
    assert fastd2o("build", "--only", "cpu", "--into", tmp_path).code == 0
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("cpu-*.json"))
    assert record["torch"] == torch.__version__
    monkeypatch.setenv("FASTD2O_CACHE", str(tmp_path))
    assert native.built("cpu") == next(tmp_path.glob("cpu-*.so"))
    report = json.loads(fastd2o("doctor", "--json").out)["native"]
    assert report["cache"] == str(tmp_path)
    assert report["cpu kernels"] == f"built: {native.built('cpu')}"
    assert report["compiler"].startswith(f"{native.compiler()}: ")


def test_what_cannot_be_built_is_told(fastd2o, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTD2O_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_loaded", set())  # as in a process that has not used them
    report = json.loads(fastd2o("doctor", "--json").out)["native"]
    if native.cannot_build("cpu") is None:
        assert report["cpu kernels"] == "not built yet; fastd2o build, or first use, builds it"
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = fastd2o("build")
    assert result.code == 1
    assert result.error.startswith("CXX=no-such-compiler is not a compiler that can be found. Fix: ")
    report = json.loads(fastd2o("doctor", "--json").out)["native"]
    assert report["compiler"] is None
    assert report["cpu kernels"].startswith("no: CXX=no-such-compiler is not a compiler")
    assert "no: CXX=no-such-compiler" in " ".join(re.sub(r"[│\s]+", " ", fastd2o("doctor").out).split())


@needs_tools
def test_a_compiler_that_is_broken(fastd2o, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTD2O_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    result = fastd2o("build", "--only", "cpu")
    progress, error = result.err.splitlines()
    assert result.code == 1
    assert re.fullmatch(r"fastd2o: compiling the operators' schema, .* failed after \d+ s", progress)
    assert error.startswith("fastd2o: error: the operators' schema did not compile: ")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.parametrize("arguments", [["--only", "cuda"], ["--arch", "sm_80"]])
def test_cuda_asked_for_by_name_is_never_left_out(fastd2o, tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("FASTD2O_CACHE", str(tmp_path))
    result = fastd2o("build", *arguments)
    assert result.code == 1
    assert result.error.startswith(f"this torch ({torch.__version__}) was built without CUDA. Fix: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "cpu", "--arch", "sm_80"], "--arch is of the cuda kernels, and --only cpu leaves them out"),
        (["--only", "cuda", "--capability", "AVX2"], "--capability is of the cpu kernels, and --only cuda leaves them"),
        (["--arch", "90"], "argument --arch: '90' is no architecture such as sm_80 or sm_90a"),
        (["--capability", "avx2"], "argument --capability: invalid choice: 'avx2'"),
        (["--only", "tpu"], "argument --only: invalid choice: 'tpu'"),
    ],
)
def test_usage_errors(fastd2o, arguments, message):
    result = fastd2o("build", *arguments)
    assert result.code == 2
    assert result.error.startswith(message)
