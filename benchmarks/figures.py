"""Writes the figures of the README and of docs/ from what is recorded: ``python -m benchmarks.figures``.

What lies between ``<!-- figures:NAME -->`` and ``<!-- end of figures -->`` is written anew, and the pictures in
docs/images/ are drawn anew, so that neither can say something else than what was recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from fastd2o.ops.plan import DEFAULT_BUDGET

from .cases import CASES, OF_TOKENS
from .plots import draw, exponent, points, series
from .preference import aims as aims_of
from .results import FLOOR, FOLDER, Report, Row, verdicts
from .steps import OURS, STEPS
from .tables import heading, title, where

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "rounds.md")
PICTURES = ROOT / "docs" / "images" / "benchmarks"
TARGETS, FULL, PREFERENCE, KEPT = (
    FOLDER / f"cpu-{name}.json" for name in ("targets", "full", "preference", "memory-budget")
)

_PART = re.compile(r"(<!-- figures:([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
# Of the targets, the shape at which all contestants are shown.
_SHOWN = {"tokens": 2048, "hidden": 1024, "vocab": 128256, "dtype": "bfloat16"}
# A peer is faster where it takes less than this of FastD2O's time.
_FASTER = 0.97
# A spread beyond this is told with its figure.
_WIDE = 0.1


def main() -> None:
    """Write them."""
    for page in PAGES:
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    for path in draw(Report.read(FULL), PICTURES):
        path.with_suffix(".png").unlink()  # pages show the SVG


def updated(page: str) -> str:
    """A page with its figures as they are recorded."""
    return _PART.sub(lambda part: f"{part[1]}\n{WRITERS[part[2]]()}\n{part[3]}", page)


def beside_the_peers() -> str:
    """A row for each contestant, at one shape."""
    report = Report.read(TARGETS)
    contests = {case: next(iter(report.of(case, **_SHOWN))) for case in OF_TOKENS}
    date = max(contest.date for contest in contests.values())
    names = dict.fromkeys(row.contestant for contest in contests.values() for row in contest.rows)
    return (
        f"{where(report)}, {date}: {_SHOWN['tokens']} tokens, D {_SHOWN['hidden']}, vocabulary {_SHOWN['vocab']}, "
        f"{_SHOWN['dtype']}. Time over that of the matrix products alone, and memory. `*`: ran once.\n\n"
    ) + _table(
        ["", *(CASES[case].title for case in OF_TOKENS)],
        ([title(name), *(_cell(contest.row(name)) for contest in contests.values())] for name in names),
    )


def all_shapes() -> str:
    """A row for each shape that has targets, FastD2O alone."""
    report = Report.read(TARGETS)
    shapes = {tuple(contest.shape.items()): contest.shape for contest in report.contests}
    return _table(
        ["dtype", "vocabulary", "tokens", *(CASES[case].title for case in OF_TOKENS)],
        (
            [
                *(str(shape[name]) for name in ("dtype", "vocab", "tokens")),
                *(
                    _cell(contest.row(f"fastd2o {report.kind}"))
                    for case in OF_TOKENS
                    for contest in report.of(case, **shape)
                ),
            ]
            for shape in shapes.values()
        ),
    ).replace("**", "")


def grid(case: str) -> str:
    """A row for each shape of the full suite, a column for each contestant."""
    report = Report.read(FULL)
    contests = sorted(
        report.of(case), key=lambda contest: [contest.shape[name] for name in ("dtype", "vocab", "tokens")]
    )
    if not contests:
        return "Not held on this machine yet.\n"
    names = list(dict.fromkeys(row.contestant for contest in contests for row in contest.rows))
    return _table(
        ["dtype", "V", "T", *map(_short, names)],
        (
            [
                *(str(contest.shape[name]) for name in ("dtype", "vocab", "tokens")),
                *(_cell(contest.row(name)) for name in names),
            ]
            for contest in contests
        ),
    ).replace("**", "")


def training_steps() -> str:
    """A row for each contestant and step."""
    contests = [contest for contest in Report.read(FULL).contests if contest.case in STEPS]
    rows = []
    for contest in contests:
        for row in contest.rows:
            first = row is contest.rows[0]
            time = "" if row.over_fastd2o is None else f"{row.over_fastd2o:.2f} x"
            if row.contestant == OURS and row.seconds is not None:
                time = f"{row.seconds:.2f} s"
            rows.append(
                [
                    STEPS[contest.case].title if first else "",
                    title(row.contestant),
                    row.outcome or time,
                    "" if row.extra_megabytes is None else f"{row.extra_megabytes:,.0f} MB",
                    "" if row.longest is None else f"{row.longest:,d}",
                ]
            )
    budget = contests[0].shape["budget"] / 1e6
    return _table(["", "log p by", "time", "memory", f"longest completion in {budget:,.0f} MB"], rows)


def preference() -> str:
    """What ``python -m benchmarks.preference`` measured."""
    report = Report.read(PREFERENCE)
    (contest,) = report.contests
    shape, rows = contest.shape, {row.contestant: row for row in contest.rows}
    judged = [
        f"{name} {figure:,.4g} (aim {most:,.4g}{'' if figure <= most else ', missed'})"
        for name, figure, most in aims_of(contest)
    ]
    names = {
        "grouped": "`linear_preference_loss`",
        "grouped, half saturated": "the same, half of the groups saturated (`coefficient_tol`)",
        "recompute": "`linear_logprob`, `grouped_loss` and a backward: recompute",
        "frozen head": "`linear_preference_loss` with a frozen head",
    }
    head = (
        f"{where(report)}, {contest.date}: D2O, {shape['tokens']} tokens in groups of four sequences, "
        f"D {shape['hidden']}, vocabulary {shape['vocab']}, {shape['dtype']}, "
        f"budget {DEFAULT_BUDGET / 1e6:,.0f} MB, with an allocator that keeps its memory. "
        f"`linear_preference_loss`, at most: {'; '.join(judged)}.\n\n"
    )
    return head + _table(
        ["", "time over 6 T·D·V of products", "over recompute", "memory"],
        (
            [text, f"{row.over_products:.2f}", f"{row.over_fastd2o:.2f}", f"{row.extra_megabytes:,.0f} MB"]
            for name, text in names.items()
            for row in (rows[name],)
        ),
    )


def memory_budget() -> str:
    """FastD2O with memory for softmax weights, and who keeps logits."""
    report = Report.read(KEPT)
    lines = []
    for contest in report.contests:
        for row in contest.rows:
            lines.append([heading(contest) if row is contest.rows[0] else "", title(row.contestant), _cell(row)])
    return _table(["", "", "time over the products · memory"], lines)


def aims() -> str:
    """How many of the targets are met, and which are not."""
    report = Report.read(TARGETS)
    judged = [
        (contest, row, verdict)
        for contest in report.contests
        for row in contest.rows
        for verdict in verdicts(contest, row, report.kind)
    ]
    own = [(contest, verdict) for contest, _, verdict in judged if verdict.quantity != "peer"]
    missed = [f"{verdict.quantity} of {heading(contest)}" for contest, verdict in own if not verdict.met]
    text = f"All {len(own)} of these aims are met."
    if missed:
        text = f"{len(own) - len(missed)} of these {len(own)} aims are met; missed: {'; '.join(missed)}."
    against = [(row.contestant, row.over_fastd2o, verdict) for _, row, verdict in judged if verdict.quantity == "peer"]
    told = []
    for peer in dict.fromkeys(name for name, *_ in against):
        of_peer = [(ratio, verdict) for name, ratio, verdict in against if name == peer and ratio is not None]
        slowest, fastest = min(ratio for ratio, _ in of_peer), max(ratio for ratio, _ in of_peer)
        met = sum(verdict.met for _, verdict in of_peer)
        wanted = of_peer[0][1].text.removeprefix("≥ ")
        told.append(f"{_short(peer)} {slowest:.2g} to {fastest:.2g} (aim {wanted}: {met} of {len(of_peer)})")
    return f"{text} Times of peers over FastD2O's, for log-probabilities: {'; '.join(told)}.\n"


def exponents() -> str:
    """How time grows with tokens and with the vocabulary: p of c·T^p and c·V^p."""
    report = Report.read(FULL)
    rows = []
    for case in ("forward", "frozen", "trained"):
        over_tokens, over_vocab = series(report, case, "tokens"), series(report, case, "vocab")
        for name in dict.fromkeys(row.contestant for contest in over_tokens for row in contest.rows):
            found = [
                points(contests, name, axis, "time")
                for contests, axis in ((over_tokens, "tokens"), (over_vocab, "vocab"))
            ]
            cells = [f"{exponent(sizes, values):.2f}" if len(sizes) > 2 else "" for sizes, values in found]
            if any(cells):
                rows.append([CASES[case].title, title(name), *cells])
    return _table(["", "", "tokens", "vocabulary"], rows)


def slower() -> str:
    """Where a peer is faster than FastD2O."""
    lines = []
    for report in map(Report.read, (TARGETS, FULL)):
        for contest in (contest for case in CASES for contest in report.of(case)):
            ours = contest.row(f"fastd2o {report.kind}")
            for row in contest.rows:
                if row.backend is not None or row.contestant == FLOOR or row.error is not None or ours is None:
                    continue
                if row.over_fastd2o is not None and row.over_fastd2o < _FASTER:
                    memory = ""
                    if row.extra_megabytes is not None and ours.extra_megabytes is not None:
                        memory = f"{row.extra_megabytes:,.0f} MB, FastD2O {ours.extra_megabytes:,.0f} MB"
                    shape = contest.shape
                    where_ = f"{shape['dtype']}, V {shape['vocab']}, T {shape['tokens']}, D {shape['hidden']}"
                    lines.append(
                        [CASES[contest.case].title, where_, _short(row.contestant), f"{row.over_fastd2o:.2f}", memory]
                    )
    return _table(["", "", "peer", "its time over FastD2O's", "memory"], lines)


WRITERS: dict[str, Callable[[], str]] = {
    "beside-the-peers": beside_the_peers,
    "all-shapes": all_shapes,
    **{f"grid-{case}": lambda case=case: grid(case) for case in CASES},  # type: ignore[misc]
    "training-steps": training_steps,
    "preference": preference,
    "memory-budget": memory_budget,
    "aims": aims,
    "exponents": exponents,
    "slower": slower,
    "rounds": lambda: (FOLDER / "rounds" / "table.md").read_text(encoding="utf-8"),
    "machine": lambda: where(Report.read(FULL)) + "\n",
}


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _short(contestant: str) -> str:
    return {FLOOR: "products", "cut-cross-entropy": "CCE"}.get(contestant, contestant)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.error is not None:
        return row.outcome
    if row.over_products is None:
        return ""
    if row.contestant == FLOOR:
        return f"{row.seconds:.2g} s"
    ratio = f"{row.over_products:.2f}" if row.over_products < 10 else f"{row.over_products:.0f}"
    ratio = f"**{ratio}**" if row.backend is not None else ratio
    ratio += "*" if row.rounds == 1 else ""
    ratio += f" ± {row.spread:.0%}" if row.spread is not None and row.spread > _WIDE else ""
    return ratio if row.extra_megabytes is None else f"{ratio} · {row.extra_megabytes:,.0f} MB"


if __name__ == "__main__":
    main()
