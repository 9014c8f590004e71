"""A field for a picture, and a brush to paint over it: our own component, whose value is tokens and never a file."""

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
    """A picture that is chosen, dropped, pasted or taken by webcam, and painted over where it `paints`.

    Its value is the token of the picture and, where something was painted, a blank and that of the mask. The page
    sends pictures to `/ui/pictures` itself; Gradio sees nothing but the tokens.
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
    # No class of its own: of those Gradio writes a file beside their source.
    return gr.HTML("", html_template=template, js_on_load=_SCRIPT.read_text(encoding="utf-8"), elem_id=elem_id)


def tokens_of(value: str | None) -> tuple[str, str]:
    """The token of the picture and that of its mask; empty where there is none."""
    picture, _, mask = (value or "").partition(" ")
    return picture if _TOKEN.fullmatch(picture) else "", mask if _TOKEN.fullmatch(mask) else ""


def settled(elem_id: str) -> str:
    """JavaScript that waits, before an event whose first input is this field, for what is still on its way."""
    return (
        f'async (...values) => {{ const settled = window.sdsPictures?.get("{elem_id}"); '
        "if (settled) values[0] = await settled(); return values; }"
    )
