"""What the demo shows: a table on the terminal, the same figures in ``metrics.jsonl``, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.table import Table

from fastd2o.cli.demo_measure import Answers, HeadMemory, Scores
from fastd2o.training.style import BLUE, GREEN, GRID, ORANGE, STYLE

_TITLES = {"start": "before", "d2o": "D2O", "dpo": "DPO", "npo": "NPO", "gradient_ascent": "gradient ascent"}
_RATES = ("bad_rate", "helpful_rate", "distinct_2", "distinct_2_overall")
_SHOWN_ANSWERS = 5


@dataclass(frozen=True)
class Outcome:
    """A model and how it did.

    Attributes:
        name: the objective, or ``start`` for the model before any.
        scores, answers: on the held-out lessons.
        curve: (training step, scores), from step 0 to the end; empty for ``start``.
    """

    name: str
    scores: Scores
    answers: Answers
    curve: Sequence[tuple[int, Scores]] = ()

    @property
    def title(self) -> str:
        """What the model is called in table and picture."""
        return _TITLES[self.name]

    @property
    def other_rate(self) -> float:
        """Share of the answers that are neither bad nor helpful."""
        return 1 - self.answers.bad_rate - self.answers.helpful_rate


_ROWS: tuple[tuple[str, Callable[[Outcome], str]], ...] = (
    ("bad answers ↓", lambda outcome: f"{outcome.answers.bad_rate:.1%}"),
    ("helpful answers ↑", lambda outcome: f"{outcome.answers.helpful_rate:.1%}"),
    ("distinct-2 per answer ↑", lambda outcome: f"{outcome.answers.distinct_2:.3f}"),
    ("distinct-2 overall ↑", lambda outcome: f"{outcome.answers.distinct_2_overall:.3f}"),
    ("log p, bad answers ↓", lambda outcome: f"{outcome.scores.bad_logprob:.1f}"),
    ("perplexity, good ones ↓", lambda outcome: f"{outcome.scores.good_perplexity:,.4g}"),
)
_LEGEND = (
    "Bad: contains a rude word of examples/bad_answers.txt. Helpful: gives a right step, and is not bad. These and "
    "distinct-2 are of {answers} fresh answers, asked for without any instruction; log p (in nats) and perplexity are "
    "of written answers. None of these questions, and none of the written rude wordings, was part of the alignment."
)


def print_report(outcomes: Sequence[Outcome], memories: Sequence[HeadMemory]) -> None:
    """Print the outcomes side by side, the memory of the head, and some answers of the first two models."""
    console = Console()
    console.print("", _outcome_table(outcomes), sep="\n")
    console.print(_LEGEND.format(answers=len(outcomes[0].answers.texts)), style="dim")
    console.print("", _memory_table(memories), "", _answer_table(outcomes[0], outcomes[1]), sep="\n")


def _outcome_table(outcomes: Sequence[Outcome]) -> Table:
    questions = len({lesson.question for lesson in outcomes[0].answers.lessons})
    table = Table(title=f"Judged on {questions} held-out questions", title_justify="left")
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        table.add_column(outcome.title, justify="right", style="bold" if outcome.name == "d2o" else None)
    for label, value in _ROWS:
        table.add_row(label, *map(value, outcomes))
    return table


def _memory_table(memories: Sequence[HeadMemory]) -> Table:
    table = Table(title="Peak memory of the head, forward and backward", title_justify="left")
    for column in ("answer tokens", "vocabulary", "full logits", "fused", "less by"):
        table.add_column(column, justify="right")
    for memory in memories:
        table.add_row(
            f"{memory.tokens:,}",
            f"{memory.vocabulary:,}",
            f"{memory.full / 1e6:,.1f} MB",
            f"{memory.fused / 1e6:,.1f} MB",
            f"{memory.full / memory.fused:.1f} x",
        )
    return table


def _answer_table(before: Outcome, after: Outcome) -> Table:
    table = Table(title="Some answers", title_justify="left", show_lines=True)
    for column in ("question", before.title, f"after {after.title}"):
        table.add_column(column, ratio=1)
    stride = max(1, len(before.answers.texts) // _SHOWN_ANSWERS)
    for index in range(0, len(before.answers.texts), stride)[:_SHOWN_ANSWERS]:
        question = before.answers.lessons[index].question
        table.add_row(question, before.answers.texts[index], after.answers.texts[index])
    return table


def write_metrics(
    path: Path, outcomes: Sequence[Outcome], memories: Sequence[HeadMemory], settings: dict[str, Any]
) -> None:
    """Write one JSON object a line, of the ``kind`` settings, model, curve, head_memory or answer."""
    lines: list[dict[str, Any]] = [{"kind": "settings", **settings}]
    for outcome in outcomes:
        rates = {name: getattr(outcome.answers, name) for name in _RATES}
        lines.append({"kind": "model", "model": outcome.name, **asdict(outcome.scores), **rates})
    lines += [
        {"kind": "curve", "model": outcome.name, "step": step, **asdict(scores)}
        for outcome in outcomes
        for step, scores in outcome.curve
    ]
    lines += [{"kind": "head_memory", **asdict(memory)} for memory in memories]
    lines += [
        {"kind": "answer", "model": outcome.name, "question": lesson.question, "answer": text}
        for outcome in outcomes
        for lesson, text in zip(outcome.answers.lessons, outcome.answers.texts, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# --- the picture, with more colours (Tol) -----------------------------------------------------------------------------

_LINES = {"d2o": BLUE, "dpo": GREEN, "npo": "#E69F00", "gradient_ascent": ORANGE}
_BAD, _HELPFUL, _OTHER = "#882255", "#44AA99", "#DDDDDD"
_FULL, _FUSED = "#BBBBBB", BLUE


def draw_report(path: Path, outcomes: Sequence[Outcome], memories: Sequence[HeadMemory]) -> None:
    """Draw four panels: what the answers are like, the memory of the head, and both scores along the training."""
    with matplotlib.rc_context({**STYLE, "axes.titlesize": 13, "axes.titlepad": 12}):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.06, hspace=0.06)
        figure = Figure(figsize=(12.5, 8.8), layout=layout)
        FigureCanvasAgg(figure)
        figure.suptitle("A small model unlearns rude answers", fontsize=18, fontweight="bold")
        (answers, memory), (bad, good) = figure.subplots(2, 2)
        _draw_answers(answers, outcomes)
        _draw_memory(memory, memories)
        bad.set_title("Held-out rude answers become unlikely")
        bad.set_ylabel("log-probability of an answer (nats)")
        _draw_curves(bad, outcomes[1:], lambda scores: scores.bad_logprob, origin=0)
        good.set_title("Held-out good answers should stay likely")
        good.set_ylabel("perplexity per token")
        _draw_curves(good, outcomes[1:], lambda scores: scores.good_perplexity, origin=1)
        figure.savefig(path, dpi=130, facecolor="white")


def _draw_answers(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    axes.set_title("Its own answers to held-out questions", pad=30)
    rows = range(len(outcomes))[::-1]
    left = [0.0] * len(outcomes)
    parts: tuple[tuple[str, str, Callable[[Outcome], float]], ...] = (
        ("helpful", _HELPFUL, lambda outcome: outcome.answers.helpful_rate),
        ("neither", _OTHER, lambda outcome: outcome.other_rate),
        ("rude", _BAD, lambda outcome: outcome.answers.bad_rate),
    )
    for label, color, share in parts:
        widths = [100 * share(outcome) for outcome in outcomes]
        bars = axes.barh(rows, widths, left=left, color=color, label=label, height=0.62)
        if label != "rude":
            axes.bar_label(bars, [f"{width:.0f}%" if width >= 6 else "" for width in widths], label_type="center")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, outcome in zip(rows, outcomes, strict=True):
        rude = f"{outcome.answers.bad_rate:.1%} rude"
        axes.text(101.5, row, rude, color=_BAD, verticalalignment="center", fontweight="bold")
    axes.set_yticks(rows, [outcome.title for outcome in outcomes])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the answers (%)")
    _legend_above(axes)


def _draw_memory(axes: Axes, memories: Sequence[HeadMemory]) -> None:
    axes.set_title("Peak memory of the head", pad=30)
    for offset, color, label, sizes in (
        (-0.2, _FULL, "full logits", [memory.full / 1e6 for memory in memories]),
        (0.2, _FUSED, "fused", [memory.fused / 1e6 for memory in memories]),
    ):
        places = [position + offset for position in range(len(memories))]
        bars = axes.barh(places, sizes, height=0.36, color=color, label=label)
        axes.bar_label(bars, [f" {size:,.0f} MB" for size in sizes])
    axes.set_yticks(range(len(memories)), [f"vocabulary\n{memory.vocabulary:,}" for memory in memories])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel(f"MB for {memories[0].tokens:,} answer tokens, forward and backward")
    _legend_above(axes)


def _legend_above(axes: Axes) -> None:
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0.2, handlelength=1.2)


def _draw_curves(axes: Axes, outcomes: Sequence[Outcome], value: Callable[[Scores], float], origin: float) -> None:
    """Draw one curve for each outcome, on an axis from ``origin``, the value of a sure answer, to the farthest curve.

    Gradient ascent does not count for that: it goes so far that the others would be one line. Where it ends is written.
    """
    curves = {outcome.name: [value(scores) for _, scores in outcome.curve] for outcome in outcomes}
    calm = [number for outcome in outcomes if outcome.name != "gradient_ascent" for number in curves[outcome.name]]
    end = origin + 1.35 * max((number - origin for number in calm), key=abs)
    below = end < origin
    for outcome in outcomes:
        numbers = curves[outcome.name]
        color, width = _LINES[outcome.name], 3.2 if outcome.name == "d2o" else 2
        axes.plot([step for step, _ in outcome.curve], numbers, color=color, linewidth=width, label=outcome.title)
        last = numbers[-1]
        if abs(last - origin) > abs(end - origin):
            axes.text(
                0.99,
                0.02 if below else 0.98,
                f"{outcome.title}\nends at " + (f"{last:,.0f}" if abs(last) < 1e6 else f"{last:.0e}"),
                color=color,
                transform=axes.transAxes,
                horizontalalignment="right",
                verticalalignment="bottom" if below else "top",
            )
    axes.set_ylim(min(origin, end), max(origin, end))
    axes.set_xlabel("training step")
    axes.grid(axis="y", color=GRID)
    axes.margins(x=0.02)
    if len(outcomes) > 1:
        axes.legend(ncols=2, loc="upper right" if below else "lower right")
