"""What iterating is worth on the demo's task: each method once on given data, and in rounds on its own samples.

    python -m benchmarks.rounds                      three seeds; about a quarter of an hour on one core
    python -m benchmarks.rounds --seeds 3 --out DIR  another seed, elsewhere

The world, the model, its start and the judgement are those of ``fastd2o demo``. Every training takes :data:`STEPS`
optimiser steps in all, at the demo's learning rate and β. What is iterated spends half of them on the given data and
the other half on its own samples: D2O in one run (``resample_every``), the others in :data:`ROUNDS` rounds of the
driver (:mod:`fastd2o.training.rounds`), with :func:`reward` as scorer.

A seed's figures are kept in ``benchmarks/results/rounds/seed-S.json``; a method that is there is not run again. Table
and picture are made of what is there: ``table.md`` and ``docs/images/rounds.png``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from fastd2o import PreferenceConfig, PreferenceTrainer
from fastd2o.cli.demo import Settings
from fastd2o.cli.demo_align import BETA, GROUPS_PER_STEP
from fastd2o.cli.demo_measure import Examiner
from fastd2o.cli.demo_model import build_model, build_tokenizer, teach
from fastd2o.cli.demo_world import INSTRUCTION, load_world
from fastd2o.cli.libraries import quiet_libraries
from fastd2o.training.rounds import RoundsConfig, run_rounds
from fastd2o.training.sampling import sample_anchors
from fastd2o.training.style import BLUE, GRID

from .results import FOLDER

STEPS, ROUNDS = 80, 2
SAMPLES = 4  # completions of each prompt in a round
THRESHOLD = 1.0  # CRINGE: helpful completions are good, all others bad
HELD_OUT = 0.2  # as in the demo
MAX_NEW_TOKENS = 48
SAMPLING_BATCH = 256
# In nats. At the default of 0 most pairs are apart from the first step, and Pairwise Cringe learns nothing.
MARGIN = 10.0
# At the default of 1, against about 0.15 nats of cross-entropy per token, unlearning takes the language with it.
CRINGE_ALPHA = 0.1
OPTIONS: dict[str, dict[str, Any]] = {
    "d2o": {"alpha": BETA, "beta": BETA},
    "dpo": {"beta": BETA},
    "pairwise_cringe": {"cringe_margin": MARGIN, "cringe_alpha": CRINGE_ALPHA},
    "cringe": {"cringe_alpha": CRINGE_ALPHA},
}
WORLD = load_world()
TASKS = {task.name: task for task in WORLD.tasks}

METHODS = {
    "d2o": ("D2O, anchors drawn once", "D2O, anchors drawn anew in the run"),
    "dpo": ("DPO", "Iterative DPO"),
    "pairwise_cringe": ("Pairwise Cringe", "PCO"),
    "cringe": ("CRINGE once", "CRINGE iterated"),
}
"""Objective -> what it is called once, and iterated."""


@dataclass(frozen=True)
class Figures:
    """How a model does on the held-out questions; see :mod:`fastd2o.cli.demo_measure`."""

    bad_rate: float
    helpful_rate: float
    good_perplexity: float
    distinct_2: float
    distinct_2_overall: float


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("bad_rate", "bad answers ↓", lambda value: f"{value:.1%}"),
    ("helpful_rate", "helpful answers ↑", lambda value: f"{value:.1%}"),
    ("good_perplexity", "perplexity of good answers ↓", lambda value: f"{value:.3f}"),
    ("distinct_2", "distinct-2 per answer ↑", lambda value: f"{value:.3f}"),
    ("distinct_2_overall", "distinct-2 overall ↑", lambda value: f"{value:.3f}"),
)


def reward(batch: list[dict[str, Any]]) -> list[float]:
    """The scorer of the rounds: 1 for a helpful answer, −1 for a bad one, 0 for neither, by the demo's rules."""
    return [
        float(WORLD.is_helpful(TASKS[item["task"]], text)) - float(WORLD.is_bad(text))
        for item in batch
        for text in (item["completion"][0]["content"],)
    ]


