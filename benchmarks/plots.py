"""Pictures of a report: how time and memory grow, what accuracy costs, how far everybody is from the bare products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np

from .cases import CASES
from .results import FLOOR, Contest, Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour for each contestant in all pictures; FastD2O's is the strongest.
_COLOURS = {
    FLOOR: "#000000",
    "fastd2o cuda": "#d62728",
    "fastd2o cpu": "#d62728",
    "fastd2o cuda, 1 GB": "#f28e8e",
    "fastd2o cpu, 1 GB": "#f28e8e",
    "fastd2o triton": "#ff7f0e",
    "fastd2o torch": "#e377c2",
    "cut-cross-entropy": "#1f77b4",
    "liger": "#2ca02c",
    "trl chunked": "#9467bd",
    "torch chunked": "#8c564b",
    "quack": "#17becf",
    "flash-attn": "#bcbd22",
    "eager": "#7f7f7f",
    "eager float32": "#c7c7c7",
}
_CASES = ("forward", "frozen", "trained")
_ERRORS = {"the values": ("value",), "the gradients": ("hidden_gradient", "weight_gradient")}
_GROWING = {"tokens": "tokens T", "vocab": "vocabulary V"}


def draw(report: Report, folder: Path) -> list[Path]:
    """Write every picture for which the report has figures, as PNG and SVG; their paths, without the ending."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "fastd2o"  # the same figures, the same file
    mpl.rcParams["axes.titlesize"] = 9
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "time-over-tokens": _growth(report, "tokens", "time"),
        "time-over-vocabulary": _growth(report, "vocab", "time"),
        "memory-over-tokens": _growth(report, "tokens", "memory"),
        "memory-over-vocabulary": _growth(report, "vocab", "memory"),
        "error-against-speed": _error_against_speed(report),
        "share-of-the-products": _shares(report),
    }
    paths = []
    for name, figure in pictures.items():
        if figure is None:
            continue
        path = folder / name
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        paths.append(path)
    return paths


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of value = c · size^p, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def series(report: Report, case: str, axis: Literal["tokens", "vocab"]) -> list[Contest]:
    """The longest row of contests of a case that differ in nothing but this number; bfloat16 and the larger other
    numbers where several are as long."""
    groups: dict[tuple[object, ...], list[Contest]] = {}
    for contest in report.of(case):
        fixed = tuple(value for name, value in contest.shape.items() if name != axis)
        groups.setdefault(fixed, []).append(contest)
    if not groups:
        return []

    def rank(group: Sequence[Contest]) -> tuple[int, bool, int]:
        shape = group[0].shape
        others = math.prod(value for name, value in shape.items() if isinstance(value, int) and name != axis)
        return len(group), shape["dtype"] == "bfloat16", others

    chosen = max(groups.values(), key=rank)
    return sorted(chosen, key=lambda contest: int(contest.shape[axis]))


def points(contests: Sequence[Contest], contestant: str, axis: str, quantity: str) -> tuple[list[int], list[float]]:
    """Sizes, and seconds or MB, of one contestant, where it has them."""
    sizes, values = [], []
    for contest in contests:
        row = contest.row(contestant)
        value = None if row is None or row.error is not None else row.seconds
        if row is not None and value is not None and quantity == "memory":
            value = row.extra_megabytes
        if value is not None and value > 0:
            sizes.append(int(contest.shape[axis]))
            values.append(value)
    return sizes, values


def _growth(report: Report, axis: Literal["tokens", "vocab"], quantity: Literal["time", "memory"]) -> Figure | None:
    """A panel for each case, a line for each contestant, both axes logarithmic."""
    of_case = {case: series(report, case, axis) for case in _CASES}
    of_case = {case: contests for case, contests in of_case.items() if len(contests) > 2}
    if not of_case:
        return None
    figure, panels = _panels(len(of_case))
    for panel, contests in zip(panels, of_case.values(), strict=True):
        for name in _contestants(contests):
            sizes, values = points(contests, name, axis, quantity)
            if len(sizes) > 1:
                told = quantity == "time" and len(sizes) > 2  # two points always lie on a power
                label = f"{name}: {exponent(sizes, values):.2f}" if told else name
                panel.plot(sizes, values, marker="o", markersize=3, label=label, **_style(name))
        panel.set(xscale="log", yscale="log", xlabel=_GROWING[axis], title=_of(contests[0], axis))
        panel.set_ylabel("seconds" if quantity == "time" else "MB beyond inputs and gradients")
        sizes = [int(contest.shape[axis]) for contest in contests]
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30, fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        _legend(panel, "exponent" if quantity == "time" else None)
    return figure


