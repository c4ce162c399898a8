"""How the pictures look: settings of matplotlib, and colours that stay apart for the colour-blind (Okabe and Ito)."""

from __future__ import annotations

from typing import Any

BLUE, GREEN, ORANGE = "#0072B2", "#009E73", "#D55E00"
INK, FAINT, GRID = "#333333", "#8a8a8a", "#e8e8e8"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastd2o",  # the same numbers give the same file
}
