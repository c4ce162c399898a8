"""Writes the README's benchmark tables from ``benchmarks/results/``: ``python -m benchmarks.readme``."""

from __future__ import annotations

import itertools
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.logprob import DEFAULTS
from benchmarks.results import FLOOR, FOLDER, Result, Row

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- figures:bench: written by python -m benchmarks.readme -->"
END = "<!-- end of figures:bench -->"

# What a reader knows the contestants as.
_TITLES = {
    FLOOR: "matrix products alone",
    "cut-cross-entropy": "Cut Cross-Entropy",
    "liger": "Liger, fused linear scaled cross-entropy",
    "trl chunked": "TRL, `ChunkedLogProbFunction`",
    "torch chunked": "torch, `F.linear_cross_entropy` in chunks",
    "eager": "eager: logits, then log-softmax in float32",
}
_CASES = " | ".join(case.title for case in CASES.values())


def main() -> None:
    """Rewrite what lies between the marks."""
    README.write_text(updated(README.read_text(encoding="utf-8"), results(FOLDER)), encoding="utf-8")


def results(folder: Path) -> list[Result]:
    """All results with every case, smaller shapes first."""
    found = [Result.read(path) for path in folder.glob("*-t*-d*-v*.json")]
    whole = [result for result in found if {row.case for row in result.rows} == set(CASES)]
    return sorted(whole, key=lambda result: [result.kind, *(result.shape[n] for n in ("dtype", "vocab", "tokens"))])


def updated(readme: str, found: list[Result]) -> str:
    """The README with the tables of these results."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables(found)}{END}{after}"


def tables(found: list[Result]) -> str:
    """Per kind of device: all contestants at the shape that is measured by default, then FastD2O at every shape."""
    text = ""
    for kind, group in itertools.groupby(found, key=lambda result: result.kind):
        of_kind = list(group)
        for result in of_kind:
            if all(result.shape[name] == value for name, (value,) in DEFAULTS[kind].items()):
                text += beside_the_peers(result)
        text += all_shapes(of_kind)
    return text


def beside_the_peers(result: Result) -> str:
    """A row for each contestant."""
    shape = result.shape
    lines = [
        f"{_machine(result)}: {shape['tokens']} tokens, D {shape['hidden']}, vocabulary {shape['vocab']}, "
        f"{shape['dtype']}. Time over that of the matrix products alone, and memory.",
        "",
        f"| | {_CASES} |",
        "|---|" + "---|" * len(CASES),
    ]
    for name in dict.fromkeys(row.contestant for row in result.rows):
        cells = [_cell(result.row(case, name)) for case in CASES]
        lines.append(f"| {_title(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def all_shapes(found: list[Result]) -> str:
    """A row for each shape, FastD2O alone."""
    kind = found[0].kind
    lines = [
        f"FastD2O's `{kind}` backend at every shape that was measured; D {found[0].shape['hidden']}:",
        "",
        f"| dtype | vocabulary | tokens | {_CASES} |",
        "|---|---|---|" + "---|" * len(CASES),
    ]
    for result in found:
        cells = [str(result.shape[name]) for name in ("dtype", "vocab", "tokens")]
        cells += [_cell(result.row(case, f"fastd2o {kind}")).replace("**", "") for case in CASES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def _machine(result: Result) -> str:
    machine = result.machine
    threads = f", {machine['threads']} threads" if result.kind == "cpu" else ""
    return f"{machine['device']}{threads}, torch {machine['torch']}, {machine['date']}"


def _title(name: str) -> str:
    if name.startswith("fastd2o "):
        return f"**FastD2O**, `{name.removeprefix('fastd2o ')}`"
    return _TITLES[name]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.over_products is None:
        return "failed"
    if row.contestant == FLOOR:
        return f"{row.seconds:.2g} s"
    ratio = f"{row.over_products:.2f}" if row.over_products < 10 else f"{row.over_products:.0f}"
    ratio = f"**{ratio}**" if row.backend is not None else ratio
    return ratio if row.extra_megabytes is None else f"{ratio} · {row.extra_megabytes:,.0f} MB"


if __name__ == "__main__":
    main()
