"""Finds, builds and loads the native kernels of ``csrc``.

Three shared libraries: the operators' schema, the CPU kernels, the CUDA kernels. A compiled one is two files::

    cpu-AVX512-4f1c0e7a9b2d3856.so      NAME-TARGETS-KEY: what it is, where it runs, a hash of all that went into it
    cpu-AVX512-4f1c0e7a9b2d3856.json    the versions it was made with, and the checksum of the .so

They are looked for in ``fastd2o/_native`` (a wheel with binaries), then in the cache. The name alone tells whether a
binary fits this source, these flags and this torch: nothing is rebuilt needlessly, nothing stale is loaded. Without a
match, ninja builds one, in a folder of its own, under a lock that the system takes back from a process that dies, and
moves it into place when it is whole. ``docs/building.md`` tells the user's side.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastd2o.errors import FastD2OError

Kind = Literal["cpu", "cuda"]
KINDS: tuple[Kind, ...] = ("cpu", "cuda")
CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")
ARCHS = ("sm_80", "sm_90a", "sm_100a")  # what a wheel's CUDA library is built for

_PACKAGE = Path(__file__).parents[1]
PACKAGED = _PACKAGE / "_native"
# Installed, the sources lie inside the package; in the repository, and so in an editable install, beside it.
CSRC = _PACKAGE / "csrc" if (_PACKAGE / "csrc").exists() else _PACKAGE.parent / "csrc"

# Of the environment, what decides whether kernels can be had.
VARIABLES = ("FASTD2O_NATIVE", "FASTD2O_CACHE", "XDG_CACHE_HOME", "CXX", "PATH", "CUDA_HOME")

_OLDEST_TORCH = (2, 10)
_OLDEST_GPU = (8, 0)
_STABLE_ABI = "stable ABI of torch 2.10"
_STABLE_ABI_FLAG = "-DTORCH_TARGET_VERSION=0x020a000000000000"

CXX_FLAGS = ("-O3", "-std=c++20", "-DNDEBUG", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
_CAPABILITY_FLAGS = {
    "AVX512": (
        *("-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 finds fault with its own intrinsics
    ),
    "AVX2": ("-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"),
    "DEFAULT": (),
}
# torch's tool takes the operators of half and bfloat16 away from CUDA code; the last four give them back.
NVCC_FLAGS = (
    *("-O3", "-std=c++20", "-lineinfo", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", _STABLE_ABI_FLAG),
    *("-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__"),
    *("-U__CUDA_NO_HALF2_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"),
)

# A process of its own: what it prints goes to the log, what it imports and its environment stay there. "Standalone"
# keeps torch's tool from loading what it built, which may be for another machine, and from linking it to Python; the
# flag -shared then makes it a library after all.
_COMPILE = "import json, sys; from torch.utils import cpp_extension; cpp_extension.load(**json.loads(sys.argv[1]))"
_ERROR = re.compile(r"\b(error|fatal)\s*:|undefined reference|cannot find|: not found|No such file", re.IGNORECASE)

_lock = threading.RLock()
_loaded: set[str] = set()
_failed: dict[Kind, str] = {}


class NativeError(FastD2OError):
    """The native kernels cannot be had. The message says why, and the fix."""


def unavailable(kind: Kind) -> str | None:
    """Why these kernels cannot be had here, with the fix; None when they are loaded, built, or can be built.

    Nothing is compiled or loaded to find out.
    """
    if switched_off():
        return "FASTD2O_NATIVE=0 switches the native kernels off. Fix: unset it"
    if kind in _loaded:
        return None
    reason = _failed.get(kind) or unsupported(kind) or (_no_device() if kind == "cuda" else None)
    if reason is None and not all(library.found() for library in _libraries(kind)):
        reason = cannot_build(kind)
    return reason


def switched_off() -> bool:
    """Whether the user wants none."""
    return os.environ.get("FASTD2O_NATIVE") == "0"


def load(kind: Kind) -> None:
    """Register the operators of ``torch.ops.fastd2o_native`` for one kind of device, building what is missing.

    Idempotent, and safe from several threads and processes. Compiling is told in one line on stderr.

    Raises:
        NativeError: they cannot be had. A build that failed is not tried again by this process.
    """
    with _lock:
        reason = unavailable(kind)
        if reason is not None:
            raise NativeError(reason)
        if kind in _loaded:
            return
        schema, library = _libraries(kind)
        try:
            with Progress(library) as progress:
                schema.load(progress)
                library.load(progress)
        except NativeError as error:
            _failed[kind] = str(error)
            raise


def built(kind: Kind) -> Path | None:
    """Where the binary for this machine is, or None while there is none."""
    if unsupported(kind) or (kind == "cuda" and _no_device()):
        return None
    return next(iter(_libraries(kind)[1].found()), None)


# --- the libraries ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """A shared library: what goes into it, and where it runs.

    Args:
        name: The beginning of the file's name.
        targets: The CPU capability or the GPU architectures that it is for.
        root: The folder to include from.
        sources: The files to compile.
        inputs: All files that decide what comes out: sources, headers, the schema it has to agree with.
        abi: What the binary fits besides its sources.
        title: What it is called.
        takes: How long compiling takes, about.
        flags: For the C++ compiler.
        nvcc_flags: For nvcc, without the architectures.
        declares: An operator that it declares, which a process can do but once.
    """

    name: str
    targets: tuple[str, ...]
    root: Path
    sources: tuple[Path, ...]
    inputs: tuple[Path, ...]
    abi: str
    title: str
    takes: str
    flags: tuple[str, ...] = ()
    nvcc_flags: tuple[str, ...] = ()
    declares: str | None = None

    @functools.cached_property
    def file(self) -> str:
        """The binary's name. Its last part hashes everything that goes into it but ``targets``, which it spells out."""
        digest = hashlib.sha256(repr((self.abi, self.flags, self.nvcc_flags, platform.machine())).encode())
        for path in self.inputs:
            digest.update(f"\0{path.relative_to(self.root)}\0".encode() + path.read_bytes())
        return f"{self.name}-{'+'.join(self.targets)}-{digest.hexdigest()[:16]}.so"

    def found(self) -> list[Path]:
        """The intact binaries that fit, the preferred one first."""
        alike = f"{self.name}-*-{self.file.rpartition('-')[2]}"
        folders = (PACKAGED, *cache_folders())
        paths = [folder / name for folder in folders for name in sorted(glob.glob(alike, root_dir=folder))]
        return [path for path in paths if self._served_by(path) and _intact(path)]

    def _served_by(self, path: Path) -> bool:
        offered = path.stem.split("-")[1].split("+")
        return all(any(_runs(offer, target) for offer in offered) for target in self.targets)

    def load(self, progress: Progress) -> None:
        """Load it, building it first if need be."""
        if self.name in _loaded or self._declared():
            return
        # One from a wheel may not fit the C library here: then the next one, and at last one made here.
        problem = None
        for path in self.found():
            problem = _open(path)
            if problem is None or path.parent != PACKAGED:
                break
        else:
            path = self.build(progress)
            problem = _open(path)
        if problem is not None:
            raise NativeError(
                f"{path} cannot be loaded: {problem}. Fix: fastd2o build --force, or with another compiler in CXX"
            )
        _loaded.add(self.name)

    def _declared(self) -> bool:
        """Whether this process has the operators that it declares, from this very file.

        Raises:
            NativeError: from another. torch would end the process, inside dlopen, if they were declared again.
        """
        if self.declares is None or not torch._C._jit_get_schemas_for_operator(self.declares):
            return False
        if torch.ops.loaded_libraries.isdisjoint(os.path.realpath(path) for path in self.found()):
            raise NativeError(
                f"another copy of fastd2o has loaded {self.title} into this process, which can hold one. Fix: import "
                f"only one; this one is {_PACKAGE}"
            )
        return True

    def build(self, progress: Progress, force: bool = False) -> Path:
        """Compile into the cache, with ``force`` even what is there, and return where.

        Raises:
            NativeError: with the first error, and where the log is.
        """
        folder = _writable_cache()
        path, began = folder / self.file, time.time()
        log = path.with_suffix(".log")
        try:
            with _locked(path.with_suffix(".lock"), progress) as alone:
                if not force and _intact(path):
                    return path
                if not force and log.exists() and log.stat().st_mtime > began:
                    raise self._failure(log)  # of the process that this one waited for: it would only fail again
                for junk in folder.glob(f"{path.stem}.*.building") if alone else ():  # of builds that were killed
                    shutil.rmtree(junk, ignore_errors=True)
                progress.begin("compiling")
                with tempfile.TemporaryDirectory(".building", f"{path.stem}.", folder) as scratch:
                    made = Path(scratch, self.file)
                    succeeded = self._compile(made)
                    if replace(self).file != self.file:
                        raise NativeError(f"the sources of {self.title} changed meanwhile. Fix: start again")
                    made.with_suffix(".log").replace(log)
                    if not succeeded:
                        raise self._failure(log)
                    made.with_suffix(".json").write_text(json.dumps(self._record(made), indent=2) + "\n")
                    for suffix in (".so", ".json"):
                        made.with_suffix(suffix).replace(path.with_suffix(suffix))
        except OSError as error:
            fix = "set FASTD2O_CACHE to another folder"
            raise NativeError(f"{self.title} cannot be built in {folder}: {error}. Fix: {fix}") from error
        return path

    def _compile(self, binary: Path) -> bool:
        """Compile in the folder of ``binary``, and write its log."""
        numbers = [target.removeprefix("sm_") for target in self.targets if target.startswith("sm_")]
        arguments = {
            "name": binary.name,
            "sources": [str(path) for path in self.sources],
            "extra_cflags": list(self.flags),
            "extra_cuda_cflags": [*self.nvcc_flags, *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers)],
            # What is not used is not linked. Nor is OpenMP's runtime: torch brings one, a second would have its own
            # threads.
            "extra_ldflags": ["-shared", "-Wl,--as-needed"],
            "extra_include_paths": [str(self.root)],
            "build_directory": str(binary.parent),
            "is_python_module": False,
            "is_standalone": True,
            "verbose": True,
        }
        with binary.with_suffix(".log").open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-c", _COMPILE, json.dumps(arguments)],
                cwd=binary.parent,
                env=_build_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return done.returncode == 0

    def _failure(self, log: Path) -> NativeError:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        first = next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "nothing was said")
        tool = "g++ 11 or newer, named in CXX"
        if self.nvcc_flags:
            tool = "CUDA 12.8 or newer, named in CUDA_HOME, with a g++ that it supports, named in CXX"
        return NativeError(
            f"{self.title} did not compile: {first} (the whole log: {log}). Fix: use {tool}; FASTD2O_NATIVE=0 does "
            "without"
        )

    def _record(self, binary: Path) -> dict[str, object]:
        return {
            "library": self.name,
            "targets": self.targets,
            "abi": self.abi,
            "torch": str(torch.__version__),
            "compiler": version_of(compiler() or ""),
            "flags": self.flags or self.nvcc_flags,
            "sha256": _checksum(binary),
        }


