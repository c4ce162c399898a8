"""A report as tables: for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from .cases import CASES
from .results import FLOOR, Contest, Report, Row, verdicts
from .steps import STEPS

# What a reader knows the contestants as.
TITLES = {
    FLOOR: "matrix products alone",
    "fastd2o": "**FastD2O**",
    "cut-cross-entropy": "Cut Cross-Entropy",
    "liger": "Liger, fused scaled cross-entropy",
    "trl chunked": "TRL, `ChunkedLogProbFunction`",
    "torch chunked": "torch, `F.linear_cross_entropy` in chunks",
    "quack": "QuACK",
    "flash-attn": "flash-attn's cross-entropy on logits",
    "eager": "eager: logits, then log-softmax in float32",
    "eager float32": "eager, all in float32",
}

COLUMNS = ("contestant", "seconds", "forward", "backward", "/ products", "±", "/ fastd2o", "MB", "error", "dX", "dW")
_OF_STEPS = ("contestant", "seconds", "forward", "backward", "±", "/ fastd2o", "MB", "longest", "error")


def title(contestant: str) -> str:
    """In Markdown."""
    if contestant.startswith("fastd2o "):
        return f"**FastD2O**, `{contestant.removeprefix('fastd2o ')}`"
    return TITLES.get(contestant, contestant)


def heading(contest: Contest) -> str:
    """What a contest was about."""
    shape = contest.shape
    if contest.case in STEPS:
        return (
            f"{STEPS[contest.case].title}: completions of {shape['completion']} tokens, D {shape['hidden']}, "
            f"{shape['layers']} layers, vocabulary {shape['vocab']}, {shape['dtype']}"
        )
    return (
        f"{CASES[contest.case].title}: {shape['tokens']} tokens, D {shape['hidden']}, vocabulary {shape['vocab']}, "
        f"{shape['dtype']}"
    )


def where(report: Report) -> str:
    """The machine and the versions."""
    return ", ".join(
        f"{value} threads" if name == "threads" else str(value) if name == "device" else f"{name} {value}"
        for name, value in report.machine.items()
        if name != "kind"
    )


def columns(contest: Contest) -> tuple[str, ...]:
    """The heads of a contest's table."""
    return _OF_STEPS if contest.case in STEPS else COLUMNS


def cells(contest: Contest, row: Row) -> list[str]:
    """One for each of :func:`columns` but the first. A star marks a time that was taken once."""

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    seconds = "" if row.seconds is None else f"{row.seconds:.3g}" + ("*" if row.rounds == 1 else "")
    seconds = row.outcome or seconds
    split = row.backward is not None and row.backward > 0
    found = {
        "seconds": seconds,
        "forward": figure(row.forward, ".3g") if split else "",
        "backward": figure(row.backward, ".3g") if split else "",
        "/ products": figure(row.over_products, ".2f"),
        "±": figure(row.spread, ".1%"),
        "/ fastd2o": figure(row.over_fastd2o, ".2f"),
        "MB": figure(row.extra_megabytes, ",.0f"),
        "longest": figure(row.longest, ",d"),
        "error": figure(row.errors.get("value", row.errors.get("gradient")), ".1e"),
        "dX": figure(row.errors.get("hidden_gradient"), ".1e"),
        "dW": figure(row.errors.get("weight_gradient"), ".1e"),
    }
    return [found[column] for column in columns(contest)[1:]]


def remarks(report: Report) -> Iterator[str]:
    """What failed and who was absent, a line each."""
    for contest in report.contests:
        for row in contest.rows:
            if row.error is not None:
                yield f"{row.contestant}, {heading(contest)}: {row.error}"
    for name, reason in report.absent.items():
        yield f"absent: {name} ({reason})"


def show(console: Console, report: Report) -> None:
    """All contests, a table each, and which of this project's targets are met."""
    console.print(where(report), highlight=False, markup=False)
    met: dict[str, list[bool]] = {}
    for contest in report.contests:
        table = Table(title=heading(contest), title_justify="left", caption=_floor(contest), caption_justify="left")
        table.add_column("contestant", no_wrap=True)
        for column in columns(contest)[1:]:
            table.add_column(column, justify="right")
        judged = any(verdicts(contest, row, report.kind) for row in contest.rows)
        if judged:
            table.add_column("target")
        for row in contest.rows:
            found = verdicts(contest, row, report.kind)
            for verdict in found:
                met.setdefault(verdict.quantity, []).append(verdict.met)
            mark = "  ".join(
                f"{verdict.text} [green]met[/]" if verdict.met else f"{verdict.text} [red]missed[/]"
                for verdict in found
            )
            table.add_row(row.contestant, *cells(contest, row), *([mark] if judged else []))
        console.print(table)
    for line in remarks(report):
        console.print(line, highlight=False, markup=False)
    for quantity, of_quantity in met.items():
        console.print(f"{quantity} targets: {sum(of_quantity)} of {len(of_quantity)} met", highlight=False)


def markdown(report: Report) -> str:
    """The same in Markdown, without the targets."""
    parts = [f"{where(report)}.\n"]
    for contest in report.contests:
        names = columns(contest)
        lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
        lines += [f"| {title(row.contestant)} | {' | '.join(cells(contest, row))} |" for row in contest.rows]
        of_floor = f"\n{_floor(contest)}.\n"
        parts.append(f"## {heading(contest)}\n\n" + "\n".join(lines) + f"\n{of_floor}")
    found = [f"- {line}" for line in remarks(report)]
    return "\n".join([*parts, *found]) + "\n"


def _floor(contest: Contest) -> str:
    parts = [f"{FLOOR}: {contest.floor}" if contest.floor else "", contest.date, contest.commit or ""]
    return "; ".join(filter(None, parts))