def _error_against_speed(report: Report) -> Figure | None:
    """Panels of the values and of the gradients of each case: to the left is faster, below is more accurate."""
    found = _at_one_shape(report, _CASES)
    wanted = [(contest, of) for of in _ERRORS for contest in found if any(_error(row, of) for row in contest.rows)]
    if not wanted:
        return None
    figure, panels = _panels(len(wanted))
    for panel, (contest, of) in zip(panels, wanted, strict=True):
        for row in contest.rows:
            error = _error(row, of)
            if row.over_products is not None and error > 0:
                panel.plot(
                    row.over_products, error, marker="o", linestyle="", label=row.contestant, **_style(row.contestant)
                )
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel="time over the matrix products alone", title=_of(contest))
        panel.set_ylabel(f"relative error of {of}")
        panel.grid(alpha=0.3, which="both")
        _legend(panel)
    return figure


def _error(row: Row, of: str) -> float:
    """The largest of those that belong together; 0 where there is none."""
    return max((row.errors.get(name, 0.0) for name in _ERRORS[of]), default=0.0)


def _shares(report: Report) -> Figure | None:
    """Bars: which share of its time a contestant would need for the bare products, case by case."""
    found = {
        _of(contest): {row.contestant: 1 / row.over_products for row in contest.rows if row.over_products}
        for contest in _at_one_shape(report, tuple(CASES))
    }
    found = {title: shares for title, shares in found.items() if shares.keys() - {FLOOR}}
    if not found:
        return None
    figure, panels = _panels(len(found))
    for panel, (title, share_of) in zip(panels, found.items(), strict=True):
        names = [name for name in share_of if name != FLOOR]
        shares = [share_of[name] for name in names]
        bars = panel.barh(names, shares, color=[_style(name)["color"] for name in names])
        panel.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=7, padding=2)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set(xlabel="matrix products alone / time", title=title, xlim=(0, max([1.15, *shares]) * 1.1))
        panel.invert_yaxis()
        panel.tick_params(axis="y", labelsize=7)
    return figure


def _at_one_shape(report: Report, cases: Sequence[str]) -> list[Contest]:
    """The contests at the shape at which most of the cases were held, with most contestants of several, bfloat16 and
    the largest of these; and of a case that was not held there, the one with most."""
    groups: dict[tuple[object, ...], list[Contest]] = {}
    for contest in (contest for case in cases for contest in report.of(case)):
        groups.setdefault(tuple(contest.shape.values()), []).append(contest)

    def rank(group: Sequence[Contest]) -> tuple[int, int, bool, float]:
        finished = sum(row.over_products is not None for contest in group for row in contest.rows)
        operations = sum(contest.flops for contest in group)
        return len(group), finished, group[0].shape["dtype"] == "bfloat16", operations

    chosen = max(groups.values(), key=rank, default=[])
    of_case = {contest.case: contest for contest in chosen}
    for case in cases:
        elsewhere = [[contest] for contest in report.of(case)]
        if case not in of_case and elsewhere:
            (of_case[case],) = max(elsewhere, key=rank)
    return [of_case[case] for case in cases if case in of_case]


def _contestants(contests: Sequence[Contest]) -> list[str]:
    return list(dict.fromkeys(row.contestant for contest in contests for row in contest.rows))


def _style(contestant: str) -> dict[str, Any]:
    ours = contestant in ("fastd2o cpu", "fastd2o cuda")
    style: dict[str, Any] = {"color": _COLOURS.get(contestant, "#333333"), "zorder": 3 if ours else 2}
    if contestant == FLOOR:
        style["linestyle"] = "--"
    return style | ({"linewidth": 2.2} if ours else {"linewidth": 1.2})


def _of(contest: Contest, growing: str | None = None) -> str:
    shape = contest.shape
    names = {"tokens": "T", "hidden": "D", "vocab": "V"}
    numbers = ", ".join(f"{letter} {shape[name]:,}" for name, letter in names.items() if name != growing)
    return f"{CASES[contest.case].title}\n{numbers}, {shape['dtype']}"


def _legend(panel: Axes, title: str | None = None) -> None:
    """Under the panel, where it hides nothing."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.28), "ncol": 2, "frameon": False}
    panel.legend(fontsize=6.5, title=title, title_fontsize=6.5, **place)


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot as plt

    columns = min(3, number)
    rows = math.ceil(number / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.3 * columns, 3.7 * rows), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for panel in panels[number:]:
        panel.set_axis_off()
    return figure, panels[:number]
