"""Fields that the generating tabs share: model, steps, guidance, seed, count, and the image field."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from stable_diffusion_server.ui import model_options
from stable_diffusion_server.ui.forms import MOST_AT_ONCE, MOST_REFERENCES, SEED_END, CommonFields
from stable_diffusion_server.ui.html import progress

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_SENDING, _SCRIPT, _LIST_SCRIPT = (
    Path(__file__).with_name(f"{name}.js") for name in ("picture_upload", "picture_field", "references_field")
)
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_BRUSHES = (
    '<span class="sds-brushes" hidden>'
    '<button type="button" data-does="brush" aria-label="Brush" aria-pressed="true">Brush</button>'
    '<button type="button" data-does="erase" aria-label="Eraser" aria-pressed="false">Eraser</button>'
    '<label>Size <input type="range" class="sds-brush-size" min="2" max="100" value="32"></label>'
    '<button type="button" data-does="undo">Undo</button>'
    "</span>"
)


@dataclass(frozen=True, slots=True)
class ControlSlots:
    """Slots for error messages below the fields of a tab, by parameter name."""

    tab: str
    below: dict[str, gr.HTML] = field(default_factory=dict)

    def id_of(self, name: str) -> str:
        """Return the HTML id of a parameter's component."""
        return f"sds-{self.tab}-{name}"

    def slot(self, *names: str) -> None:
        """Add slots for the error messages of parameters at this position."""
        for name in names:
            self.below[name] = gr.HTML(elem_classes="sds-fault")

    def messages(self, faults: tuple[tuple[str, str], ...]) -> list[str]:
        """Return the HTML of each slot; empty for fields without an error."""
        wrong = {progress.slot_of(name): (name, text) for name, text in reversed(faults)}
        return [progress.fault(self.tab, *wrong[name]) if name in wrong else "" for name in self.below]


@dataclass(frozen=True, slots=True)
class SharedControls:
    """The components, in the order in which `common_fields` takes their values.

    Optional numbers are text fields, because Gradio turns an empty number field into 0; the server validates them.
    """

    prompt: gr.Textbox
    model: gr.Dropdown
    negative: gr.Textbox
    steps: gr.Textbox
    guidance: gr.Textbox
    seed: gr.Textbox
    keep: gr.Checkbox
    count: gr.Slider
    more: gr.Accordion

    @property
    def inputs(self) -> list[Any]:
        """The components as inputs of a callback."""
        return [
            self.prompt,
            self.model,
            self.negative,
            self.steps,
            self.guidance,
            self.seed,
            self.keep,
            self.count,
        ]

    @property
    def model_defaults(self) -> list[Any]:
        """The components that show defaults of the model."""
        return [self.steps, self.guidance, self.negative]


def prompt_box(slots: ControlSlots, placeholder: str) -> gr.Textbox:
    """Add the prompt field; Enter starts the generation."""
    prompt = gr.Textbox(
        label="Prompt",
        placeholder=placeholder,
        lines=1,
        max_lines=6,
        autofocus=slots.tab == "create",
        max_length=4000,
        elem_id=slots.id_of("prompt"),
    )
    slots.slot("prompt")
    return prompt


def fields(slots: ControlSlots, prompt: gr.Textbox) -> SharedControls:
    """Add the fields at this position, below a prompt."""
    count = gr.Slider(1, MOST_AT_ONCE, 1, step=1, label="How many", elem_id=slots.id_of("count"))
    seed, keep = _seed(slots)
    model = gr.Dropdown(model_options.choices(()), value="", label="Model", elem_id=slots.id_of("model"))
    slots.slot("model")
    with gr.Accordion("More: negative prompt, steps, guidance", open=False) as more:
        steps_hint, guidance_hint, use = model_options.defaults({"name": ""})
        negative = gr.Textbox(
            label="Not in the picture", info=use, max_length=4000, elem_id=slots.id_of("negative_prompt")
        )
        slots.slot("negative_prompt")
        with gr.Row():
            steps, guidance = (
                gr.Textbox(label=label, placeholder=hint, max_length=20, min_width=120, elem_id=slots.id_of(name))
                for label, hint, name in (
                    ("Steps", steps_hint, "num_inference_steps"),
                    ("Guidance", guidance_hint, "guidance_scale"),
                )
            )
        slots.slot("num_inference_steps", "guidance_scale")
    return SharedControls(prompt, model, negative, steps, guidance, seed, keep, count, more)


