"""The report: one HTML file with every round's measures as pictures, and samples of the same prompts side by side."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastd2o.training.files import replace_file
from fastd2o.training.rounds.state import read_lines, round_folder
from fastd2o.training.sampling import as_text
from fastd2o.training.style import BLUE, FAINT, GREEN, GRID, ORANGE, STYLE

if TYPE_CHECKING:
    from fastd2o.training.rounds.driver import RoundRecord

_SHOWN_PROMPTS = 8
_SHOWN_CHARACTERS = 600


def write_report(output_dir: Path, records: Sequence[RoundRecord], rounds: int) -> None:
    """Write ``output_dir/report.html``, which needs no other file.

    Args:
        output_dir: of the run.
        records: of its rounds, as far as they are measured; at least one.
        rounds: how many there will be.
    """
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    html = page.render(
        picture=_svg(draw_rounds(records)),
        table=_table(records),
        columns=[f"round {number}" if number <= rounds else "last model" for number in range(1, len(records) + 1)],
        samples=_samples(output_dir, len(records)),
        rounds=rounds,
        trained=sum(record.training is not None for record in records),
    )
    replace_file(output_dir / "report.html", html.encode())


# --- numbers ----------------------------------------------------------------------------------------------------------


def _training(name: str) -> Callable[[RoundRecord], float | None]:
    return lambda record: None if record.training is None else record.training.get(name)


_ROWS: tuple[tuple[str, Callable[[RoundRecord], float | None], str], ...] = (
    ("mean reward", lambda record: record.measures.reward, ".3g"),
    ("best of a prompt, mean reward", lambda record: record.measures.reward_best, ".3g"),
    ("worst of a prompt, mean reward", lambda record: record.measures.reward_worst, ".3g"),
    ("KL to the first model, nats per sample", lambda record: record.measures.kl, ".3g"),
    ("log-probability of a sample, nats", lambda record: record.measures.logp, ".1f"),
    ("length, tokens", lambda record: record.measures.length, ".1f"),
    ("length, times the first round's", lambda record: record.measures.length_ratio, ".2f"),
    ("cut at the length limit", lambda record: record.measures.cut, ".1%"),
    ("repeat another of the prompt", lambda record: record.measures.duplicates, ".1%"),
    ("empty, drawn anew", lambda record: record.measures.empty, ".1%"),
    ("distinct-2 of a sample", lambda record: record.measures.distinct_2, ".3f"),
    ("distinct-2 over all samples", lambda record: record.measures.distinct_2_overall, ".3f"),
    ("training: loss at the end", _training("loss"), ".4g"),
    ("training: margin at the end", _training("rewards/margins"), ".3g"),
    ("training: log-probability of positives", _training("logps/chosen"), ".1f"),
    ("training: log-probability of negatives", _training("logps/rejected"), ".1f"),
)


def _table(records: Sequence[RoundRecord]) -> list[tuple[str, list[str]]]:
    """Label and cells of each row that has any number."""
    rows = [(label, [value(record) for record in records], style) for label, value, style in _ROWS]
    counts = dict.fromkeys(name for record in records for name in record.counts or {})
    return [
        *(
            (label, ["" if value is None else format(value, style) for value in values])
            for label, values, style in rows
            if any(value is not None for value in values)
        ),
        *((f"built: {name}", [str((record.counts or {}).get(name, "")) for record in records]) for name in counts),
    ]


def _samples(output_dir: Path, rounds: int) -> list[tuple[str, list[tuple[str, float] | None]]]:
    """Some prompts, evenly spread, each with the first completion and its score in every round."""
    scored = [
        {record["line"]: record for record in read_lines(round_folder(output_dir, number) / "scored.jsonl")}
        for number in range(1, rounds + 1)
    ]
    lines = list(scored[0])
    shown = []
    for line in lines[:: -(-len(lines) // _SHOWN_PROMPTS)]:
        answers: list[tuple[str, float] | None] = []
        for rows in scored:
            record = rows[line]
            found = bool(record["completions"])
            answers.append((_text(record["completions"][0]), record["scores"][0]) if found else None)
        shown.append((_text(scored[0][line]["row"]["prompt"]), answers))
    return shown


def _text(content: Any) -> str:
    text = as_text(content)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_rounds(records: Sequence[RoundRecord]) -> Figure:
    """Six panels over the rounds: reward, margin, log-probabilities, length, diversity, divergence."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 7))
        # Where the panels are is known beforehand; a layout engine would take most of a short round's time.
        places = {"left": 0.05, "right": 0.99, "bottom": 0.07, "top": 0.95, "wspace": 0.2, "hspace": 0.35}
        (reward, margin, logps), (length, diversity, divergence) = figure.subplots(2, 3, gridspec_kw=places)
        _panel(
            reward,
            "Reward",
            records,
            [
                ("best of a prompt", GREEN, lambda record: record.measures.reward_best),
                ("mean", BLUE, lambda record: record.measures.reward),
                ("worst of a prompt", ORANGE, lambda record: record.measures.reward_worst),
            ],
        )
        _panel(margin, "Margin at the end of training", records, [("margin", BLUE, _training("rewards/margins"))])
        _panel(
            logps,
            "Log-probability (nats)",
            records,
            [
                ("samples", BLUE, lambda record: record.measures.logp),
                ("positives after training", GREEN, _training("logps/chosen")),
                ("negatives after training", ORANGE, _training("logps/rejected")),
            ],
        )
        _panel(length, "Length (tokens)", records, [("mean", BLUE, lambda record: record.measures.length)], floor=0)
        _panel(
            diversity,
            "Diversity (distinct-2)",
            records,
            [
                ("within a sample", BLUE, lambda record: record.measures.distinct_2),
                ("over all samples", GREEN, lambda record: record.measures.distinct_2_overall),
            ],
            floor=0,
        )
        _panel(
            divergence,
            "KL to the first model (nats)",
            records,
            [("estimate", BLUE, lambda record: record.measures.kl)],
        )
    return figure


def _svg(figure: Figure) -> str:
    """The text of an SVG element."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, which has no place inside a page


def _panel(
    axes: Axes,
    title: str,
    records: Sequence[RoundRecord],
    lines: Sequence[tuple[str, str, Callable[[RoundRecord], float | None]]],
    floor: float | None = None,
) -> None:
    axes.set_title(title)
    drawn = 0
    for label, color, value in lines:
        points = [(number, found) for number, record in enumerate(records, 1) if (found := value(record)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", linewidth=2, label=label)
            drawn += 1
    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, horizontalalignment="center", color=FAINT)
    axes.set_xlim(0.8, len(records) + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.grid(axis="y", color=GRID)
    if floor is not None:
        axes.set_ylim(floor, 1.06 * axes.get_ylim()[1])
    if drawn > 1:
        axes.legend(fontsize=9)
