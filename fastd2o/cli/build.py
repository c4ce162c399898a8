"""``fastd2o build``: compile the native kernels before the first use does."""

from __future__ import annotations

import argparse
import re

HELP = "compile the native kernels ahead of time"

_EPILOG = """\
examples:
  fastd2o build
  fastd2o build --only cpu --capability AVX512 AVX2 --into kernels
  fastd2o build --only cuda --arch sm_80 sm_90a
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastd2o build``."""
    parser.epilog = _EPILOG
    parser.add_argument("--only", choices=("cpu", "cuda"), help="default: the CPU's, and CUDA's where torch has CUDA")
    parser.add_argument(
        "--capability",
        nargs="+",
        choices=("AVX512", "AVX2", "DEFAULT"),
        help="instructions of the CPU kernels (default: what torch uses here)",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        type=_architecture,
        metavar="sm_XY",
        help="GPUs of the CUDA kernels (default: those here; where there are none, sm_80 sm_90a sm_100a)",
    )
    parser.add_argument("--force", action="store_true", help="compile even what is there already")
    parser.add_argument(
        "--into", metavar="DIR", help="also copy the binaries to DIR; FASTD2O_CACHE=DIR uses them there"
    )


def run(args: argparse.Namespace) -> int:
    """Compile, and print where each library is."""
    from pathlib import Path

    from fastd2o.cli.arguments import UsageError
    from fastd2o.ops import native

    for flag, value, kind in (("--capability", args.capability, "cpu"), ("--arch", args.arch, "cuda")):
        if value and args.only not in (None, kind):
            raise UsageError(f"{flag} is of the {kind} kernels, and --only {args.only} leaves them out")
    libraries = [native.schema_library()]
    if args.only != "cuda":
        _check(native.cannot_build("cpu"))
        libraries += map(native.cpu_library, args.capability or [native.cpu_capability()])
    if args.only != "cpu":
        reason = native.cannot_build("cuda")
        if args.only == "cuda" or args.arch:
            _check(reason)
        if reason is None:
            libraries.append(native.cuda_library(tuple(args.arch or native.device_archs() or native.ARCHS)))
        else:
            print(f"cuda: left out: {reason}")
    for library in libraries:
        with native.Progress(library) as progress:
            found = [] if args.force else library.found()
            path = found[0] if found else library.build(progress, force=args.force)
        if args.into is not None:
            path = native.copy_into(Path(args.into), path)
        print(f"{library.name} ({', '.join(library.targets)}): {path}")
    return 0


def _architecture(text: str) -> str:
    if not re.fullmatch(r"sm_\d+a?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture such as sm_80 or sm_90a")
    return text


def _check(reason: str | None) -> None:
    from fastd2o.ops.native import NativeError

    if reason is not None:
        raise NativeError(reason)
