"""How the server stands, as HTML: what it can draw with, what waits, what went wrong lately. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_FIGURES = {
    "sds_queue_running": "Pictures on the device",
    "sds_queue_waiting": "Pictures waiting",
    "process_resident_memory_bytes": "Memory of the server",
}
_MOST_FAULTS = 5


def page(readiness: Mapping[str, Any], figures: str, jobs: Sequence[Mapping[str, Any]]) -> str:
    """The whole tab."""
    missing = "".join(f"<li>{escape(reason)}</li>" for reason in readiness.get("missing", ()))
    state = f"<p>It cannot draw:</p><ul>{missing}</ul>" if missing else "<p>It can draw.</p>"
    models = readiness.get("models", ())
    failed = [job for job in jobs if job["state"] == "failed"][:_MOST_FAULTS]
    faults = "".join(f"<li>{escape(str((job.get('problem') or {}).get('detail', '')))}</li>" for job in failed)
    return (
        f'<div class="sds-told" role="status">{state}</div>'
        f"<h3>Work</h3>{_table(_work(figures))}"
        f"<h3>Models</h3>{''.join(_table(_told(model)) for model in models) or '<p>None is loaded yet.</p>'}"
        f"<h3>Latest failures of yours</h3>{f'<ul>{faults}</ul>' if faults else '<p>None.</p>'}"
    )


def _work(figures: str) -> dict[str, str]:
    values = dict(line.rsplit(" ", 1) for line in figures.splitlines() if line and not line.startswith("#"))
    told = {}
    for name, label in _FIGURES.items():
        if name in values:
            value = float(values[name])
            told[label] = f"{value / 1e6:,.0f} MB" if name.endswith("_bytes") else f"{value:g}"
    return told


def _told(model: Mapping[str, Any]) -> dict[str, str]:
    """A model's facts; numbers of bytes as megabytes."""
    told = {}
    for name, value in model.items():
        if value in (None, "", [], ()):
            continue
        shown = f"{value / 1e6:,.0f} MB" if "bytes" in name and isinstance(value, int | float) else str(value)
        told[name.replace("_", " ").capitalize()] = shown
    return told


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows.items()
    )
    return f'<table class="sds-table">{cells}</table>'
