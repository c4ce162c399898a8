"""Native kernels are found, built once and kept whole, and what stands in the way is told. No GPU is needed."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from fastd2o.ops import native
from fastd2o.ops.native import Library, NativeError, Progress

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native kernels are for Linux")
needs_tools = pytest.mark.skipif(native.cannot_build("cpu") is not None, reason=str(native.cannot_build("cpu")))

# One compilation of the real kernels is shared by all tests; the mechanics are tested on a library of one line.
COMPILER = native.compiler()
ONE_LINE = 'extern "C" __attribute__((visibility("default"))) int fastd2o_answer() { return 42; }\n'


def tiny_library(root: Path, source: str = ONE_LINE) -> Library:
    root.mkdir(exist_ok=True)
    (root / "answer.cpp").write_text(source)
    return Library(
        name="tiny",
        targets=("any",),
        root=root,
        sources=(root / "answer.cpp",),
        inputs=(root / "answer.cpp",),
        abi="none",
        title="the tiny library",
        takes="a second",
        flags=("-O0",),
    )


class Workshop:
    """A cache of its own, and a compiler that notes every source it compiles."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self.notes, self.compiler = folder, folder / "cache", folder / "notes", folder / "c++"
        self.library = tiny_library(folder / "source")
        self.before_compiling(":")

    def before_compiling(self, command: str) -> None:
        """Have the compiler run a shell command first."""
        self.compiler.write_text(
            f'#!/bin/sh\ncase " $* " in *" -c "*) echo compiled >> "{self.notes}"; {command};; esac\n'
            f'exec "{COMPILER}" "$@"\n'
        )
        self.compiler.chmod(0o755)

    @property
    def compilations(self) -> int:
        return self.notes.read_text().count("compiled") if self.notes.exists() else 0


@pytest.fixture
def workshop(tmp_path, monkeypatch) -> Workshop:
    made = Workshop(tmp_path)
    monkeypatch.setenv("FASTD2O_CACHE", str(made.cache))
    monkeypatch.setenv("CXX", str(made.compiler))
    monkeypatch.setenv("TORCH_NO_COMPILER_WRAPPER", "1")  # a compiler cache would keep compilations from the notes
    monkeypatch.setattr(native, "_loaded", set())
    monkeypatch.setattr(native, "_failed", {})
    return made


def build(library: Library, force: bool = False) -> Path:
    with Progress(library) as progress:
        return library.build(progress, force=force)


def reason_against(kind: native.Kind) -> str:
    reason = native.unavailable(kind)
    assert reason is not None
    return reason


def load(library: Library) -> None:
    with Progress(library) as progress:
        library.load(progress)


# --- built once, found afterwards -------------------------------------------------------------------------------------


@needs_tools
@pytest.mark.slow
def test_built_once_with_one_line_and_found_afterwards(workshop, capfd):
    path = build(workshop.library)
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"fastd2o: compiling the tiny library, about a second, once \.\.\. done in \d+ s\n", err)
    assert path.parent == workshop.cache
    assert ctypes.CDLL(str(path)).fastd2o_answer() == 42
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["torch"] == torch.__version__
    assert record["library"] == "tiny"
    assert sorted(p.suffix for p in workshop.cache.iterdir()) == [".json", ".lock", ".log", ".so"]

    before = path.stat().st_mtime_ns
    again = dataclasses.replace(workshop.library)  # as another process would have it
    assert again.found() == [path]
    assert build(again) == path
    load(again)
    assert (path.stat().st_mtime_ns, workshop.compilations) == (before, 1)
    assert capfd.readouterr() == ("", "")

    # A binary cut short would crash the process that maps it: it is not loaded, but built again.
    path.write_bytes(path.read_bytes()[:3000])
    assert again.found() == []
    native._loaded.clear()
    load(again)
    assert workshop.compilations == 2
    assert again.found() == [path]

    assert build(again, force=True) == path
    assert workshop.compilations == 3


def test_the_name_tells_everything_that_decides_what_comes_out(tmp_path):
    library = tiny_library(tmp_path)
    header = tmp_path / "answer.h"
    header.write_text("// one")
    library = dataclasses.replace(library, inputs=(*library.inputs, header))
    names = {library.file}
    for change in (
        {"abi": "torch 2.10.0"},
        {"flags": ("-O1",)},
        {"nvcc_flags": ("-O1",)},
        {"targets": ("AVX2",)},
        {"name": "cpu"},
    ):
        names.add(dataclasses.replace(library, **change).file)
    header.write_text("// two")
    names.add(dataclasses.replace(library).file)
    tiny_library(tmp_path, ONE_LINE + "// changed")
    names.add(dataclasses.replace(library).file)
    assert len(names) == 8

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, elsewhere, dirs_exist_ok=True)
    inputs = tuple(elsewhere / path.name for path in library.inputs)
    moved = dataclasses.replace(library, root=elsewhere, sources=inputs[:1], inputs=inputs)
    assert moved.file == dataclasses.replace(library).file  # wherever it is installed


