"""Whether a run of rounds that is killed again and again ends with the weights of one that never was.

    python -m tests.training.rounds_killed               ten kills; some minutes
    python -m tests.training.rounds_killed --kills 3 --seed 1

A tiny model made here takes two rounds of Iterative DPO through ``fastd2o rounds``, first without interruption, then
with SIGKILL at random moments of its work until the kills are used up. Weights, optimiser, samples, scores, training
data and measures must be the same bytes. Exit code 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cli.tiny import TEXT_ROWS, save_tiny_model, write_jsonl

ENDINGS = (".jsonl", "model.safetensors", "optimizer.safetensors", "measures.json", "build.json", "report.html")
SETTINGS: dict[str, Any] = {
    "rounds": 2,
    "num_samples": 4,
    "builder": "pairs",
    "scorer": {"patterns": ["a", "e", "o"]},
    "optimizer": "keep",
    "sampling": {"max_new_tokens": 24, "batch_size": 4},
    "train": {
        "objective": ["dpo", "pairwise_cringe"],
        "use_cpu": True,
        "max_steps": 25,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 3,
        "save_steps": 4,
        "save_total_limit": 2,
        "disable_tqdm": True,
    },
}


def results(out: Path) -> dict[str, bytes]:
    """Every file of a run whose content must not depend on when, where or how often it was run."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.name.endswith(ENDINGS)}


def start(config: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """The command in a process of its own, and the file with what it prints: a line for each phase that it begins."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "fastd2o", "rounds", "--config", str(config)]
    log = config.with_suffix(".log")
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.DEVNULL), log


def until_work(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait while the process imports what it needs, until it begins its first phase."""
    while process.poll() is None and b"round " not in log.read_bytes():
        time.sleep(0.002)


def configure(folder: Path, name: str) -> tuple[Path, Path]:
    """A configuration file, and the output folder that it names."""
    config, out = folder / f"{name}.json", folder / name  # JSON is YAML too
    files = {"model": str(folder / "model"), "dataset": str(folder / "prompts.jsonl"), "output_dir": str(out)}
    config.write_text(json.dumps({**SETTINGS, **files}), encoding="utf-8")
    return config, out


def stand(out: Path) -> str:
    """Round and phase, from ``state.json``."""
    try:
        state = json.loads((out / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "before the first phase"
    return f"round {state['round']}, {state['phase']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model")
        rows = [{**row, "prompt": f"{row['prompt']} {copy}"} for copy in range(8) for row in TEXT_ROWS]
        write_jsonl(folder / "prompts.jsonl", rows)
        config, whole = configure(folder, "undisturbed")
        process, log = start(config)
        until_work(process, log)
        began = time.monotonic()
        if process.wait():
            raise RuntimeError(f"the undisturbed run ended with exit code {process.returncode}")
        work = time.monotonic() - began
        print(f"undisturbed: {work:.1f} s of work, {len(results(whole))} files compared", flush=True)

        config, out = configure(folder, "killed")
        for kill in range(args.kills):
            process, log = start(config)
            until_work(process, log)
            time.sleep(rng.uniform(0, 1.5 * work / args.kills))
            if process.poll() is not None:
                print(f"it was over before kill {kill + 1}, with exit code {process.returncode}")
                return 1
            process.kill()
            process.wait()
            print(f"kill {kill + 1}: {stand(out)}", flush=True)
        process, _ = start(config)
        print(f"finished: exit code {process.wait()}, {stand(out)}", flush=True)
        ours, theirs = results(out), results(whole)
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        print("the same bytes in every file" if not differing else f"these differ: {', '.join(differing)}")
        return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
