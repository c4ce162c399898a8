"""The exceptions and the warning that FastD2O raises on its own account.

A bad argument is a plain ``ValueError`` or ``TypeError``; these are for what goes wrong beyond a single call.
"""

from __future__ import annotations


class FastD2OError(RuntimeError):
    """A run cannot go on: a folder in use, a model that cannot be served, a loss that became NaN. Its message says how
    to mend that."""


class DataError(ValueError):
    """A dataset is unusable: the message names the line, what was found, what was expected and the fix."""


class FastD2OWarning(UserWarning):
    """Something was repaired, dropped or replaced by a fallback. Said once, with the reason."""
