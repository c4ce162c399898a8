"""Output folders that hold whole runs only: checkpoints appear complete or not at all, and no run is lost to another.

Everything is written in a folder aside, brought to the disk, and then renamed into place. A run killed at any moment
leaves at most that folder, which the next run removes; a full disk shows while writing aside, and the last good
checkpoint is still there.

    output_dir/
      checkpoint-N/            a checkpoint, with everything needed to resume, and _fastd2o_run.json: what run it is of
      config.json …            the final model
      _fastd2o_run.json        which files the run wrote there
      _incomplete/             what is being written
      _reference_cache/        precomputed reference log-probabilities, kept from run to run
      _online_anchors/         the anchors that were drawn while the run trained

Names that begin with an underscore are left out by ``push_to_hub``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastd2o.errors import FastD2OError

REFERENCE_CACHE = "_reference_cache"
ONLINE_ANCHORS = "_online_anchors"
_INCOMPLETE = "_incomplete"
_REPLACED = "replaced"
_MANIFEST = "_fastd2o_run.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What saving a model with its tokenizer and its card may write.
_SAVED_FILES = (
    *("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*.json", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.*", "additional_chat_templates", "*processor_config.json", "README.md"),
)
_OPTIMIZER_FILES = ("optimizer*", "global_step*")  # the second is DeepSpeed's
# torch.save and safetensors tell of a full disk in their own ways.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in ``output_dir``, oldest first."""
    folder = Path(output_dir)
    found = {int(match[1]): path for path in _entries(folder) if (match := _CHECKPOINT.fullmatch(path.name))}
    # The state is the last that Trainer writes: a folder without it was left by something that does not rename.
    return [found[step] for step in sorted(found) if (found[step] / "trainer_state.json").is_file()]


def check_output_dir(output_dir: str | Path, *, overwrite: bool = False, resume: bool | str | None = None) -> None:
    """Refuse an output folder that holds another run. Cheap: to be called before anything is loaded.

    Args:
        output_dir: where the run is to go.
        overwrite: whether it may replace a run.
        resume: as for ``Trainer.train``; a run that goes on in its own folder finds what it left there.

    Raises:
        FastD2OError: the folder holds another run, or files that no run wrote and that saving the model would replace.
        ValueError: ``overwrite``, and ``resume`` from this very folder.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise FastD2OError(f"output_dir {str(folder)!r} is a file. Fix: give a folder")
    ours = _ours(folder)
    foreign = {path.name for pattern in _SAVED_FILES for path in folder.glob(pattern) if path not in ours}
    if foreign:
        raise FastD2OError(
            f"output_dir {str(folder)!r} holds files that no run wrote there and that saving the model could replace "
            f"({', '.join(sorted(foreign))}). Fix: choose another output_dir"
        )
    if _goes_on_in(folder, resume):
        if overwrite:
            raise ValueError("overwrite and resume_from_checkpoint contradict each other. Fix: leave one of them out")
        return
    if ours and not overwrite:
        names = ", ".join(sorted(path.name for path in ours)[:4])
        raise FastD2OError(
            f"output_dir {str(folder)!r} holds another run ({names}). Fix: choose another output_dir, "
            "resume_from_checkpoint=True to go on with that run, or overwrite=True to replace it"
        )


def claim_output_dir(output_dir: str | Path, *, overwrite: bool = False, resume: bool | str | None = None) -> None:
    """Make ``output_dir`` ready: remove what a killed run left half-written and, with ``overwrite``, the run there.

    Anchors that a run drew stay if it goes on here.

    Nothing is removed that no run wrote. Arguments and errors as :func:`check_output_dir`.
    """
    check_output_dir(output_dir, overwrite=overwrite, resume=resume)
    folder = Path(output_dir)
    for path in _entries(folder / _INCOMPLETE / _REPLACED):
        if not (folder / path.name).exists():  # killed between the two renames of publish_folder
            os.replace(path, folder / path.name)
    shutil.rmtree(folder / _INCOMPLETE, ignore_errors=True)
    if not _goes_on_in(folder, resume):
        shutil.rmtree(folder / ONLINE_ANCHORS, ignore_errors=True)
    if overwrite:
        for path in [*_ours(folder), folder / _MANIFEST]:
            _remove(path)


def _goes_on_in(folder: Path, resume: bool | str | None) -> bool:
    """Whether the run resumes from a checkpoint in ``folder`` itself."""
    return resume is True or (bool(resume) and Path(str(resume)).resolve().parent == folder.resolve())


def resolve_checkpoint(output_dir: str | Path, resume: bool | str) -> Path:
    """The checkpoint to resume from: the last complete one for True, or the folder given.

    Raises:
        FastD2OError: there is none, or it cannot be resumed from.
    """
    if resume is True:
        found = checkpoints(output_dir)
        if not found:
            raise FastD2OError(
                f"there is no checkpoint to resume from in output_dir {str(output_dir)!r}. Fix: leave "
                "resume_from_checkpoint out to start anew, or check output_dir"
            )
        path = found[-1]
    else:
        path = Path(str(resume))
        if not (path / "trainer_state.json").is_file():
            raise FastD2OError(
                f"resume_from_checkpoint: {str(path)!r} is not a checkpoint of a training run (it has no "
                "trainer_state.json). Fix: give a folder checkpoint-N of output_dir, or True for the last one"
            )
    if not any(any(path.glob(pattern)) for pattern in _OPTIMIZER_FILES):
        raise FastD2OError(
            f"{str(path)!r} holds weights only (save_only_model), so the run cannot be resumed as it was. Fix: start a "
            "new run with these weights as its model"
        )
    return path


def note_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Note in ``checkpoint`` what run it is of: whatever must be the same for :func:`check_same_run`."""
    (checkpoint / _MANIFEST).write_text(json.dumps({"run": run}, indent=2), encoding="utf-8")


