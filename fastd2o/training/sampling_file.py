"""Anchors into a file: resumable after a kill at any moment, and ``OUT`` only ever appears as a whole.

While a run is under way its rows are in ``OUT.partial``: a first line with the settings, then one line per finished
row. Rows are appended a chunk at a time. A run that finds such a file keeps its complete chunks and goes on after them,
so that the batches, and with them the samples, are those of a run that was never stopped. At the end ``OUT`` is written
beside and renamed into place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastd2o.data.rows import Source
from fastd2o.errors import FastD2OError
from fastd2o.training.files import PartialFile, dump, explained, partial_path, write_rows
from fastd2o.training.generators import Generator, Prompt, TransformersGenerator
from fastd2o.training.sampling import (
    SampledRow,
    SamplingOptions,
    SamplingReport,
    check_result,
    generate_chunks,
    in_order,
    read_prompts,
    rows_per_chunk,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORMAT = 2


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
    partial = sampling_partial(Path(out), generator := TransformersGenerator(model, processing_class), prompts, options)
    done = draw_rows(generator, prompts, options, partial, overwrite=overwrite, progress=progress)
    for row in done:
        report.add(row.counts)
    if not report.anchors:
        partial.remove()
    check_result(report)
    write_rows(Path(out), in_order(done))
    partial.remove()
    return report


def sampling_partial(
    out: Path, generator: Generator, prompts: Sequence[Prompt], options: SamplingOptions
) -> PartialFile[SampledRow]:
    """The file in which the rows of an unfinished ``out`` are kept."""
    settings = {
        "fastd2o_sampling": _FORMAT,
        **asdict(options),
        **generator.settings(),
        "dataset": _fingerprint_prompts(prompts),
    }
    return PartialFile(out, settings, "fastd2o_sampling", SampledRow.parse)


def draw_rows(
    generator: Generator,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    partial: PartialFile[SampledRow],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> list[SampledRow]:
    """The rows for ``prompts``, in their order: those that ``partial`` has, and the others, which it is given.

    Raises:
        FastD2OError: ``partial`` is of other settings, or cannot be written.
    """
    size = rows_per_chunk(options.num_anchors, options.batch_size)
    done = partial.resume([prompt.line for prompt in prompts], size, overwrite=overwrite)
    for chunk in generate_chunks(generator, prompts, options, finished=len(done), progress=progress):
        partial.append(chunk)
        done += chunk
    return done


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


def _try_to_write(out: Path) -> None:
    """Open the partial file of ``out`` for writing, and leave everything as it was."""
    partial = partial_path(out)
    with explained(out):
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


def _fingerprint_prompts(prompts: Sequence[Prompt]) -> str:
    """Of the rows and of what the model reads, so of the instruction, the tokenizer and its chat template too."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(dump([prompt.line, prompt.ids, prompt.row]))
    return digest.hexdigest()