@pytest.mark.parametrize(
    ("offered", "wanted", "runs"),
    [
        ("AVX2", "AVX2", True),
        ("AVX2", "AVX512", False),
        ("DEFAULT", "AVX2", False),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90a", False),
        ("sm_90", "sm_90a", True),
        ("sm_90a", "sm_90a", True),
        ("sm_100a", "sm_103a", False),
        ("sm_100", "sm_103a", True),
        ("sm_100a", "sm_100a", True),
    ],
)
def test_where_a_binary_runs(offered, wanted, runs):
    assert native._runs(offered, wanted) is runs


def test_a_binary_for_several_gpus_serves_each(workshop, monkeypatch):
    wheel = dataclasses.replace(workshop.library, targets=("sm_80", "sm_90a"))
    workshop.cache.mkdir()
    path = workshop.cache / wheel.file
    path.write_bytes(b"binary")
    path.with_suffix(".json").write_text(json.dumps({"sha256": native._checksum(path)}))
    for targets, found in ((("sm_86",), 1), (("sm_86", "sm_90a"), 1), (("sm_90a", "sm_100a"), 0)):
        assert len(dataclasses.replace(workshop.library, targets=targets).found()) == found


@needs_tools
@pytest.mark.slow
def test_a_wheels_binary_comes_first_and_one_that_does_not_load_is_passed_over(workshop, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(native, "PACKAGED", tmp_path / "_native")
    library = workshop.library
    cached = build(library)
    packaged = native.copy_into(native.PACKAGED, cached)
    assert library.found() == [packaged, cached]

    packaged.write_bytes(b"made for another system")
    record = packaged.with_suffix(".json")
    record.write_text(json.dumps({"sha256": native._checksum(packaged)}))
    assert library.found() == [packaged, cached]
    load(library)
    assert library.name in native._loaded
    assert workshop.compilations == 1

    shutil.rmtree(workshop.cache)
    native._loaded.clear()
    load(library)
    assert workshop.compilations == 2


def test_a_copy_takes_the_place_of_one_that_a_process_may_have_loaded(tmp_path, monkeypatch):
    made, folder = tmp_path / "tiny-any-0.so", tmp_path / "folder"
    made.write_bytes(b"one" * 1000)
    made.with_suffix(".json").write_text("{}")
    copy = native.copy_into(folder, made)
    with copy.open("rb") as loaded:
        made.write_bytes(b"two")
        assert native.copy_into(folder, made) == copy
        assert loaded.read() == b"one" * 1000  # cut short, it would crash who has it mapped
    assert copy.read_bytes() == b"two"
    assert native.copy_into(tmp_path, made) == made
    assert sorted(path.name for path in folder.iterdir()) == ["tiny-any-0.json", "tiny-any-0.so"]

    def full(source: Path, target: str) -> str:
        Path(target, source.name).write_bytes(b"th")
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space"):
        native.copy_into(folder, made)
    assert copy.read_bytes() == b"two"
    assert len(list(folder.iterdir())) == 2


# --- several processes, and builds that were cut off ------------------------------------------------------------------


def in_two_processes(library: Library) -> list[str]:
    """Load at the same moment, as two processes, and return what became of it in each."""
    context = multiprocessing.get_context("fork")
    together, outcomes = context.Barrier(2), context.Queue()

    def work() -> None:
        together.wait()
        try:
            load(library)
        except NativeError as error:
            outcomes.put(str(error))
        else:
            outcomes.put(str(library.found()[0]))

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    results = [outcomes.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(120)
    return results


@needs_tools
@pytest.mark.slow
def test_two_processes_build_once(workshop, capfd):
    path = str(workshop.cache / workshop.library.file)
    assert in_two_processes(workshop.library) == [path, path]
    assert workshop.compilations == 1
    _, err = capfd.readouterr()
    assert err.count("fastd2o: compiling the tiny library") == 1
    assert err.count("fastd2o: waiting for another process that compiles the tiny library") == 1
    assert err.count("done in") == 2


@needs_tools
@pytest.mark.slow
def test_who_waited_for_a_build_that_failed_does_not_repeat_it(workshop):
    one, other = in_two_processes(tiny_library(workshop.folder / "source", "int answer( { return 42; }\n"))
    assert one == other
    assert "answer.cpp:1:" in one
    assert workshop.compilations == 1


@needs_tools
@pytest.mark.slow
def test_a_build_that_was_killed_leaves_nothing_in_the_way(workshop):
    go_on = workshop.folder / "go on"
    workshop.before_compiling(f'[ -e "{go_on}" ] || sleep 60')

    def work() -> None:
        os.setsid()  # to be killed with all that it starts
        build(workshop.library)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 60
    while not workshop.compilations and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(workshop.cache.glob("*.building"))) == 1
    assert workshop.library.found() == []

    go_on.touch()
    path = build(workshop.library)
    assert workshop.library.found() == [path]
    assert list(workshop.cache.glob("*.building")) == []
    assert workshop.compilations == 2


@needs_tools
def test_sources_that_change_while_they_are_compiled_leave_no_binary(workshop):
    workshop.before_compiling(f'echo "// changed" >> "{workshop.library.sources[0]}"')
    with pytest.raises(NativeError, match=r"the sources of the tiny library changed meanwhile\. Fix: start again"):
        build(workshop.library)
    assert workshop.library.found() == dataclasses.replace(workshop.library).found() == []


# --- what stands in the way -------------------------------------------------------------------------------------------


def stub(monkeypatch, library: Library) -> None:
    """Have ``load("cpu")`` load this library in the place of the kernels."""
    schema = dataclasses.replace(library, name="schema")
    monkeypatch.setattr(native, "_libraries", lambda kind: (schema, dataclasses.replace(library, name="cpu")))


@needs_tools
def test_a_source_that_does_not_compile_is_told_with_its_first_error_and_not_tried_again(workshop, monkeypatch, capfd):
    stub(monkeypatch, tiny_library(workshop.folder / "source", "int answer() { return forty_two; }\n"))
    assert native.unavailable("cpu") is None
    with pytest.raises(NativeError) as failure:
        native.load("cpu")
    message = str(failure.value)
    assert "the tiny library did not compile: " in message
    assert "answer.cpp:1:23: error: ‘forty_two’ was not declared" in message.replace("'", "‘", 1)
    assert "Fix: use g++ 11 or newer, named in CXX" in message
    (log,) = re.findall(r"\(the whole log: (.*?)\)", message)
    assert "FAILED: answer.o" in Path(log).read_text()
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"fastd2o: compiling the tiny library, .* failed after \d+ s\n", err)

    assert native.unavailable("cpu") == message
    with pytest.raises(NativeError, match=re.escape(message)):
        native.load("cpu")
    assert workshop.compilations == 1
    assert capfd.readouterr() == ("", "")


