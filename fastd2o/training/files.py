"""Files of a run that a kill at any moment leaves whole: written aside and renamed, or appended to and cut back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from fastd2o.errors import FastD2OError

FINGERPRINTS = ("dataset", "model")
"""Settings of a partial file that are fingerprints: that they differ is told, not how."""


class Record(Protocol):
    """A line of a partial file: a dataclass that knows the row of the dataset it is of."""

    @property
    def line(self) -> int:
        """The row of the dataset, counted from 1."""


R = TypeVar("R", bound=Record)


class PartialFile(Generic[R]):
    """``OUT.partial``: the records of a run that is not over, in the order in which they are made.

    The first line holds the settings that the records depend on.

    Args:
        out: the file that the run is to write.
        settings: all that the records depend on; ``kind`` tells what wrote them.
        kind: the name of the setting that holds the version of the format.
        parse: makes a record of what ``json`` read; it raises a KeyError or TypeError for anything else.
    """

    def __init__(self, out: Path, settings: dict[str, Any], kind: str, parse: Callable[[Any], R]) -> None:
        self.path = partial_path(out)
        self.settings = settings
        self.kind = kind
        self.parse = parse

    def resume(self, expected: list[int], chunk: int = 1, *, overwrite: bool = False) -> list[R]:
        """The records that are already there, cut back to whole chunks; none where there is no file.

        Args:
            expected: the lines of the dataset in the order of the records.
            chunk: how many records are finished together.
            overwrite: begin anew where the file is of other settings.

        Raises:
            FastD2OError: the file is of other settings.
        """
        if not self.path.exists():
            return []
        header, *lines = _complete_lines(self.path) or [b""]
        difference = self._difference(header)
        if difference and not overwrite:
            raise FastD2OError(
                f"{self.path} is the beginning of another run: {difference}. Fix: use its settings to go on with it, "
                "or overwrite=True to start again"
            )
        if difference or not header:
            self.path.unlink()
            return []
        records: list[R] = []
        for line, text in zip(expected, lines, strict=False):
            record = self._read(text)
            if record is None or record.line != line:
                break
            records.append(record)
        if len(records) < len(expected):
            del records[len(records) - len(records) % chunk :]
        with self.path.open("rb+") as file:
            file.truncate(len(header) + sum(map(len, lines[: len(records)])))
        return records

    def append(self, records: Sequence[R]) -> None:
        """Add a chunk of records, and wait until the disk has them."""
        lines = [] if self.path.exists() else [dump(self.settings)]
        lines += [dump(asdict(record)) for record in records]  # type: ignore[call-overload]
        with explained(self.path, self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file: the run is over."""
        self.path.unlink(missing_ok=True)

    def _difference(self, header: bytes) -> str:
        """How the settings of the file differ from this run's; empty if they do not, or if it has not even a header."""
        if not header:
            return ""
        try:
            theirs = json.loads(header)
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict) or theirs.get(self.kind) != self.settings[self.kind]:
            return "it was not written by this version of fastd2o"
        names = [name for name in self.settings if theirs.get(name) != self.settings[name]]
        return ", ".join(
            f"other {name}"
            if name in FINGERPRINTS
            else f"{name} {theirs.get(name)!r} instead of {self.settings[name]!r}"
            for name in names
        )

    def _read(self, line: bytes) -> R | None:
        """A record, or None for the garbage that a crash of the machine can leave behind."""
        try:
            return self.parse(json.loads(line))
        except (ValueError, KeyError, TypeError):
            return None


def partial_path(out: Path) -> Path:
    """Where the records of an unfinished ``out`` are."""
    return out.with_name(out.name + ".partial")


def replace_file(out: Path, content: bytes | Iterable[bytes]) -> None:
    """Write ``out`` so that at every moment there is either the old file (or none) or the whole new one.

    Raises:
        FastD2OError: it cannot be written; what was there is still there.
    """
    temporary = out.with_name(out.name + ".tmp")
    try:
        with explained(out, partial_path(out)):
            out.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, out)
    finally:
        with suppress(OSError):  # after the renaming it is gone
            temporary.unlink()


def write_rows(out: Path, rows: Iterable[Any]) -> None:
    """:func:`replace_file` with one JSON object per line, in a folder that is made where it is missing."""
    replace_file(out, map(dump, rows))


def dump(value: Any) -> bytes:
    """``value`` as a line of JSON."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


@contextmanager
def explained(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Say why a write failed, what is left in ``partial``, and how to go on."""
    try:
        yield
    except OSError as error:
        fix = "Fix: make room or give the right to write there, or choose another file"
        if partial is not None and partial.exists():
            fix = (
                f"The rows that are finished stay in {partial.name}. Fix: make room or give the right to write there, "
                "then run the same again, which goes on where it stopped"
            )
        raise FastD2OError(f"{path} cannot be written: {error.strerror or error}. {fix}") from error


def _complete_lines(path: Path) -> list[bytes]:
    """The lines that end in a newline; one that was being written when the run was killed does not."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