def _seed(slots: ControlSlots) -> tuple[gr.Textbox, gr.Checkbox]:
    """Add the seed, a checkbox to keep it, and a button for a random one."""
    with gr.Row(equal_height=True):
        seed = gr.Textbox(
            label="Seed",
            max_length=20,
            placeholder="another each time",
            min_width=140,
            elem_id=slots.id_of("seed"),
        )
        with gr.Column(min_width=140):
            keep = gr.Checkbox(label="Keep this seed", container=False)
            dice = gr.Button("Roll the dice", size="sm")
    slots.slot("seed")

    def roll() -> tuple[str, bool]:
        return str(secrets.randbelow(SEED_END)), True

    dice.click(roll, None, [seed, keep], **QUIET)
    return seed, keep


def defaults_of(models: model_options.Models, name: str) -> list[Any]:
    """Return updates of the fields that show the defaults of a model."""
    steps, guidance, use = model_options.defaults(model_options.chosen(models, name) or {"name": name})
    return [gr.Textbox(placeholder=steps), gr.Textbox(placeholder=guidance), gr.Textbox(info=use)]


def common_fields(
    prompt: str | None,
    model: str | None,
    negative: str | None,
    steps: str | None,
    guidance: str | None,
    seed: str | None,
    keep: bool,  # positional: Gradio passes the values in the order of the fields
    count: float,
) -> CommonFields:
    """Convert the fields' values. Uses the seed only if `keep`; fields that were never shown have the value None."""
    return CommonFields(
        prompt=(prompt or "").strip(),
        negative=(negative or "").strip(),
        model=model or "",
        steps=(steps or "").strip(),
        guidance=(guidance or "").strip(),
        seed=(seed or "").strip() if keep else "",
        count=min(max(int(count), 1), MOST_AT_ONCE),
    )


def picture_field(label: str, *, paints: bool, elem_id: str) -> gr.HTML:
    """Add an image field with file selection, drop, paste and webcam; with `paints` it has a brush.

    The value is the token of the image. If the visitor painted, a space and the token of the mask follow. The page
    itself uploads images to `/ui/pictures`; Gradio receives only the tokens.
    """
    kind = "sds-paints" if paints else ""
    surface = '<canvas role="img" aria-label="Paint here what is to be replaced"></canvas>' if paints else ""
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
    return _field(template, _SCRIPT, elem_id)


def references_field(label: str, *, elem_id: str) -> gr.HTML:
    """Add a field of several images in order, with file selection, drop and paste.

    The value is their tokens, separated by spaces.
    """
    template = (
        f'<div class="sds-picture-field" role="group" aria-label="{escape(label)}" data-most="{MOST_REFERENCES}">'
        f'<span class="sds-label">{escape(label)}</span><ol class="sds-references" hidden></ol>'
        '<div class="sds-drop"><p>Drop or paste pictures here, or</p>'
        '<label class="sds-choose">choose files'
        '<input type="file" multiple accept="image/png,image/jpeg,image/webp,image/avif,image/gif"></label></div>'
        '<div class="sds-tools"><button type="button" data-does="paste">Paste</button>'
        '<button type="button" data-does="clear" hidden>Remove all</button></div>'
        '<p class="sds-upload-message" role="status"></p></div>'
    )
    return _field(template, _LIST_SCRIPT, elem_id)


def _field(template: str, script: Path, elem_id: str) -> gr.HTML:
    # Not a subclass of gr.HTML: Gradio writes a stub file beside the source of custom components.
    scripts = "".join(path.read_text(encoding="utf-8") for path in (_SENDING, script))
    return gr.HTML("", html_template=template, js_on_load=scripts, elem_id=elem_id)


def tokens_of(value: str | None) -> tuple[str, str]:
    """Return the tokens of the image and of its mask; empty texts without them."""
    picture, _, mask = (value or "").partition(" ")
    return picture if _TOKEN.fullmatch(picture) else "", mask if _TOKEN.fullmatch(mask) else ""


def references_of(value: str | None) -> tuple[str, ...]:
    """Return the tokens of a field of several images, in order, each once; what is no token is dropped."""
    return tuple(dict.fromkeys(token for token in (value or "").split(" ") if _TOKEN.fullmatch(token)))


def settled(elem_id: str) -> str:
    """Return JavaScript that delays an event until uploads of this field, its first input, are complete."""
    return (
        f'async (...values) => {{ const settled = window.sdsPictures?.get("{elem_id}"); '
        "if (settled) values[0] = await settled(); return values; }"
    )