def check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Refuse to go on from a ``checkpoint`` of a run that was not ``run``; one without a note is taken as it is.

    Raises:
        FastD2OError: it was another run; the message names what differs.
    """
    path = checkpoint / _MANIFEST
    if not path.is_file():  # a checkpoint of another trainer
        return
    noted = json.loads(path.read_text(encoding="utf-8"))["run"]
    names = [name for name in {**noted, **run} if noted.get(name) != run.get(name)]
    if names:
        changes = "; ".join(f"{name} was {noted.get(name)}, now is {run.get(name)}" for name in names)
        raise FastD2OError(
            f"resume_from_checkpoint: {str(checkpoint)!r} is of another run: {changes}. Fix: give what that run was "
            "given, or start a new one, with this checkpoint as its model and another output_dir"
        )


@contextmanager
def no_empty_folder_left(output_dir: str | Path, *, made: bool) -> Iterator[None]:
    """Should the block fail before anything was written, remove ``output_dir``, if this process ``made`` it."""
    try:
        yield
    except BaseException:
        if made and Path(output_dir).is_dir() and not _entries(Path(output_dir)):
            Path(output_dir).rmdir()
        raise


@contextmanager
def written_aside(target: Path, *, run_dir: Path, main: bool) -> Iterator[Path]:
    """Give a folder in which to write what is to become ``target``; on failure remove it and say what is left.

    Args:
        target: what is being saved, for the message.
        run_dir: the output folder; the folder given lies in it, on the same file system, under the same name on every
            process.
        main: whether this process may remove things.

    Raises:
        FastD2OError: the disk is full, or writing failed in another way.
    """
    aside = run_dir / _INCOMPLETE
    if main:
        shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
    except BaseException as error:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, _WRITE_ERRORS) and not isinstance(error, FastD2OError):
            raise FastD2OError(_explain(target, run_dir, error)) from error
        raise


def publish_folder(written: Path, target: Path) -> None:
    """Bring ``written`` to the disk and rename it to ``target``, which it replaces."""
    _flush(written)
    if target.exists():
        replaced = written.parent / _REPLACED / target.name
        replaced.parent.mkdir()
        os.replace(target, replaced)
    os.replace(written, target)
    _flush_path(target.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def publish_files(written: Path, target: Path) -> None:
    """Bring the files in ``written`` to the disk and rename each into the folder ``target``, noted as the run's."""
    names = sorted(path.name for path in written.iterdir())
    noted = json.dumps({"files": sorted({*_noted(target), *names})}, indent=2)
    (written / _MANIFEST).write_text(noted, encoding="utf-8")
    _flush(written)
    for name in (_MANIFEST, *names):
        if (written / name).is_dir() and (target / name).exists():
            shutil.rmtree(target / name)
        os.replace(written / name, target / name)
    _flush_path(target)
    shutil.rmtree(written.parent, ignore_errors=True)


def _noted(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastD2OError(
            f"{str(folder / _MANIFEST)!r} cannot be read ({error}). Fix: remove it, and the files of the run it "
            "belonged to"
        ) from error


def _ours(folder: Path) -> list[Path]:
    """What a run left in ``folder``: its checkpoints, and the files it noted."""
    steps = [path for path in _entries(folder) if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    return steps + [folder / name for name in sorted(_noted(folder)) if (folder / name).exists()]


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Wait until everything below ``folder`` is on the disk; file systems may report a full one no sooner."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush_path(Path(parent) / name)
        _flush_path(Path(parent))


def _flush_path(path: Path) -> None:
    if os.name == "nt":
        return  # Windows flushes neither folders nor files opened for reading.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(target: Path, run_dir: Path, error: Exception) -> str:
    last = checkpoints(run_dir)
    kept = f"the last checkpoint, {str(last[-1])!r}, is whole" if last else "there is no earlier checkpoint"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    free = shutil.disk_usage(run_dir).free / 2**20 if run_dir.exists() else 0.0
    fix = "free space there" if not last else "free space there, then resume_from_checkpoint=True"
    return (
        f"saving {str(target)!r} failed: {reason} ({free:.0f} MB free on that disk). Nothing was left half-written; "
        f"{kept}. Fix: {fix}"
    )