def schema_library() -> Library:
    """The operators' declarations, one binary for every torch since 2.10."""
    sources = _files("schema.cpp")
    return Library(
        name="schema",
        targets=("any",),
        root=CSRC,
        sources=sources,
        inputs=sources,
        abi=_STABLE_ABI,
        title="the operators' schema",
        takes="a few seconds",
        flags=(*CXX_FLAGS, _STABLE_ABI_FLAG),
        declares="fastd2o_native::fold_",
    )


def cpu_library(capability: str) -> Library:
    """The CPU kernels for one of :data:`CAPABILITIES`, for this torch only: ``at::vec`` and oneDNN's kernels are of
    the plain ABI."""
    flags = [*CXX_FLAGS, f"-DCPU_CAPABILITY={capability}", *_CAPABILITY_FLAGS[capability]]
    if "parallel backend: OpenMP" in torch.__config__.parallel_info():
        flags.append("-fopenmp")
    return Library(
        name="cpu",
        targets=(capability,),
        root=CSRC,
        sources=_files("cpu/*.cpp"),
        inputs=_files("*.h", "schema.cpp", "cpu/*.h", "cpu/*.cpp"),
        abi=f"torch {torch.__version__}",
        title=f"the CPU kernels ({capability})",
        takes="half a minute",
        flags=tuple(flags),
    )


