"""Draws curves over concurrency as small SVG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure


def draw_curves(curves: Mapping[str, Mapping[str, Mapping[int, float]]], beside: Path) -> list[tuple[str, str]]:
    """Write one file per title, named after `beside`; returns titles and file names.

    Each curve is name → concurrency → value.
    """
    files = []
    for number, (title, by_name) in enumerate(curves.items(), 1):
        figure = Figure(figsize=(6, 3.6))
        axes = figure.subplots()
        for name, values in by_name.items():
            width = 2.5 if name.startswith("ours") else 1.2
            axes.plot(list(values), list(values.values()), marker="o", markersize=3, linewidth=width, label=name)
        levels = sorted({level for values in by_name.values() for level in values})
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests at once")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        figure.tight_layout()
        file = f"{beside.stem}-{number}.svg"
        figure.savefig(beside.with_name(file), metadata={"Date": None})
        files.append((title, file))
    return files
