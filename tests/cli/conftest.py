"""A saved model and datasets to run the commands on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastd2o.cli import main
from tests.cli.tiny import CHAT_ROWS, TEXT_ROWS, save_tiny_model, write_jsonl


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr, without what every error begins with."""
        lines = [line for line in self.err.splitlines() if not re.match(r"\s*$|(Sampling|Scoring|\s*\d+%)", line)]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("fastd2o: error: "), self.err
        return lines[0].removeprefix("fastd2o: error: ")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def text_rows(tmp_path) -> Path:
    return write_jsonl(tmp_path / "text.jsonl", TEXT_ROWS)


@pytest.fixture
def chat_rows(tmp_path) -> Path:
    return write_jsonl(tmp_path / "chat.jsonl", CHAT_ROWS)


@pytest.fixture
def fastd2o(capsys):
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def start(*arguments: object) -> subprocess.Popen[str]:
    """Run a command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastd2o", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
