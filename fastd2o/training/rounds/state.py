"""Where a run of rounds stands, and the files of its rounds.

::

    output_dir/
      state.json           the choices of the run, the round and the phase it is in, and why it stopped, if it did
      report.html          every round's measures as pictures, and samples side by side
      round-1/
        samples.jsonl      completions as drawn: one line for each prompt
        scored.jsonl       the same, with their scores
        measures.json      what they say of the model that drew them
        groups.jsonl       what the round trained on
        build.json         what became of prompts and completions
        model/             the model after the round
        training.json      its log; with it, the round is over
        optimizer.safetensors   with optimizer="keep": the optimiser after the last round
        train/             checkpoints, while the round trains
      round-2/ …
      round-N+1/           samples, scores and measures of the last model

Each of these files is written aside and renamed. A phase whose last file is there is finished: that, and not what
``state.json`` says, is what a run goes on from, so that a kill between the two repeats nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastd2o.errors import FastD2OError
from fastd2o.training.files import dump, explained, replace_file

_FORMAT = 1
_NAME, _LOCK = "state.json", ".lock"
_EARLY = (_LOCK, f"{_NAME}.tmp")  # what a kill in the first moments of a run leaves


class State:
    """``state.json`` in ``folder``.

    Args:
        folder: the output folder.
        fingerprint: the choices of the run by name, as JSON has them.

    Raises:
        FastD2OError: the folder holds another run, or files that no run of rounds wrote.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = folder / _NAME
        self.fingerprint = dict(fingerprint)
        if folder.exists() and not folder.is_dir():
            raise FastD2OError(f"output_dir {str(folder)!r} is a file. Fix: give a folder")
        if self.path.exists():
            self._check_same()
        elif folder.is_dir() and any(path.name not in _EARLY for path in folder.iterdir()):
            raise FastD2OError(
                f"output_dir {str(folder)!r} holds files that no run of rounds wrote. Fix: choose another output_dir"
            )

    def note(self, round_: int, phase: str, stopped: str | None = None) -> None:
        """Write that the run is in ``phase`` of ``round_``, and why it ``stopped`` there."""
        state = {
            "fastd2o_rounds": _FORMAT,
            "round": round_,
            "phase": phase,
            "stopped": stopped,
            "config": self.fingerprint,
        }
        replace_file(self.path, json.dumps(state, indent=2, ensure_ascii=False).encode() + b"\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out of the folder; the system lets them in again when this one ends, however it does.

        Raises:
            FastD2OError: another process is at work in it.
        """
        folder = self.path.parent
        lock = FileLock(folder / _LOCK, timeout=0)
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                raise FastD2OError(
                    f"another process is at work in output_dir {str(folder)!r}. Fix: wait for it or end it, or choose "
                    "another output_dir"
                ) from error
        try:
            if self.path.exists():  # by now, perhaps of a run that began after this one looked
                self._check_same()
            yield
        finally:
            lock.release()

    def _check_same(self) -> None:
        another = f"{str(self.path)!r} is of another run"
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            version, theirs = state["fastd2o_rounds"], dict(state["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise FastD2OError(
                f"{str(self.path)!r} cannot be read ({error}). Fix: choose another output_dir; the rounds' own files "
                "are as they were"
            ) from error
        if version != _FORMAT:
            raise FastD2OError(
                f"{another}: it was not written by this version of fastd2o. Fix: choose another output_dir"
            )
        names = [name for name in {**theirs, **self.fingerprint} if theirs.get(name) != self.fingerprint.get(name)]
        if names == ["train"] and not self._has_trained():
            return
        if names:
            changes = "; ".join(f"{name} was {theirs.get(name)}, now is {self.fingerprint.get(name)}" for name in names)
            raise FastD2OError(
                f"{another}: {changes}. Fix: give what that run was given to go on with it, or another output_dir. "
                "Only rounds and limits may change, and train for as long as nothing is trained"
            )

    def _has_trained(self) -> bool:
        """Whether anything would be lost or mixed if training were to begin with other choices."""
        left = ("round-*/training.json", "round-*/train/checkpoint-*/trainer_state.json")
        return any(any(self.path.parent.glob(pattern)) for pattern in left)


def round_folder(folder: Path, round_: int) -> Path:
    """Where the files of round ``round_`` are."""
    return folder / f"round-{round_}"


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON."""
    replace_file(path, dump(value))


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_lines(path: Path) -> list[Any]:
    """The objects of a file with one in each line."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
