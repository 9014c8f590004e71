"""Renders the request of an image as a curl command or as Python code with OpenAI's client."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

_FIELDS = ("prompt", "negative_prompt", "model", "seed", "num_inference_steps", "guidance_scale", "scheduler")
_PATHS = {
    "text_to_image": "/create_and_upload_image",
    "image_to_image": "/style_transfer_and_upload_image",
    "inpaint": "/inpaint_and_upload_image",
}
_FILES = {"text_to_image": (), "image_to_image": ("image_file",), "inpaint": ("image_file", "mask_file")}


def curl(base: str, record: Mapping[str, Any], *, keyed: bool = False) -> str:
    """Return a curl command for the same image; input images have placeholder file names."""
    task = str(record.get("task", "text_to_image"))
    parts = [f"curl {shlex.quote(base + _PATHS.get(task, _PATHS['text_to_image']))}"]
    if keyed:
        parts.append('--header "Authorization: Bearer $API_KEY"')
    words = _words(record)
    if files := _FILES.get(task, ()):
        parts += [f"--form {shlex.quote(f'{name}={value}')}" for name, value in words.items()]
        parts += [f"--form {name}=@{name.removesuffix('_file')}.png" for name in files]
    else:
        words |= {side: record[side] for side in ("width", "height") if side in record}
        body = json.dumps(words, ensure_ascii=False)
        parts += ["--header 'Content-Type: application/json'", f"--data {shlex.quote(body)}"]
    return " \\\n  ".join(parts)


def openai(base: str, record: Mapping[str, Any], *, keyed: bool = False) -> str:
    """Return the same request with OpenAI's Python client."""
    words = _words(record)
    prompt, model = words.pop("prompt", ""), words.pop("model", "")
    task = str(record.get("task", "text_to_image"))
    key = 'os.environ["API_KEY"]' if keyed else '"none"'
    names = {"image_to_image": {"image": "image.png"}, "inpaint": {"image": "image.png", "mask": "mask.png"}}
    files = "".join(f'    {name}=open("{file}", "rb"),\n' for name, file in names.get(task, {}).items())
    size = f'    size="{record["width"]}x{record["height"]}",\n' if "width" in record and not files else ""
    imported = "import os\n\n" if keyed else ""
    return (
        f"{imported}from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{base}/v1", api_key={key})\n'
        f"answer = client.images.{'edit' if files else 'generate'}(\n"
        f"{files}    model={str(model)!r},\n    prompt={str(prompt)!r},\n{size}    extra_body={words!r},\n)\n"
    )


def _words(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in _FIELDS if record.get(name) not in (None, "")}
