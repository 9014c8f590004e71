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
    "edit": "/edit_and_upload_image",
}
_READ = "rb"
_FILES = {"image_to_image": ("image",), "inpaint": ("image", "mask")}


def curl(base: str, record: Mapping[str, Any], *, keyed: bool = False) -> str:
    """Return a curl command for the same image; input images have placeholder file names."""
    task = str(record.get("task", "text_to_image"))
    parts = [f"curl {shlex.quote(base + _PATHS.get(task, _PATHS['text_to_image']))}"]
    if keyed:
        parts.append('--header "Authorization: Bearer $API_KEY"')
    words = _words(record)
    if files := _files_of(task, record):
        parts += [f"--form {shlex.quote(f'{name}={value}')}" for name, value in words.items()]
        parts += [f"--form {name}_file=@{file}" for name, file in files]
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
    pairs = _files_of(task, record)
    files = "".join(f'    {name}=open("{file}", "rb"),\n' for name, file in pairs)
    if task == "edit":
        files = f"    image=[{', '.join(f'open({file!r}, {_READ!r})' for _, file in pairs)}],\n"
    size = f'    size="{record["width"]}x{record["height"]}",\n' if "width" in record and not files else ""
    imported = "import os\n\n" if keyed else ""
    return (
        f"{imported}from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{base}/v1", api_key={key})\n'
        f"answer = client.images.{'edit' if files else 'generate'}(\n"
        f"{files}    model={str(model)!r},\n    prompt={str(prompt)!r},\n{size}    extra_body={words!r},\n)\n"
    )


def _files_of(task: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and the placeholder files of a record's input images."""
    if task == "edit":
        return [("image", f"image{number}.png") for number in range(1, len(record.get("references") or "1") + 1)]
    return [(name, f"{name}.png") for name in _FILES.get(task, ())]


def _words(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in _FIELDS if record.get(name) not in (None, "")}
