"""A run of rounds that is killed, and goes on to the same bits on the CPU."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastd2o.training.rounds import RoundsConfig, run_rounds
from tests.cli.conftest import start
from tests.cli.tiny import TEXT_ROWS, save_tiny_model, write_jsonl
from tests.training.rounds_killed import SETTINGS, results


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed")
    rows = [{**row, "prompt": f"{row['prompt']} {copy}"} for copy in range(4) for row in TEXT_ROWS]
    return {
        **SETTINGS,
        "model": str(save_tiny_model(folder / "model")),
        "dataset": str(write_jsonl(folder / "prompts.jsonl", rows)),
        "num_samples": 2,
        "sampling": {"max_new_tokens": 12, "batch_size": 4},
        # No whole number of epochs.
        "train": {**SETTINGS["train"], "max_steps": 7, "save_steps": 2},
    }


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_rounds(RoundsConfig(**settings, output_dir=str(out)))
    return out


def kill_when(settings: dict[str, Any], out: Path, moment: Callable[[], bool]) -> None:
    """Start the command, and kill it with SIGKILL as soon as ``moment`` has come."""
    config = out.with_suffix(".json")  # which is YAML too
    config.write_text(json.dumps({**settings, "output_dir": str(out)}), encoding="utf-8")
    process = start("rounds", "--config", config)
    while not moment():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()


@pytest.mark.slow
def test_killed_in_sampling_and_in_training(settings, undisturbed, tmp_path):
    out = tmp_path / "out"
    partial = out / "round-1" / "samples.jsonl.partial"
    kill_when(settings, out, lambda: partial.exists() and partial.read_bytes().count(b"\n") > 1)
    kept = partial.read_bytes().splitlines(keepends=True)[1:]
    assert 0 < len(kept) < 24
    assert not (out / "round-1" / "samples.jsonl").exists()

    kill_when(settings, out, (out / "round-1" / "train" / "checkpoint-2").exists)
    samples = (out / "round-1" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    finished = {json.loads(line)["line"]: json.loads(line) for line in samples}
    for line in kept:  # neither lost nor drawn anew
        record = json.loads(line)
        assert finished[record["line"]]["ids"] == record["ids"]
    assert not (out / "round-1" / "training.json").exists()

    run_rounds(RoundsConfig(**settings, output_dir=str(out)))
    assert results(out) == results(undisturbed)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("partial_path", 0),  # samples.jsonl is there, and the partial file too
        ("PartialFile.append", 5),  # in the middle of scoring or sampling
        ("publish_folder", 2),  # before the last checkpoint
        ("write_report", 0),  # the samples are measured, the report is not written
        ("write_json", 0),  # the samples are counted, and nowhere yet but in the partial file
        ("publish_files", 0),  # training is over, the model is not saved
        ("write_json", 3),  # the model is saved, its log is not
    ],
)
def test_killed_between_two_files(settings, undisturbed, tmp_path, monkeypatch, where, call):
    """In process, right before something is written, in a run of one round."""
    from fastd2o.training import files, trainer
    from fastd2o.training.rounds import driver

    places: dict[str, list[tuple[Any, str]]] = {
        "PartialFile.append": [(files.PartialFile, "append")],
        "partial_path": [(driver, "partial_path")],
        "write_report": [(driver, "write_report")],
        "write_json": [(driver, "write_json")],
        "publish_folder": [(trainer, "publish_folder")],
        "publish_files": [(trainer, "publish_files")],
    }
    calls = 0

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise Killed
            return original(*arguments, **options)

        return count

    config = RoundsConfig(**{**settings, "rounds": 1}, output_dir=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        for owner, name in places[where]:
            patch.setattr(owner, name, deadly(getattr(owner, name)))
        with pytest.raises(Killed):
            run_rounds(config)
    run_rounds(config)
    found, expected = results(tmp_path / "out"), results(undisturbed)
    expected["round-1/optimizer.safetensors"] = found["round-1/optimizer.safetensors"]  # the longer run let it go
    assert found.pop("report.html") != expected.pop("report.html")  # of one round, not of two
    assert found == {name: content for name, content in expected.items() if name in found}
    assert {"round-1/model/model.safetensors", "round-2/measures.json"} <= found.keys()
