"""Where rows come from: a file, a saved dataset, or objects in memory become a list of numbered dictionaries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from fastd2o.errors import DataError

# A path, or any finite iterable of dictionaries: a list, a `datasets.Dataset`, a generator.
Source: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Attributes:
        line: where it came from, counted from 1: the line of a JSONL file (blank lines count), otherwise the position.
        data: the columns, as found.
    """

    line: int
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """How messages refer to a source: its name, and what its numbers count."""

    name: str
    unit: str

    @classmethod
    def of(cls, source: Source) -> Origin:
        """The origin of a source that :func:`load_rows` takes."""
        if not isinstance(source, str | os.PathLike):
            return cls("dataset", "row")
        path = Path(source)
        return cls(str(path), "line" if path.suffix in _LINE_SUFFIXES else "row")

    def at(self, line: int) -> str:
        """``"train.jsonl, line 3"``."""
        return f"{self.name}, {self.unit} {line}"


_LINE_SUFFIXES = (".jsonl", ".ndjson")


def load_rows(source: Source) -> list[Row]:
    """Read every row of a source, without interpreting the columns.

    Args:
        source: a ``.jsonl`` file (one JSON object per line, UTF-8, blank lines skipped), a ``.json`` file (one list of
            objects), a directory written by ``datasets.Dataset.save_to_disk``, a ``datasets.Dataset``, or any finite
            iterable of dictionaries.

    Returns:
        The rows in order, at least one.

    Raises:
        DataError: there is no such file, it is empty, a line is not a JSON object, or the source holds several splits.
        TypeError: the source is none of the above.
    """
    origin = Origin.of(source)
    if isinstance(source, str | os.PathLike):
        rows = list(_read_path(Path(source), origin))
    elif isinstance(source, Mapping):
        _refuse_splits(origin, source)
    elif isinstance(source, Iterable):
        rows = list(_read_objects(_as_python(source), origin))
    else:
        raise TypeError(
            f"source is a {type(source).__name__}; expected a path, a datasets.Dataset or an iterable of dictionaries"
        )
    if not rows:
        raise DataError(f"{origin.name} is empty: it holds no rows. Fix: give a dataset with at least one row")
    return rows


def _read_path(path: Path, origin: Origin) -> Iterator[Row]:
    if path.is_dir():
        return _read_directory(path, origin)
    if not path.exists():
        raise DataError(
            f"{origin.name} does not exist. Fix: give the path of a .jsonl or .json file or a saved dataset"
        )
    if path.suffix in _LINE_SUFFIXES:
        return _read_lines(path, origin)
    if path.suffix == ".json":
        return _read_list(path, origin)
    raise DataError(
        f"{origin.name} has the suffix {path.suffix!r}; expected .jsonl, .json or a directory. Fix: convert the file, "
        "or load it with the datasets library and pass the Dataset"
    )


def _read_lines(path: Path, origin: Origin) -> Iterator[Row]:
    # Read as bytes: text mode would also split at characters such as U+2028, which JSON allows inside a string.
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
                data = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:  # also an integer of too many digits, or too deep a nesting
                raise DataError(
                    f"{origin.at(line)}: broken JSON: {error}. Fix: each line must be one complete JSON object in UTF-8"
                ) from error
            if text:
                yield _row(line, data, origin)


def _read_list(path: Path, origin: Origin) -> Iterator[Row]:
    fix = "Fix: a .json file holds one list of objects; name a file with one object per line .jsonl"
    try:
        text = path.read_text("utf-8-sig")
        items = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:  # also an integer of too many digits, or too deep a nesting
        raise DataError(f"{origin.name}: broken JSON: {error}. {fix}") from error
    if not isinstance(items, list):
        raise DataError(f"{origin.name} holds a {type(items).__name__}, not a list. {fix}")
    return _read_objects(items, origin)


def _read_directory(path: Path, origin: Origin) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{origin.name} is a directory but not a saved dataset. Fix: give a directory written by "
            "datasets.Dataset.save_to_disk, or a .jsonl file"
        ) from error
    if isinstance(loaded, Mapping):
        _refuse_splits(origin, loaded)
    return _read_objects(_as_python(loaded), origin)


def _as_python(source: Iterable[Any]) -> Iterable[Any]:
    """A ``datasets.Dataset`` may be set to yield tensors; its rows are read as plain Python objects."""
    with_format = getattr(source, "with_format", None)
    return source if with_format is None else with_format(None)


def _read_objects(items: Iterable[Any], origin: Origin) -> Iterator[Row]:
    return (_row(line, data, origin) for line, data in enumerate(items, start=1))


def _row(line: int, data: Any, origin: Origin) -> Row:
    if not isinstance(data, Mapping):
        raise DataError(
            f"{origin.at(line)}: found a {type(data).__name__}. Fix: every row must be an object with named columns"
        )
    return Row(line, data)


def _refuse_splits(origin: Origin, splits: Mapping[str, Any]) -> NoReturn:
    raise DataError(
        f"{origin.name} is a mapping with the keys {', '.join(map(repr, splits))}, not rows. Fix: choose one split of "
        "a DatasetDict (dataset['train'], or the directory's train folder), or wrap a single row in a list"
    )