@needs_tools
def test_a_compiler_that_is_broken(workshop, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NativeError, match=r"the tiny library did not compile: .*/false'.* Fix: use g\+\+ 11"):
        build(workshop.library)
    assert capfd.readouterr().err.count("\n") == 1
    assert workshop.library.found() == []


@needs_tools
def test_the_compiler_that_is_named_is_nvccs_too(workshop, monkeypatch):
    toolkit, called = workshop.folder / "cuda", workshop.folder / "called"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").write_text(
        f'#!/bin/sh\necho "$*" > "{called}"\necho "error: unsupported GNU version"\nexit 1\n'
    )
    (toolkit / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    # A torch without CUDA would not look for a toolkit.
    told = f"from torch.utils import cpp_extension; cpp_extension.CUDA_HOME = {str(toolkit)!r}; "
    monkeypatch.setattr(native, "_COMPILE", told + native._COMPILE)
    source = workshop.library.sources[0].rename(workshop.folder / "source" / "answer.cu")
    library = dataclasses.replace(
        workshop.library, sources=(source,), inputs=(source,), targets=("sm_80",), nvcc_flags=("-O0",)
    )
    with pytest.raises(NativeError, match=r"unsupported GNU version.* with a g[+][+] that it supports, named in CXX"):
        build(library)
    assert f"-ccbin {workshop.compiler} " in called.read_text()

    monkeypatch.delenv("CXX")
    monkeypatch.setenv("CC", "gcc-13")
    assert native._build_environment()["CC"] == "gcc-13"
    monkeypatch.delenv("CC")
    assert "CC" not in native._build_environment()


def test_no_compiler_no_ninja(workshop, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert reason_against("cpu").startswith("CXX=no-such-compiler is not a compiler that can be found. Fix: ")
    with pytest.raises(NativeError, match="CXX=no-such-compiler"):
        native.load("cpu")

    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert native.unavailable("cpu") == (
        "there is no C++ compiler. Fix: install g++ 11 or newer, or name a compiler in CXX"
    )
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "nothing"))
    assert native.unavailable("cpu") == (
        "ninja is not installed, which compiling needs. Fix: pip install 'fastd2o[native]'"
    )


def test_ninja_is_found_beside_a_python_that_was_not_activated(monkeypatch, tmp_path):
    beside = Path(sys.executable).parent / "ninja"
    if not beside.exists():
        pytest.skip("ninja is not installed beside this Python")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.ninja() == str(beside)
    assert native._build_environment()["PATH"].split(os.pathsep) == [str(tmp_path), str(beside.parent)]


