"""``fastd2o rounds``: sample from the model, score, train, and again from the trained model."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from fastd2o.cli.arguments import JSON, usage_errors
from fastd2o.cli.libraries import quiet_libraries
from fastd2o.loading import check_model

if TYPE_CHECKING:
    from fastd2o.training.rounds import RoundRecord, RoundsConfig

HELP = "train in rounds on the model's own scored answers (Iterative DPO, PCO, CRINGE, D2O)"

_USAGE = "fastd2o rounds --config FILE [options]"
_EPILOG = """\
examples:
  fastd2o rounds --config rounds.yaml
  fastd2o rounds --config rounds.yaml --rounds 4    # two more than before
The file gives the options below; docs/rounds.md has a complete one for each method. scorer, train, sampling and limits
are mappings there, JSON on the command line. A run that was stopped goes on when the same command is given again.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastd2o rounds``."""
    parser.usage = _USAGE
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--model", required=True, help="folder of the model to begin with, or its name on the Hub")
    add("--dataset", required=True, help="the prompts; for the builder anchors: rows with a negative")
    add("--output_dir", required=True, help="where everything of the run is kept")
    add("--rounds", required=True, type=int, help="how many times to sample and train")
    add("--num_samples", required=True, type=int, help="N, completions drawn for each prompt")
    add("--builder", required=True, help="pairs (highest against lowest), anchors (D2O) or labels (CRINGE)")
    add("--scorer", required=True, type=json.loads, metavar=JSON, help="patterns, function or classifier")
    add("--train", required=True, type=json.loads, metavar=JSON, help="a round's training: options of fastd2o train")
    add("--sampling", default={}, type=json.loads, metavar=JSON, help="options of fastd2o sample")
    add("--threshold", type=float, help="labels: a score of at least this is good")
    add("--base_dataset", help="rows that every round trains on as well")
    add("--reference", default="original", help="of each round's loss: original, or previous, the last round's model")
    add("--optimizer", default="reset", help="reset, or keep, its state from round to round")
    add("--generator", default="transformers", help="transformers or vllm")
    add("--limits", default={}, type=json.loads, metavar=JSON, help="where a collapse stops the run")
    add("--attn_implementation", help="such as sdpa or flash_attention_2 (default: what Transformers picks)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model, never with a scorer")
    add("--config", metavar="FILE", help="YAML file with any of these options; the command line wins")


def run(args: argparse.Namespace) -> int:
    """Run the rounds, or go on with them, and print what came out."""
    for flag in ("dataset", "base_dataset"):
        path = getattr(args, flag)
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"--{flag}: there is no file {path!r}. Fix: check the path of the dataset")
    check_model(args.model)
    with quiet_libraries():
        config = _config(args)
        records = _run(config)
        _print_summary(records)
    last = Path(config.output_dir) / f"round-{config.rounds}" / "model"
    print(f"The model is in {last}")
    print(f"The report: {Path(config.output_dir) / 'report.html'}")
    return 0


def _config(args: argparse.Namespace) -> RoundsConfig:
    from fastd2o.training.rounds import RoundsConfig

    names = [option.name for option in fields(RoundsConfig)]
    with usage_errors():
        return RoundsConfig(**{name: getattr(args, name) for name in names})


def _run(config: RoundsConfig) -> list[RoundRecord]:
    from fastd2o.cli.progress import LogLines, ProgressBar
    from fastd2o.training.rounds import run_rounds

    bars = () if config.training(1).disable_tqdm else (ProgressBar,)
    try:
        return run_rounds(config, callbacks=(*bars, LogLines), say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None


def _print_summary(records: list[RoundRecord]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="The samples that each round began with; last: of the model in the end", title_justify="left")
    for name in ("round", "reward", "best", "worst", "KL", "length", "distinct-2", "trained on"):
        table.add_column(name, justify="right")
    for number, record in enumerate(records, 1):
        found = record.measures
        numbers = (found.reward, found.reward_best, found.reward_worst, found.kl, found.length, found.distinct_2)
        counts = record.counts or {}
        made = next((f"{counts[name]} {name}" for name in ("pairs", "groups") if name in counts), "")
        if "kept of each" in counts:
            made = f"2 x {counts['kept of each']} completions"
        label = str(number) if record.training is not None else "last"
        table.add_row(label, *(f"{value:.3g}" for value in numbers), made)
    Console().print(table)