def cuda_library(archs: tuple[str, ...]) -> Library:
    """The CUDA kernels for architectures such as :data:`ARCHS`, one binary for every torch since 2.10 that is built
    with the same major version of CUDA."""
    return Library(
        name="cuda",
        targets=archs,
        root=CSRC,
        sources=_files("cuda/*.cu"),
        inputs=_files("*.h", "schema.cpp", "cuda/*.h", "cuda/*.cuh", "cuda/*.cu"),
        abi=f"{_STABLE_ABI}, CUDA {(torch.version.cuda or 'none').partition('.')[0]}",
        title=f"the CUDA kernels ({', '.join(archs)})",
        takes="a minute",
        nvcc_flags=NVCC_FLAGS,
    )


def ahead() -> list[Library]:
    """What a wheel carries: everything that can be compiled here, for all machines of this processor's family.

    Raises:
        NativeError: not even the CPU kernels can be.
    """
    reason = cannot_build("cpu")
    if reason is not None:
        raise NativeError(reason)
    capabilities = CAPABILITIES if platform.machine() == "x86_64" else ("DEFAULT",)
    libraries = [schema_library(), *map(cpu_library, capabilities)]
    return libraries if cannot_build("cuda") else [*libraries, cuda_library(ARCHS)]


def copy_into(folder: Path, path: Path) -> Path:
    """Copy a built library and its record to another folder, and return where it is there.

    A process that has loaded the one that was there keeps it: a file that is mapped must not be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / path.name
    if not (copy.exists() and copy.samefile(path)):
        with tempfile.TemporaryDirectory(".copying", f"{path.stem}.", folder) as scratch:
            for file in (path, path.with_suffix(".json")):
                os.replace(shutil.copy2(file, scratch), folder / file.name)
    return copy


def _libraries(kind: Kind) -> tuple[Library, Library]:
    """The two that make these kernels work on this machine, in the order of loading."""
    if kind == "cuda":
        return schema_library(), cuda_library(device_archs())
    return schema_library(), cpu_library(cpu_capability())


def _files(*patterns: str) -> tuple[Path, ...]:
    return tuple(path for pattern in patterns for path in sorted(CSRC.glob(pattern)))


def cpu_capability() -> str:
    """One of :data:`CAPABILITIES`: what torch's own kernels use here. Other processors' are compiled as the compiler
    pleases, and ``at::vec`` takes NEON by itself."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in CAPABILITIES else "DEFAULT"


