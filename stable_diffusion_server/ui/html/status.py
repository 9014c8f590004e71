"""Renders the state of the server as HTML: readiness, work, models, recent failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from stable_diffusion_server.ui.html import progress

Job = Mapping[str, Any]

# Names as in `/metrics`; a test compares them.
FIGURES = {
    "sds_queue_running": "On the device",
    "sds_queue_waiting": "Waiting",
    "process_resident_memory_bytes": "Memory of the server",
    "sds_spool_pictures": "Waiting for the storage",
}
_FACTS = {
    "folder": "Weights",
    "parts": "Parts",
    "revision": "Revision",
    "device": "Device",
    "residency": "Placement",
    "dtype": "Numbers",
    "quantization": "Quantization",
    "bytes": "Memory",
    "follows_edges": "Follows edges",
    "loras": "Adapters",
    "unusable_loras": "Adapters that cannot be used",
}
_MAX_FAILURES = 5


def page(readiness: Mapping[str, Any], figures: str, jobs: Sequence[Job]) -> str:
    """Render the whole tab."""
    models = "".join(_card(model) for model in readiness.get("models", ())) or "<p>None is loaded yet.</p>"
    return (
        f'<div class="sds-standing">{_state(readiness)}'
        f"<h2>Work</h2>{_figures(figures)}{_work(jobs)}"
        f'<h2>Models</h2><div class="sds-cards">{models}</div>'
        f"<h2>Your latest failures</h2>{_failures(jobs)}</div>"
    )


def _state(readiness: Mapping[str, Any]) -> str:
    missing = "".join(f"<li>{escape(reason)}</li>" for reason in readiness.get("missing", ()))
    if missing:
        return f'<div class="sds-message sds-alert" role="status"><p>It cannot draw:</p><ul>{missing}</ul></div>'
    return '<div class="sds-message sds-ready" role="status"><p>It can draw.</p></div>'


def _figures(figures: str) -> str:
    values = dict(line.rsplit(" ", 1) for line in figures.splitlines() if line and not line.startswith("#"))
    rows = "".join(
        f"<div class='sds-card'><dt>{label}</dt><dd>{escape(_figure(name, float(values[name])))}</dd></div>"
        for name, label in FIGURES.items()
        if name in values
    )
    return f'<dl class="sds-figures">{rows}</dl>'


def _figure(name: str, value: float) -> str:
    return f"{value / 1e6:,.0f} MB" if "bytes" in name else f"{value:g}"


def _work(jobs: Sequence[Job]) -> str:
    """Render the visitor's own running and queued jobs."""
    active = [job for job in jobs if job["state"] in ("queued", "running")]
    rows = "".join(f"<li>{escape(progress.sentence(job))}</li>" for job in active)
    return f"<p>Yours:</p><ul>{rows}</ul>" if rows else ""


def _card(model: Mapping[str, Any]) -> str:
    """Render the details of a model."""
    rows = {
        label: _format_fact(name, model[name])
        for name, label in _FACTS.items()
        if model.get(name) not in (None, "", [], {})
    }
    default = " (draws where none is named)" if model.get("usual") else ""
    return f'<div class="sds-card"><h3>{escape(str(model["name"]))}{default}</h3>{progress.facts(rows)}</div>'


def _format_fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{part} from {place}" for part, place in value.items())
    return _figure(name, value) if isinstance(value, int | float) else str(value)


def _failures(jobs: Sequence[Job]) -> str:
    failed = [job for job in jobs if job["state"] == "failed"][:_MAX_FAILURES]
    rows = "".join(f"<li>{escape(_when(job) + progress.sentence(job))}</li>" for job in failed)
    return f"<ul>{rows}</ul>" if rows else "<p>None.</p>"


def _when(job: Job) -> str:
    return f"{datetime.fromtimestamp(job['ended_at'], UTC):%Y-%m-%d %H:%M} UTC: " if job.get("ended_at") else ""
