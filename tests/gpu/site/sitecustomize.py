"""Makes a checkout that is not installed importable as if it were: pyproject.toml's ``package-dir``, by a finder.
Python imports this on its own where the folder is on PYTHONPATH. What is installed comes first."""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
# "fastd2o.kernels" = "kernels/triton"; by hand, as Python 3.10 cannot read the format.
_PROJECT = (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
_FOLDERS = dict(re.findall(r'^"(fastd2o[\w.]*)" = "([^"]+)"$', _PROJECT, re.MULTILINE))


class _PackageDir:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in _FOLDERS:
            return None
        folder = _ROOT / _FOLDERS[name]
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


sys.meta_path.append(_PackageDir)