def device_archs() -> tuple[str, ...]:
    """The architectures of the GPUs here, with the features that only they have where there are such ("a")."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return tuple(f"sm_{major}{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(found))


def _runs(offered: str, wanted: str) -> bool:
    """Whether code for one target runs on another: GPU code also runs on later minor versions, but for the "a"."""
    if offered == wanted:
        return True
    plain, device = re.fullmatch(r"sm_(\d+)(\d)", offered), re.fullmatch(r"sm_(\d+)(\d)a?", wanted)
    return bool(plain and device) and plain[1] == device[1] and plain[2] <= device[2]  # type: ignore[index]


# --- what the machine offers ------------------------------------------------------------------------------------------


def unsupported(kind: Kind) -> str | None:
    """Why no compiler could help: the platform, or this torch. None where that is no obstacle."""
    if sys.platform != "linux":
        return f"the native kernels are for Linux, and this is {sys.platform}. Fix: use the backend 'torch'"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < _OLDEST_TORCH:
        return (
            f"the native kernels need torch 2.10 or newer, and this is {torch.__version__}. Fix: pip install -U torch"
        )
    if kind == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA. Fix: install one that was built with it"
    if not any((CSRC / kind).glob("*.c*")):
        return f"the sources are missing from {CSRC / kind}. Fix: install fastd2o again"
    return None


def _no_device() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device. Fix: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if oldest < _OLDEST_GPU:
        return (
            f"the kernels are for GPUs of compute capability 8.0 and newer, and one here has {oldest[0]}.{oldest[1]}. "
            "Fix: hide it with CUDA_VISIBLE_DEVICES, or use the backend 'torch'"
        )
    return None


def cannot_build(kind: Kind) -> str | None:
    """Why these kernels cannot be compiled here, with the fix; None where nothing is missing. No device is needed."""
    reason = unsupported(kind)
    if reason is not None:
        return reason
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"CXX={named} is not a compiler that can be found" if named else "there is no C++ compiler"
        return f"{what}. Fix: install g++ 11 or newer, or name a compiler in CXX"
    if ninja() is None or importlib.util.find_spec("setuptools") is None:
        absent = "setuptools" if ninja() else "ninja"
        return f"{absent} is not installed, which compiling needs. Fix: pip install 'fastd2o[native]'"
    if not any(_can_be_written(folder) for folder in cache_folders()):
        tried = ", ".join(map(str, cache_folders()))
        return f"no folder for the compiled kernels can be written (tried: {tried}). Fix: set FASTD2O_CACHE to one"
    return _cannot_build_cuda() if kind == "cuda" else None


def _cannot_build_cuda() -> str | None:
    path = nvcc()
    if path is None:
        return "nvcc was not found. Fix: install the CUDA toolkit, and set CUDA_HOME to where it is"
    release = re.search(r"release (\d+)\.", version_of(path))
    wanted = (torch.version.cuda or "").partition(".")[0]
    if release is not None and release[1] != wanted:
        return (
            f"{path} is of CUDA {release[1]}, and torch was built with CUDA {wanted}. Fix: install the toolkit of CUDA "
            f"{wanted}, and set CUDA_HOME to where it is"
        )
    return None


def compiler() -> str | None:
    """The path of the C++ compiler: CXX, or the first on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]
    found = next(filter(None, map(shutil.which, names)), None)
    return found and os.path.abspath(found)  # it is called in another folder


