"""What pyproject.toml cannot say: with FASTD2O_BUILD=1, compile the native kernels for a wheel and put them in it.

FASTD2O_BUILD=1 pip wheel . --no-build-isolation      (torch, ninja and setuptools >= 77 must be installed)
"""

import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

if int(setuptools.__version__.partition(".")[0]) < 77:  # --no-build-isolation looks at no requirement
    raise SystemExit(f"setuptools is {setuptools.__version__}, needed >= 77. Fix: pip install -U setuptools")

from setuptools.command.bdist_wheel import bdist_wheel


class BuildWithKernels(build_py):
    """Adds ``fastd2o/_native``; an editable install finds the kernels in the cache instead."""

    def run(self):
        """Copy the Python files, then compile."""
        super().run()
        sys.path.insert(0, str(Path(__file__).parent))
        try:
            from fastd2o.ops import native
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"FASTD2O_BUILD=1 needs the package {error.name!r} while the wheel is made. Fix: install it, and add "
                "--no-build-isolation"
            ) from error
        folder = Path(self.build_lib, "fastd2o", "_native")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier wheel
        try:
            for library in native.ahead():
                with native.Progress(library) as progress:
                    path = library.build(progress)
                if not self.editable_mode:
                    native.copy_into(folder, path)
        except native.NativeError as error:
            raise SystemExit(f"FASTD2O_BUILD=1: {error}") from error


class PlatformWheel(bdist_wheel):
    """The binaries are tied to the platform, not to a version of Python."""

    def get_tag(self):
        """The wheel's tag."""
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Makes setuptools take the wheel for one with binaries, which are no extension modules here."""

    def has_ext_modules(self):
        """Say yes."""
        return True


if os.environ.get("FASTD2O_BUILD") == "1":
    setup(distclass=BinaryDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
else:
    setup()
