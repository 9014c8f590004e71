"""The tab of what was drawn here: searched, told, drawn again, deleted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from stable_diffusion_server.ui import snippets, telling
from stable_diffusion_server.ui.desk import RefusedError
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs.panel import desk_of

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True, slots=True)
class History:
    """What others touch: the pictures that are listed, and which is chosen."""

    shown: gr.State
    chosen: gr.State
    told: gr.HTML
    below: gr.Column


def tab(desks: Desks, opened: gr.Tab) -> History:
    """Lay the tab out here."""
    shown, chosen, behind = gr.State([]), gr.State(0), gr.State(None)
    with gr.Row():
        with gr.Column(min_width=300):
            words = gr.Textbox(label="Search", placeholder="words of the prompt", max_length=1000)
            gallery = gr.Gallery(
                label="Drawn here", columns=3, object_fit="contain", interactive=False, height="auto", buttons=[]
            )
            older = gr.Button("Older pictures", interactive=False)
        with gr.Column(min_width=300):
            told = gr.HTML()
            address = gr.Textbox(label="Address", interactive=False, buttons=["copy"])
            made = gr.JSON(label="How it was made", open=True)
            with gr.Accordion("As a call", open=False):
                curl = gr.Code(label="curl", language="shell", interactive=False)
                python = gr.Code(label="OpenAI's client", language="python", interactive=False)
            again, delete, sure, keep = _deeds()
            below = gr.Column()

    listing = [gallery, shown, behind, older, told]
    record = [chosen, address, made, curl, python, told]

    async def search(request: gr.Request, words: str) -> tuple[Any, ...]:
        return await _listed(desks, request, words, None, [])

    async def further(request: gr.Request, words: str, before: int | None, shown: list[Any]) -> tuple[Any, ...]:
        return await _listed(desks, request, words, before, shown)

    async def choose(request: gr.Request, shown: list[Any], event: gr.SelectData) -> tuple[Any, ...]:
        return await _told(desks, request, shown, int(event.index))

    gr.on([opened.select, words.submit], search, words, listing, **_QUIET)
    older.click(further, [words, behind, shown], listing, **_QUIET)
    gallery.select(choose, shown, record, **_QUIET)
    _act(desks, (shown, chosen, told), (again, delete, sure, keep), (search, words, listing))
    return History(shown, chosen, told, below)


def _deeds() -> tuple[gr.Button, ...]:
    """What can be done with a picture; deleting asks once more."""
    with gr.Row():
        again = gr.Button("Draw again", min_width=110)
        delete = gr.Button("Delete …", min_width=110)
        sure = gr.Button("Really delete it", variant="stop", visible=False, min_width=110)
        keep = gr.Button("Keep it", visible=False, min_width=110)
    return again, delete, sure, keep


def _act(desks: Desks, at: tuple[Any, ...], deeds: tuple[gr.Button, ...], listing: tuple[Any, ...]) -> None:
    """Have the buttons act on the chosen picture."""
    (shown, chosen, told), (again, delete, sure, keep) = at, deeds

    async def replay(request: gr.Request, shown: list[Any], chosen: int) -> str:
        desk = desk_of(desks, request)
        try:
            return telling.replayed(await desk.replay(await desk.picture(_at(shown, chosen)["path"])))
        except (RefusedError, ValueError) as error:
            return telling.alert(str(error))

    async def remove(request: gr.Request, shown: list[Any], chosen: int) -> str:
        try:
            await desk_of(desks, request).remove(_at(shown, chosen)["key"])
        except (RefusedError, ValueError) as error:
            return telling.alert(str(error))
        return telling.remark("Deleted.")

    def ask(sure: bool) -> list[Any]:  # one of two buttons was pressed
        return [gr.Button(visible=not sure), gr.Button(visible=sure), gr.Button(visible=sure)]

    again.click(replay, [shown, chosen], told, api_visibility="private")
    delete.click(lambda: ask(True), None, [delete, sure, keep], **_QUIET)
    keep.click(lambda: ask(False), None, [delete, sure, keep], **_QUIET)
    search, words, outputs = listing
    sure.click(remove, [shown, chosen], told, **_QUIET).then(
        lambda: ask(False), None, [delete, sure, keep], **_QUIET
    ).then(search, words, outputs, **_QUIET)


async def _listed(
    desks: Desks, request: gr.Request, words: str, before: int | None, shown: list[Any]
) -> tuple[Any, ...]:
    try:
        found = await desk_of(desks, request).history(words, before)
    except RefusedError as error:
        return gr.skip(), gr.skip(), gr.skip(), gr.skip(), telling.alert(error.detail)
    pictures = [*shown, *found["pictures"]]
    told = "" if pictures else telling.remark("Nothing was drawn here yet." if not words else "No prompt holds this.")
    seen = [(picture["path"], picture["prompt"][:60]) for picture in pictures]
    more = gr.Button("Older pictures", interactive=found["next"] is not None)
    return seen, pictures, found["next"], more, told


async def _told(desks: Desks, request: gr.Request, shown: list[Any], index: int) -> tuple[Any, ...]:
    desk, picture = desk_of(desks, request), _at(shown, index)
    try:
        record = (await desk.record(picture["key"]))["record"]
    except RefusedError as error:
        return index, picture["path"], picture, "", "", telling.alert(error.detail)
    whole = {**picture, **record}
    keyed = bool(desk.key)
    calls = snippets.curl(desk.base, whole, keyed=keyed), snippets.openai(desk.base, whole, keyed=keyed)
    return index, picture["path"], record, *calls, ""


def _at(shown: list[Any], index: int) -> dict[str, Any]:
    """The chosen picture. Raises `ValueError`."""
    if not 0 <= index < len(shown):
        raise ValueError("Choose a picture first.")
    picture: dict[str, Any] = shown[index]
    return picture
