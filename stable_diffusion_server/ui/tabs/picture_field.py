"""Image field with a brush for masks: a custom component whose value is upload tokens, never a file."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import gradio as gr

_SCRIPT = Path(__file__).with_name("picture_field.js")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")

_BRUSHES = (
    '<span class="sds-brushes" hidden>'
    '<button type="button" data-does="brush" aria-label="Brush" aria-pressed="true">Brush</button>'
    '<button type="button" data-does="erase" aria-label="Eraser" aria-pressed="false">Eraser</button>'
    '<label>Size <input type="range" class="sds-brush-size" min="2" max="100" value="32"></label>'
    '<button type="button" data-does="undo">Undo</button>'
    "</span>"
)


def picture_field(label: str, *, paints: bool, elem_id: str) -> gr.HTML:
    """Add an image field with file selection, drop, paste and webcam; with `paints` it has a brush.

    The value is the token of the image. If the visitor painted, a space and the token of the mask follow. The page
    itself uploads images to `/ui/pictures`; Gradio receives only the tokens.
    """
    kind = "sds-paints" if paints else ""
    surface = '<canvas role="img" aria-label="Paint here what is to be drawn anew"></canvas>' if paints else ""
    template = (
        f'<div class="sds-picture-field {kind}" role="group" aria-label="{escape(label)}">'
        f'<span class="sds-label">{escape(label)}</span>'
        f'<div class="sds-stage" hidden><img alt="The picture that was chosen">{surface}</div>'
        "<video hidden playsinline muted></video>"
        '<div class="sds-drop"><p>Drop or paste a picture here, or</p>'
        '<label class="sds-choose">choose a file'
        '<input type="file" accept="image/png,image/jpeg,image/webp,image/avif,image/gif"></label></div>'
        f'<div class="sds-tools">{_BRUSHES if paints else ""}'
        '<button type="button" data-does="paste">Paste</button>'
        '<button type="button" data-does="webcam">Webcam</button>'
        '<button type="button" data-does="remove" hidden>Remove</button></div>'
        '<p class="sds-upload-message" role="status"></p></div>'
    )
    # Not a subclass of gr.HTML: Gradio writes a stub file beside the source of custom components.
    return gr.HTML("", html_template=template, js_on_load=_SCRIPT.read_text(encoding="utf-8"), elem_id=elem_id)


def tokens_of(value: str | None) -> tuple[str, str]:
    """Return the tokens of the image and of its mask; empty texts without them."""
    picture, _, mask = (value or "").partition(" ")
    return picture if _TOKEN.fullmatch(picture) else "", mask if _TOKEN.fullmatch(mask) else ""


def settled(elem_id: str) -> str:
    """Return JavaScript that delays an event until uploads of this field, its first input, are complete."""
    return (
        f'async (...values) => {{ const settled = window.sdsPictures?.get("{elem_id}"); '
        "if (settled) values[0] = await settled(); return values; }"
    )