def ninja() -> str | None:
    """The path of ninja: on the PATH, or beside a Python whose environment was not activated."""
    beside = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return shutil.which("ninja", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *beside]))


def nvcc() -> str | None:
    """The path of nvcc: in CUDA_HOME if that is set, else in the toolkit on the PATH, else in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    homes = [Path(home)] if home else [*([Path(on_path).parents[1]] if on_path else []), Path("/usr/local/cuda")]
    homes = [home for home in homes if (home / "bin" / "nvcc").exists()]
    # An nvcc on the PATH may be a script that calls the real one: the headers tell where the toolkit is.
    homes.sort(key=lambda home: not (home / "include" / "cuda_runtime.h").exists())
    return str(homes[0] / "bin" / "nvcc") if homes else None


@functools.cache
def version_of(path: str) -> str:
    """What a compiler says of its version, in one line."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    lines = said.stdout.splitlines() or ["unknown"]
    return next((line for line in lines if "release" in line), lines[0])


def _build_environment() -> dict[str, str]:
    path = os.environ.get("PATH", os.defpath)
    environment = {
        **os.environ,
        "CXX": compiler() or "",
        "PATH": os.pathsep.join([path, str(Path(ninja() or "").parent)]),
        "PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder),  # torch, wherever this process has it
    }
    if (path_to_nvcc := nvcc()) is not None:
        environment["CUDA_HOME"] = str(Path(path_to_nvcc).parents[1])
    if os.environ.get("CXX"):
        environment["CC"] = environment["CXX"]  # the name under which torch's tool looks for nvcc's host compiler
    return environment


# --- where binaries are kept ------------------------------------------------------------------------------------------


def cache_folders() -> list[Path]:
    """The folders that binaries are looked for in, and of which the first that can be written takes new ones."""
    named = os.environ.get("FASTD2O_CACHE")
    if named:
        return [Path(os.path.expanduser(named)).absolute()]
    folders = []
    with suppress(RuntimeError):  # there is no home
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastd2o"))
    with suppress(FileNotFoundError):  # nor a folder for temporary files
        temporary = Path(tempfile.gettempdir(), f"fastd2o-{os.getuid()}")
        if not _others_can_write(temporary):
            folders.append(temporary)
    return folders


def _others_can_write(folder: Path) -> bool:
    """Whether what lies there may be another user's: the folder for temporary files is everybody's."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or bool(status.st_mode & 0o022)


def _can_be_written(folder: Path) -> bool:
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def _writable_cache() -> Path:
    problems = []
    for folder in cache_folders():
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
        else:
            if folder in cache_folders():  # still: nobody else has just made it
                return folder
    tried = "; ".join(problems)
    raise NativeError(
        f"no folder for the compiled kernels can be written ({tried}). Fix: set FASTD2O_CACHE to one that can"
    )


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[bool]:
    """Let one process in at a time. The lock goes with the process that holds it, however it ends.

    Yields whether there is a lock: where the file system has none, two builds run side by side, and either is moved
    into place whole.
    """
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.begin("waiting for another process that compiles")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _intact(path: Path) -> bool:
    """Whether a binary is whole: the linker's loader would crash the process on one that was cut short."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        return bool(record["sha256"] == _checksum(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _open(path: Path) -> str | None:
    """Load a library, and return what went wrong."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return str(error.__cause__ or error)
    return None


class Progress:
    """One line on stderr about something that takes long: begun when it begins, ended with how long it took."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.began: float | None = None

    def begin(self, doing: str) -> None:
        """Begin the line, unless it has begun."""
        # Of many processes on a machine that wait for one of them, one says so.
        if self.began is None and (doing == "compiling" or os.environ.get("LOCAL_RANK", "0") == "0"):
            self.began = time.monotonic()
            what = f"{self.library.title}, about {self.library.takes}, once"
            print(f"fastd2o: {doing} {what} ... ", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.began is not None:
            outcome = "done in" if kind is None else "failed after"
            print(f"{outcome} {time.monotonic() - self.began:.0f} s", file=sys.stderr, flush=True)
