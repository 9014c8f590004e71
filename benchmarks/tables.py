"""Statistics and Markdown tables of measurements: medians, ratios with their spread."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import diffusers
import torch


@dataclass
class Result:
    """A workload's tables, the ratios that --check tests, and its curves: name → x → (median, p99 …)."""

    lines: list[str]
    ratios: dict[str, float] = field(default_factory=dict)
    curves: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios per round."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def ratios(values: Sequence[float], others: Sequence[float]) -> str:
    """The median, smallest and largest ratio."""
    each = [value / other for value, other in zip(values, others, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def percentile(values: Iterable[float], share: float) -> float:
    """The value that a share (0 to 1) of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def machine() -> str:
    """The machine in one line; figures mean nothing without it."""
    load = os.getloadavg()[0]
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, no accelerator used, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}, load before {load:.1f}."
    )


def versions(packages: Mapping[str, str]) -> str:
    """Names and versions of the installed packages."""
    return ", ".join(f"{name} {version(package)}" for name, package in packages.items())
