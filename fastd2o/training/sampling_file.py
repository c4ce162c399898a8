"""Anchors into a file: resumable after a kill at any moment, and ``OUT`` only ever appears as a whole.

While a run is under way its rows are in ``OUT.partial``: a first line with the settings, then one line per finished
row. Rows are appended a chunk at a time. A run that finds such a file keeps its complete chunks and goes on after them,
so that the batches, and with them the samples, are those of a run that was never stopped. At the end ``OUT`` is written
beside and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastd2o.data.rows import Source
from fastd2o.errors import FastD2OError
from fastd2o.training.sampling import (
    Prompt,
    SampledRow,
    SamplingOptions,
    SamplingReport,
    check_result,
    draw_chunks,
    in_order,
    read_prompts,
    rows_per_chunk,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORMAT = 1


def sample_file(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: Source,
    out: str | os.PathLike[str],
    options: SamplingOptions,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> SamplingReport:
    """Draw anchors as :func:`fastd2o.training.sampling.sample_anchors` does, into the JSONL file ``out``.

    A run of the same settings that was stopped goes on where it was, and gives the same samples.

    Args:
        model: A causal language model.
        processing_class: Its tokenizer.
        dataset: Whatever :func:`fastd2o.data.load_rows` reads.
        out: The file to write.
        options: How to draw.
        overwrite: Replace ``out``, and the beginning of a run of other settings. ``out`` stays as it is until the end.
        progress: Show a progress bar.

    Returns:
        The counts over all rows, those of an earlier part of the run included.

    Raises:
        FastD2OError: ``out`` exists, is the dataset itself or cannot be written; ``out.partial`` is of a run of other
            settings; no row got an anchor; or the disk is full, say: what was finished stays then, and the same call
            goes on from there.
        ValueError, DataError: as ``sample_anchors``.
    """
    check_output(out, dataset, overwrite=overwrite)
    prompts, report = read_prompts(dataset, model, processing_class, options)
    partial = _PartialFile(Path(out), _settings(model, prompts, options))
    size = rows_per_chunk(options.num_anchors, options.batch_size)
    done = partial.resume([prompt.line for prompt in prompts], size, overwrite=overwrite)
    for chunk in draw_chunks(model, processing_class, prompts, options, finished=len(done), progress=progress):
        partial.append(chunk)
        done += chunk
    for row in done:
        report.add(row.counts)
    if not report.anchors:
        partial.remove()
    check_result(report)
    write_rows(Path(out), in_order(done))
    partial.remove()
    return report


def check_output(out: str | os.PathLike[str], dataset: Source, *, overwrite: bool) -> None:
    """Raise :class:`FastD2OError` unless ``out`` can be written: cheap, for before a model is loaded.

    The dataset is never overwritten: a run that was stopped between could not be begun again.
    """
    path = Path(out)
    if path.is_dir():
        raise FastD2OError(f"{path} is a folder. Fix: give the name of a .jsonl file")
    if path.suffix != ".jsonl":
        raise FastD2OError(f"{path} does not end in .jsonl, so it could not be read back. Fix: name it {path}.jsonl")
    if isinstance(dataset, str | os.PathLike) and path.exists() and Path(dataset).exists() and path.samefile(dataset):
        raise FastD2OError(f"{path} is the dataset, which the result would replace. Fix: choose another file")
    if path.exists() and not overwrite:
        raise FastD2OError(f"{path} exists. Fix: choose another file, or overwrite=True to replace it")
    _try_to_write(path)


def _partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _try_to_write(out: Path) -> None:
    """Open the partial file of ``out`` for writing, and leave everything as it was."""
    partial = _partial_path(out)
    with _explained(out):
        new_folders = [folder for folder in out.parents if not folder.exists()]
        new = not partial.exists()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial.open("ab").close()
        finally:
            if new and partial.exists():
                partial.unlink()
            for folder in filter(Path.exists, new_folders):
                folder.rmdir()


class _PartialFile:
    """``OUT.partial``: the rows of a run that is not over."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = _partial_path(out)
        self.settings = settings

    def resume(self, expected: list[int], chunk: int, *, overwrite: bool) -> list[SampledRow]:
        """The rows that are already there, cut back to whole chunks; none where there is no file.

        ``expected`` are the lines of the dataset in the order in which they are sampled.
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
        rows: list[SampledRow] = []
        for line, record in zip(expected, lines, strict=False):
            row = _parse_record(record)
            if row is None or row.line != line:
                break
            rows.append(row)
        if len(rows) < len(expected):
            del rows[len(rows) - len(rows) % chunk :]
        with self.path.open("rb+") as file:
            file.truncate(len(header) + sum(map(len, lines[: len(rows)])))
        return rows

    def append(self, rows: list[SampledRow]) -> None:
        """Add a chunk of rows."""
        lines = [] if self.path.exists() else [_dump(self.settings)]
        lines += [_dump(asdict(row)) for row in rows]
        with _explained(self.path, self.path):
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
        if not isinstance(theirs, dict) or theirs.get("fastd2o_sampling") != _FORMAT:
            return "it was not written by this version of fastd2o"
        names = [name for name in self.settings if theirs.get(name) != self.settings[name]]
        return ", ".join(
            f"other {name}"
            if name in _FINGERPRINTS
            else f"{name} {theirs.get(name)!r} instead of {self.settings[name]!r}"
            for name in names
        )


_FINGERPRINTS = ("dataset", "model")


def _settings(model: PreTrainedModel, prompts: list[Prompt], options: SamplingOptions) -> dict[str, Any]:
    """All that the samples depend on."""
    return {
        "fastd2o_sampling": _FORMAT,
        **asdict(options),
        "dtype": str(model.dtype).removeprefix("torch."),
        "dataset": _fingerprint_prompts(prompts),
        "model": _fingerprint_model(model),
    }


def _fingerprint_prompts(prompts: list[Prompt]) -> str:
    """Of the rows and of what the model reads, so of the instruction, the tokenizer and its chat template too."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(_dump([prompt.line, prompt.ids, prompt.row]))
    return digest.hexdigest()


def _fingerprint_model(model: PreTrainedModel) -> str:
    """Of a thousand elements of every parameter: quick for a large model, and no training leaves them all alone."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 1000)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _parse_record(line: bytes) -> SampledRow | None:
    """A row of a partial file, or None for the garbage that a crash of the machine can leave behind."""
    try:
        record = json.loads(line)
        return SampledRow(record["line"], record["data"], SamplingReport(**record["counts"]))
    except (ValueError, KeyError, TypeError):
        return None


def _complete_lines(path: Path) -> list[bytes]:
    """The lines that end in a newline; one that was being written when the run was killed does not."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def write_rows(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the JSONL file ``out`` so that at every moment there is either the old file (or none) or the whole new one.

    Raises:
        FastD2OError: it cannot be written.
    """
    temporary = out.with_name(out.name + ".tmp")
    try:
        with _explained(out, _partial_path(out)):
            out.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.writelines(map(_dump, rows))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, out)
    finally:
        with suppress(OSError):  # after the renaming it is gone
            temporary.unlink()


@contextmanager
def _explained(path: Path, partial: Path | None = None) -> Iterator[None]:
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
