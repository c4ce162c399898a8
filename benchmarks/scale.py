"""Tries a contestant in a process of its own: what it gets wrong, and what it allocates."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from .instruments import within_free_memory
from .results import TriedError, in_one_line

Found = TypeVar("Found")
_MOST_SECONDS = 1200.0


class Scale:
    """Calls functions one after the other where they can do no harm.

    On the CPU that is another process, which lives as long as the scale, or until the system kills it or it takes too
    long; then the next call starts a new one. On CUDA it is this process: its allocator keeps count.
    """

    def __init__(self, device: str, most_seconds: float = _MOST_SECONDS) -> None:
        self.device, self.most_seconds = device, most_seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def __call__(self, function: Callable[..., Found], *arguments: Any) -> Found:
        """What the function, which is at the top of a module, returns for these arguments.

        Raises:
            MemoryError: the process was killed, which systems do when memory runs out.
            ChildProcessError: it crashed.
            TimeoutError: it took too long.
            Exception: whatever the function raises.
        """
        if self.device == "cuda":
            return function(*arguments)
        connection = self._connection or self._start()
        connection.send((function, arguments))
        if not connection.poll(self.most_seconds):
            self.close()
            raise TimeoutError(f"stopped after {self.most_seconds:.0f} s")
        try:
            found, error = connection.recv()
        except EOFError:
            raise self._ended() from None
        if error is not None:
            raise error
        return found

    def _ended(self) -> Exception:
        """Why the process is gone."""
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode
        self.close()
        if code == -signal.SIGKILL:
            return MemoryError("the process that tried it was killed, which systems do when memory runs out")
        reason = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return ChildProcessError(f"the process that tried it ended with {reason}")

    def close(self) -> None:
        """End the other process, if there is one."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True)
        self._process.start()
        theirs.close()  # or nobody would notice that the process is gone
        return self._connection


def _serve(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    with within_free_memory(), contextlib.suppress(EOFError):
        while True:
            function, arguments = connection.recv()
            answer: tuple[Any, TriedError | None]
            try:
                answer = function(*arguments), None
            except Exception as error:  # its own type may not be known on the other side
                answer = None, TriedError(in_one_line(error))
            connection.send(answer)
