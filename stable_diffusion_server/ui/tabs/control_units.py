"""Fields of control units: a picture, what it shows, what follows it, and a preview of the control image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.ui.client import ApiClients, RefusedError
from stable_diffusion_server.ui.forms import MOST_UNITS, UnitFields
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.image_intake import ImageIntake
from stable_diffusion_server.ui.tabs.controls import QUIET, ControlSlots, picture_field, tokens_of
from stable_diffusion_server.ui.tabs.results_panel import client_for, owner_of

_KINDS = (
    ("Not used", ""),
    ("Edges (canny)", "canny"),
    ("Line art", "lineart"),
    ("Soft edges", "softedge"),
    ("Scribble", "scribble"),
    ("Depth", "depth"),
    ("Normals", "normal"),
    ("Pose", "openpose"),
    ("Tile", "tile"),
    ("Blur", "blur"),
    ("Grey", "gray"),
)
_BY_KIND, _AS_IT_IS = ("By what it shows", ""), ("None: it is ready-made", "none")
_USUAL_WEIGHT = 1.0
_PER_UNIT = 7


@dataclass(frozen=True, slots=True)
class UnitControls:
    """The components of all units, in the order in which `unit_fields` takes their values."""

    inputs: list[Any]
    models: list[gr.Dropdown]
    preprocessors: list[gr.Dropdown]


def units(clients: ApiClients, intake: ImageIntake, slots: ControlSlots, image: gr.HTML | None = None) -> UnitControls:
    """Add the fields at this position. A unit without a picture has that of `image`, the tab's own, if there is one."""
    made = UnitControls([], [], [])
    with gr.Accordion("Control images", open=False):
        gr.Markdown(
            "A ControlNet draws along each of them." if image is None else "Without a picture it is the one above.",
            elem_classes="sds-words",
        )
        for number in range(MOST_UNITS):
            with gr.Group():
                _unit(clients, intake, slots, number, made, image)
    slots.slot("controls")
    return made


def unit_fields(intake: ImageIntake, owner: str, values: Sequence[Any]) -> tuple[UnitFields, ...]:
    """Convert the values of the fields of all units. Raises `NotFound` for a picture that is gone."""
    found = []
    for first in range(0, len(values), _PER_UNIT):
        picture, kind, model, preprocess, weight, start, end = values[first : first + _PER_UNIT]
        if not kind:
            continue
        token, _ = tokens_of(picture)
        file = intake.file(owner, token) if token else None
        found.append(
            UnitFields(str(kind), model or "", preprocess or "", float(weight), float(start), float(end), file)
        )
    return tuple(found)


async def choices_of(clients: ApiClients, request: gr.Request) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Return updates of the lists of networks and of preprocessors, as the server has them."""
    try:
        models, modules = await client_for(clients, request).control_lists()
    except RefusedError:
        models, modules = [], []
    named = [(name, name) for name in modules if name != _AS_IT_IS[1]]
    networks = [_BY_KIND, *((name, name) for name in models)]
    return gr.Dropdown(choices=networks, value=""), gr.Dropdown(choices=[_BY_KIND, _AS_IT_IS, *named], value="")


def _unit(
    clients: ApiClients,
    intake: ImageIntake,
    slots: ControlSlots,
    number: int,
    made: UnitControls,
    image: gr.HTML | None,
) -> None:
    """Add the fields of one unit to `made`."""

    def id_of(name: str) -> str:
        return slots.id_of(f"controls-{number}-{name}")

    picture = picture_field(f"Control picture {number + 1}", paints=False, elem_id=id_of("image"))
    with gr.Row():
        kind = gr.Dropdown([*_KINDS], value="", label="It shows", min_width=140, elem_id=id_of("kind"))
        preprocess = gr.Dropdown(
            [_BY_KIND, _AS_IT_IS], value="", label="Made by", min_width=140, elem_id=id_of("preprocess")
        )
        model = gr.Dropdown([_BY_KIND], value="", label="Followed by", min_width=140, elem_id=id_of("model"))
    with gr.Row():
        weight = gr.Slider(0, 2, _USUAL_WEIGHT, step=0.05, label="Weight", elem_id=id_of("weight"))
        start = gr.Slider(0, 1, 0, step=0.01, label="From this share of the steps", elem_id=id_of("start"))
        end = gr.Slider(0, 1, 1, step=0.01, label="Until", elem_id=id_of("end"))
    preview = gr.Button("Preview", size="sm", elem_id=id_of("preview"))
    seen = gr.HTML()
    made.inputs.extend([picture, kind, model, preprocess, weight, start, end])
    made.models.append(model)
    made.preprocessors.append(preprocess)

    async def look(request: gr.Request, own: str | None, tab: str | None, kind: str | None, module: str | None) -> str:
        token = tokens_of(own)[0] or tokens_of(tab)[0]
        if not token:
            return progress.alert("Choose a picture first.")
        if not (module or kind):
            return progress.alert("Choose what it shows first.")
        try:
            file = intake.file(owner_of(clients, request), token)
            return progress.figure(
                f"Control image {number + 1}",
                await client_for(clients, request).control_image(module or kind or "", file),
            )
        except (RefusedError, ServerError) as error:
            return progress.alert(error.detail)

    preview.click(look, [picture, image or picture, kind, preprocess], seen, **QUIET)