def test_switched_off(workshop, monkeypatch):
    native._loaded.add("cpu")
    assert native.unavailable("cpu") is None
    monkeypatch.setenv("FASTD2O_NATIVE", "0")
    assert native.unavailable("cpu") == "FASTD2O_NATIVE=0 switches the native kernels off. Fix: unset it"
    with pytest.raises(NativeError, match="FASTD2O_NATIVE=0"):
        native.load("cpu")


@pytest.mark.parametrize(("version", "old"), [("2.9.1+cu128", True), ("1.13", True), ("2.10.0", False), ("3.0", False)])
def test_an_old_torch(workshop, monkeypatch, version, old):
    monkeypatch.setattr(torch, "__version__", version)
    reason = native.unsupported("cpu")
    assert (reason is not None) is old
    if old:
        assert reason == reason_against("cpu")
        assert f"need torch 2.10 or newer, and this is {version}. Fix: " in reason_against("cpu")
        assert native.built("cpu") is None


def test_torch_without_cuda_or_without_a_gpu():
    if torch.cuda.is_available():
        assert native._no_device() is None
        assert all(re.fullmatch(r"sm_\d+a?", arch) for arch in native.device_archs())
        return
    what = "was built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
    assert what in reason_against("cuda")
    assert native.built("cuda") is None
    with pytest.raises(NativeError, match=what):
        native.load("cuda")


def test_a_cache_that_cannot_be_written(workshop, monkeypatch, tmp_path):
    (tmp_path / "file").touch()  # a folder below a file can be made by nobody, not even by root
    monkeypatch.setenv("FASTD2O_CACHE", str(tmp_path / "file" / "cache"))
    assert f"can be written (tried: {tmp_path}/file/cache). Fix: set FASTD2O_CACHE to one" in reason_against("cpu")
    with pytest.raises(NativeError, match="tried: "):
        native.load("cpu")
    with pytest.raises(
        NativeError, match=r"can be written \(.*/file/cache: Not a directory\)\. Fix: set FASTD2O_CACHE"
    ):
        build(workshop.library)
    assert workshop.compilations == 0


def test_without_a_home_that_can_be_written_a_private_temporary_folder_serves(workshop, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.delenv("FASTD2O_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"fastd2o-{os.getuid()}"
    assert native.cache_folders() == [tmp_path / "file" / "fastd2o", folder]
    assert native._writable_cache() == folder
    assert folder.stat().st_mode & 0o777 == 0o755

    folder.chmod(0o777)  # anyone could have put binaries there
    assert native.cache_folders() == [tmp_path / "file" / "fastd2o"]
    with pytest.raises(NativeError, match="no folder for the compiled kernels"):
        native._writable_cache()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert native.cache_folders() == [tmp_path / "file" / "fastd2o"]


# --- the real ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "library", [native.schema_library(), native.cpu_library("AVX2"), native.cuda_library(("sm_80",))]
)
def test_every_file_that_is_included_counts(library):
    assert library.sources
    assert set(library.sources) <= set(library.inputs)
    for path in library.inputs:
        for included in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE):
            candidates = {(library.root / included).resolve(), (path.parent / included).resolve()}
            assert candidates & {file.resolve() for file in library.inputs}, f"{path}: {included}"


@needs_tools
@pytest.mark.slow
def test_the_cpu_kernels_are_built_without_a_warning_and_loaded():
    native.load("cpu")
    path = native.built("cpu")
    assert path is not None
    assert native.unavailable("cpu") is None
    assert path.name.startswith(f"cpu-{native.cpu_capability()}-")
    assert torch.ops.fastd2o_native.fold_.default is not None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastd2o_native::fold_", "CPU")
    log = path.with_suffix(".log")
    if log.exists():  # not where it came with a wheel
        assert [line for line in log.read_text().splitlines() if "warning:" in line] == []


@needs_tools
@pytest.mark.slow
def test_a_second_copy_in_one_process_is_refused(tmp_path):
    """torch ends a process in which an operator is declared twice."""
    library = native.schema_library()
    path = next(iter(library.found()), None) or build(library)
    other = native.copy_into(tmp_path, path)

    def load_after(loaded: Path) -> subprocess.CompletedProcess[str]:
        program = f"""
import torch
from fastd2o.ops import native
torch.ops.load_library({str(loaded)!r})
library = native.schema_library()
with native.Progress(library) as progress:
    library.load(progress)
assert torch.ops.fastd2o_native.fold_.default is not None
"""
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    refused = load_after(other)
    assert refused.returncode == 1, refused.stderr
    assert "NativeError: another copy of fastd2o has loaded the operators' schema" in refused.stderr
    assert load_after(path).returncode == 0


def test_import_stays_quick():
    program = "import sys, fastd2o; print({'torch.utils.cpp_extension', 'setuptools'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