class Bench:
    """A seed: its start, its data, its judge.

    Args:
        seed: of everything.
        folder: where models and runs go.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        demo = Settings(folder, seed)
        lessons, held_out = WORLD.lessons(random.Random(f"{seed}/lessons"), demo.questions_per_task, HELD_OUT)
        conversations = list(WORLD.conversations(random.Random(f"{seed}/language"), demo.conversations, held_out))
        self.tokenizer = build_tokenizer(conversations)
        model = build_model(self.tokenizer, seed)
        teach(model, self.tokenizer, conversations, seed)
        self.start = folder / "start"
        model.save_pretrained(self.start)
        self.tokenizer.save_pretrained(self.start)
        self.examiner = Examiner(WORLD, held_out, self.tokenizer, samples=demo.samples, seed=seed)
        self.pairs = [lesson.row() for lesson in lessons]
        self.prompts = _write(
            folder / "prompts.jsonl", [{"prompt": lesson.prompt, "task": lesson.task.name} for lesson in lessons]
        )
        self.anchored = sample_anchors(
            model,
            self.tokenizer,
            [{name: row[name] for name in ("prompt", "rejected")} for row in self.pairs],
            num_anchors=demo.num_anchors,
            instruction=INSTRUCTION,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=SAMPLING_BATCH,
            seed=seed,
        )
        self.base = _write(folder / "pairs.jsonl", self.pairs)

    def judge(self, model: Path) -> Figures:
        """The figures of the model in a folder."""
        loaded = AutoModelForCausalLM.from_pretrained(model)
        scores, answers = self.examiner.score(loaded), self.examiner.interview(loaded)
        return Figures(
            answers.bad_rate,
            answers.helpful_rate,
            scores.good_perplexity,
            answers.distinct_2,
            answers.distinct_2_overall,
        )

    def once(self, objective: str, steps: int = STEPS) -> Path:
        """Train on the given data alone."""
        return self._train(objective, f"{objective}-{steps}", steps)

    def iterated(self, objective: str) -> Path:
        """Half of the steps on the given data, the other half on the model's own samples."""
        half = STEPS // 2
        if objective == "d2o":
            online = {
                "resample_every": half // ROUNDS,
                "online_after": half,
                "online_instruction": INSTRUCTION,
                "online_max_new_tokens": MAX_NEW_TOKENS,
                "online_batch_size": SAMPLING_BATCH,
            }
            return self._train(objective, "d2o-online", STEPS, **online)
        labels = objective == "cringe"
        run_rounds(
            RoundsConfig(
                model=str(self.once(objective, half)),
                dataset=str(self.prompts),
                output_dir=str(self.folder / f"{objective}-rounds"),
                rounds=ROUNDS,
                num_samples=SAMPLES,
                builder="labels" if labels else "pairs",
                threshold=THRESHOLD if labels else None,
                base_dataset=str(self.base) if labels else None,
                scorer={"function": "benchmarks.rounds:reward"},
                sampling={"max_new_tokens": MAX_NEW_TOKENS, "batch_size": SAMPLING_BATCH, "seed": self.seed},
                train=self._options(objective, half // ROUNDS),
            ),
            say=print,
        )
        return self.folder / f"{objective}-rounds" / f"round-{ROUNDS}" / "model"

    def _train(self, objective: str, name: str, steps: int, **more: Any) -> Path:
        out = self.folder / name
        if out.exists():
            return out
        trainer = PreferenceTrainer(
            AutoModelForCausalLM.from_pretrained(self.start),
            PreferenceConfig(str(out), **self._options(objective, steps), **more),
            self.anchored if objective == "d2o" else self.pairs,
            self.tokenizer,
        )
        trainer.train()
        trainer.save_model()
        return out

    def _options(self, objective: str, steps: int) -> dict[str, Any]:
        """As the demo trains."""
        return {
            "objective": [objective],
            "learning_rate": Settings.learning_rate,
            "max_steps": steps,
            "warmup_steps": steps // 10,
            "per_device_train_batch_size": GROUPS_PER_STEP,
            "seed": self.seed,
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            **OPTIONS[objective],
        }


def run_seed(seed: int, out: Path) -> None:
    """Run what is missing of a seed, and note each method as soon as it is judged."""
    path = out / f"seed-{seed}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = [name for name, _ in _titles()]
    if all(name in found for name in wanted):
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(seed, Path(folder))
        for name in wanted:
            if name not in found:
                print(f"seed {seed}: {name}", flush=True)
                objective, _, way = name.partition(" ")
                model = bench.start if not way else getattr(bench, way)(objective)
                found[name] = asdict(bench.judge(model))
                out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(out: Path) -> list[dict[str, dict[str, float]]]:
    """Every complete seed's figures by method."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("seed-*.json"))]
    return [figures for figures in found if all(name in figures for name, _ in _titles())]


def table(seeds: Sequence[dict[str, dict[str, float]]]) -> str:
    """Mean ± sample standard deviation over the seeds, as Markdown."""
    spread = f"mean ± spread of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    lines = [
        " | ".join([f"| {spread}", *(title for _, title, _ in _COLUMNS)]) + " |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]
    for name, title in _titles():
        cells = []
        for column, _, style in _COLUMNS:
            values = [seed[name][column] for seed in seeds]
            deviation = f" ± {style(statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(style(statistics.mean(values)) + deviation)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _titles() -> list[tuple[str, str]]:
    """Name in the files, and title, of every line of the table."""
    ways = [
        (f"{objective} {way}", title)
        for objective, titles in METHODS.items()
        for way, title in zip(("once", "iterated"), titles, strict=True)
    ]
    return [("start", "before"), *ways]


def draw(seeds: Sequence[dict[str, dict[str, float]]]) -> Figure:
    """A panel for each of four figures: every seed a dot, once beside iterated."""
    figure = Figure(figsize=(12.5, 7), layout="constrained")
    panels = (_COLUMNS[0], _COLUMNS[1], _COLUMNS[2], _COLUMNS[4])
    for axes, (column, title, _) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        share = column.endswith("rate")
        for place, objective in enumerate(METHODS):
            for way, offset, color in (("once", -0.17, "#999999"), ("iterated", 0.17, BLUE)):
                values = [seed[f"{objective} {way}"][column] * (100 if share else 1) for seed in seeds]
                label = way if place == 0 else None
                axes.bar(place + offset, statistics.mean(values), width=0.3, color=color, alpha=0.55, label=label)
                axes.plot([place + offset] * len(values), values, "o", color=color, markeredgecolor="white")
        if column == "good_perplexity":
            axes.set_ylim(bottom=1)
        axes.set_title(title + (" (%)" if share else ""), loc="left", fontweight="bold")
        axes.set_xticks(range(len(METHODS)), ["D2O", "DPO", "Pairwise Cringe", "CRINGE"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
    figure.axes[0].legend(frameon=False)
    return figure


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the seeds that are missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=FOLDER / "rounds")
    parser.add_argument("--picture", type=Path, default=FOLDER.parents[1] / "docs" / "images" / "rounds.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with quiet_libraries():
        for seed in args.seeds:
            run_seed(seed, args.out)
    seeds = read(args.out)
    (args.out / "table.md").write_text(table(seeds), encoding="utf-8")
    draw(seeds).savefig(args.picture, dpi=110, facecolor="white")
    print(table(seeds))


if __name__ == "__main__":
    main()
