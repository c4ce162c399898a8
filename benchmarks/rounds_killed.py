"""Whether a run of rounds that is killed again and again ends with the weights of one that never was.

    python -m benchmarks.rounds_killed               ten kills; some minutes
    python -m benchmarks.rounds_killed --kills 3 --seed 1

A tiny model made here takes two rounds of Iterative DPO through ``fastd2o rounds``, first without interruption, then
with SIGKILL at random moments of its work until the kills are used up. Weights, optimiser, samples, scores, training
data and measures must be the same bytes. Exit code 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
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


def start(config: Path) -> subprocess.Popen[bytes]:
    """The command, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastd2o", "rounds", "--config", str(config)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


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
        process = start(config)
        began = None
        while process.poll() is None:
            if began is None and (whole / "state.json").exists():
                began = time.monotonic()
            time.sleep(0.005)
        assert began is not None, "the undisturbed run did not begin"
        work = time.monotonic() - began
        print(f"undisturbed: {work:.1f} s of work, {len(results(whole))} files compared", flush=True)

        config, out = configure(folder, "killed")
        done = 0
        while True:
            before = (out / "state.json").stat().st_mtime_ns if (out / "state.json").exists() else 0
            process = start(config)
            while done < args.kills and process.poll() is None:
                # Its work begins when it writes its state; what comes before is imports.
                if (out / "state.json").exists() and (out / "state.json").stat().st_mtime_ns != before:
                    time.sleep(rng.uniform(0, 1.2 * work / args.kills))
                    break
                time.sleep(0.002)
            if done < args.kills and process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                print(f"kill {done}: {stand(out)}", flush=True)
                continue
            process.wait()
            print(f"finished after {done} kills: {stand(out)}, exit code {process.returncode}", flush=True)
            break
        ours, theirs = results(out), results(whole)
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        print("the same bytes in every file" if not differing else f"these differ: {', '.join(differing)}")
        return int(bool(differing) or done < args.kills)


if __name__ == "__main__":
    sys.exit(main())
