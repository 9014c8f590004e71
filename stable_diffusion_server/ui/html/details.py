"""How a picture of the history was made, as HTML for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from html import escape
from typing import Any

from stable_diffusion_server.ui.html import progress

_TASKS = {"text_to_image": "Created", "image_to_image": "Restyled", "inpaint": "Inpainted"}


def picture(entry: Mapping[str, Any]) -> str:
    """The picture itself."""
    return (
        f'<div class="sds-picture"><img src="{escape(str(entry["path"]))}" alt="{escape(str(entry["prompt"]))}"></div>'
    )


def page(entry: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What is worth knowing of it: `entry` as the history lists it, `record` as far as it is known."""
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
        how: _when(whole.get("drawn_at")),
    }
    return progress.facts({name: str(value) for name, value in rows.items() if value not in (None, "")})


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What would draw it again, by the names of the fields; texts for what may be left empty."""
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


def _when(timestamp: Any) -> str | None:
    """A moment as the API tells it, for people."""
    try:
        return f"{datetime.fromisoformat(str(timestamp)):%Y-%m-%d %H:%M:%S} UTC"
    except ValueError:
        return None
