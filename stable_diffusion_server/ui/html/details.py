"""Renders the details of an image in the history as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from html import escape
from typing import Any

from stable_diffusion_server.ui.html import progress

_TASKS = {"text_to_image": "Created", "image_to_image": "Restyled", "inpaint": "Inpainted", "edit": "Edited"}


def picture(entry: Mapping[str, Any]) -> str:
    """Render the image."""
    return (
        f'<div class="sds-picture"><img src="{escape(str(entry["path"]))}" alt="{escape(str(entry["prompt"]))}"></div>'
    )


def page(entry: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Render the parameters: `entry` from the history list, `record` from the image's metadata, possibly empty."""
    whole = {**entry, **record}
    how = _TASKS.get(str(whole.get("task")), "Drawn")
    rows = {
        "Prompt": whole.get("prompt"),
        "Not in the picture": whole.get("negative_prompt"),
        "Model": f"{whole.get('model')} ({whole['revision']})" if whole.get("revision") else whole.get("model"),
        "Size": f"{whole['width']} × {whole['height']}" if "width" in whole else None,
        "Seed": whole.get("seed"),
        "Steps": whole.get("num_inference_steps"),
        "Guidance": whole.get("guidance_scale"),
        "Scheduler": whole.get("scheduler"),
        "Strength": whole.get("strength") if whole.get("task") != "text_to_image" else None,
        how: _format_time(whole.get("drawn_at")),
    }
    return progress.facts({name: str(value) for name, value in rows.items() if value not in (None, "")})


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field values that generate the image again; optional values are texts."""
    asked = record.get("asked") or record
    return {
        "prompt": str(asked.get("prompt") or record.get("prompt") or ""),
        "model": str(record.get("model") or ""),
        "negative": str(record.get("negative_prompt") or ""),
        "steps": str(record.get("num_inference_steps") or ""),
        "guidance": "" if record.get("guidance_scale") is None else f"{record['guidance_scale']:g}",
        "seed": str(record.get("seed", "")),
        "width": record.get("width"),
        "height": record.get("height"),
    }


def _format_time(timestamp: Any) -> str | None:
    """Format a timestamp of the API."""
    try:
        return f"{datetime.fromisoformat(str(timestamp)):%Y-%m-%d %H:%M:%S} UTC"
    except ValueError:
        return None
