"""The history tab: search, show, regenerate and delete images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from stable_diffusion_server.ui import code_snippets, model_options
from stable_diffusion_server.ui.client import ApiClients, RefusedError
from stable_diffusion_server.ui.html import details, progress
from stable_diffusion_server.ui.tabs.controls import QUIET
from stable_diffusion_server.ui.tabs.results_panel import client_for, index_of

EVERY = ("Every model", "")
# Maximum images per page: the page holds the whole list and sends it with each request for more.
_MOST_SHOWN = 240

# On a phone the chosen image is below the whole list.
_INTO_VIEW = "() => { document.querySelector('.sds-picture')?.scrollIntoView({ block: 'nearest' }); }"


@dataclass(frozen=True, slots=True)
class HistoryTab:
    """Components that other tabs use: the listed images, the chosen one, the models, and the container of buttons."""

    shown: gr.State
    chosen: gr.State
    message: gr.HTML
    model: gr.Dropdown
    below: gr.Column


@dataclass(frozen=True, slots=True)
class _Details:
    """Components that show one image; `whole` is visible while an image is chosen."""

    message: gr.HTML
    whole: gr.Column
    seen: gr.HTML
    facts: gr.HTML
    address: gr.Textbox
    curl: gr.Code
    python: gr.Code
    record: gr.Code
    buttons: tuple[gr.Button, ...]
    below: gr.Column

    @property
    def outputs(self) -> list[Any]:
        """The components that change with the image, in the order of the values that `_show` returns."""
        return [self.message, self.whole, self.seen, self.facts, self.address, self.curl, self.python, self.record]


def tab(clients: ApiClients, opened: gr.Tab) -> HistoryTab:
    """Build the tab."""
    shown, chosen, behind = gr.State([]), gr.State(-1), gr.State(None)
    with gr.Row():
        with gr.Column(min_width=300):
            with gr.Row():
                words = gr.Textbox(label="Search", placeholder="e.g. star", max_length=1000, min_width=160)
                model = gr.Dropdown(
                    [EVERY, *((name, name) for name in model_options.names(()))], value="", label="Model"
                )
            gallery = gr.Gallery(
                label="Drawn here, newest first",
                columns=3,
                object_fit="cover",
                interactive=False,
                height="auto",
                buttons=[],
                allow_preview=False,
                elem_classes="sds-gallery",
            )
            older = gr.Button("Older pictures", interactive=False)
        with gr.Column(min_width=300):
            one = _details()

    listing = [gallery, shown, behind, older, chosen, *one.outputs[:2]]

    async def search(request: gr.Request, words: str, model: str) -> tuple[Any, ...]:
        return await _listed(clients, request, (words, model), None, [])

    async def further(
        request: gr.Request, words: str, model: str, before: int | None, shown: list[Any]
    ) -> tuple[Any, ...]:
        if before is None or len(shown) >= _MOST_SHOWN:
            return (gr.skip(),) * len(listing)
        return await _listed(clients, request, (words, model), before, shown)

    async def choose(request: gr.Request, shown: list[Any], event: gr.SelectData) -> tuple[Any, ...]:
        try:
            return await _show(clients, request, shown, index_of(event))
        except ValueError as error:
            return gr.skip(), progress.alert(str(error)), *(gr.skip(),) * (len(one.outputs) - 1)

    by = [words, model]
    # `change`, because Gradio does not call `input` for pasted text; it calls `change` for Enter too.
    gr.on(
        [opened.select, words.change, model.input],
        search,
        by,
        listing,
        trigger_mode="always_last",
        **QUIET,
    )
    older.click(further, [*by, behind, shown], listing, **QUIET)
    gallery.select(choose, shown, [chosen, *one.outputs], **QUIET).then(None, js=_INTO_VIEW, **QUIET)
    _act(clients, (shown, chosen, one.message), one.buttons, (search, by, listing))
    return HistoryTab(shown, chosen, one.message, model, one.below)


def _details() -> _Details:
    """Build the details of one image."""
    message = gr.HTML(progress.NONE_CHOSEN)
    with gr.Column(visible=False) as whole:
        seen = gr.HTML()
        buttons = _buttons()
        below = gr.Column()
        facts = gr.HTML()
        address = gr.Textbox(label="Address", interactive=False, buttons=["copy"], elem_id="sds-address")
        with gr.Accordion("As a call, to copy", open=False):
            curl = gr.Code(label="curl", language="shell", interactive=False, elem_id="sds-curl")
            python = gr.Code(label="OpenAI's client", language="python", interactive=False, elem_id="sds-python")
        with gr.Accordion("The whole record", open=False):
            record = gr.Code(label="Record", language="json", interactive=False, elem_id="sds-record")
    return _Details(message, whole, seen, facts, address, curl, python, record, buttons, below)


def _buttons() -> tuple[gr.Button, ...]:
    """Add the buttons of an image; deleting asks for confirmation."""
    with gr.Row():
        again = gr.Button("Draw again", size="sm", min_width=90)
        delete = gr.Button("Delete …", size="sm", min_width=90)
        sure = gr.Button("Really delete it", size="sm", variant="stop", visible=False, min_width=90)
        keep = gr.Button("Keep it", size="sm", visible=False, min_width=90)
    return again, delete, sure, keep


def _act(clients: ApiClients, at: tuple[Any, ...], buttons: tuple[gr.Button, ...], listing: tuple[Any, ...]) -> None:
    """Connect the buttons to the chosen image."""
    (shown, chosen, message), (again, delete, sure, keep) = at, buttons
    search, by, outputs = listing

    async def replay(request: gr.Request, shown: list[Any], chosen: int) -> str:
        client = client_for(clients, request)
        try:
            return progress.replayed(await client.replay(await client.picture(_at(shown, chosen)["path"])))
        except (RefusedError, ValueError) as error:
            return progress.alert(str(error))

    async def remove(request: gr.Request, shown: list[Any], chosen: int, words: str, model: str) -> tuple[Any, ...]:
        try:
            await client_for(clients, request).remove(_at(shown, chosen)["key"])
        except (RefusedError, ValueError) as error:
            return *(gr.skip(),) * (len(outputs) - 2), progress.alert(str(error)), gr.skip()
        *listed, message, whole = await search(request, words, model)
        listing_failed = message not in (progress.NONE_CHOSEN, progress.NOTHING_FOUND, progress.NOTHING_DRAWN)
        return *listed, message if listing_failed else progress.remark("Deleted."), whole

    def ask(sure: bool) -> list[Any]:  # one of two buttons was pressed
        return [gr.Button(visible=not sure), gr.Button(visible=sure), gr.Button(visible=sure)]

    again.click(lambda: progress.remark("Drawing it again …"), None, message, **QUIET).then(
        replay, [shown, chosen], message, **QUIET
    )
    delete.click(lambda: ask(True), None, [delete, sure, keep], **QUIET)
    gr.on([keep.click, sure.click, chosen.change], lambda: ask(False), None, [delete, sure, keep], **QUIET)
    sure.click(remove, [shown, chosen, *by], outputs, **QUIET)


async def _listed(
    clients: ApiClients, request: gr.Request, wanted: tuple[str, str], before: int | None, shown: list[Any]
) -> tuple[Any, ...]:
    """Return the shown images with the next page of the search appended; clears the selection."""
    try:
        words, model = (text or "" for text in wanted)
        found = await client_for(clients, request).history(words, model, before=before)
    except RefusedError as error:
        return *(gr.skip(),) * 5, progress.alert(error.detail), gr.skip()
    pictures = [*shown, *found["pictures"]]
    nothing = progress.NOTHING_FOUND if any(wanted) else progress.NOTHING_DRAWN
    seen = [(picture["path"], picture["prompt"][:60]) for picture in pictures]
    older = found["next"] is not None and len(pictures) < _MOST_SHOWN
    more = gr.Button("Older pictures" if len(pictures) < _MOST_SHOWN else "Search for older ones", interactive=older)
    rest = (gr.skip(),) * 3 if shown else (-1, progress.NONE_CHOSEN if pictures else nothing, gr.Column(visible=False))
    return gr.Gallery(seen, selected_index=None), pictures, found["next"], more, *rest


async def _show(clients: ApiClients, request: gr.Request, shown: list[Any], index: int) -> tuple[Any, ...]:
    client, picture = client_for(clients, request), _at(shown, index)
    seen = (gr.Column(visible=True), details.picture(picture))
    try:
        record = (await client.record(picture["key"]))["record"]
    except RefusedError as error:
        facts = details.page(picture, {})
        return index, progress.alert(error.detail), *seen, facts, picture["path"], "", "", ""
    whole = {**picture, **record}
    keyed = bool(client.key)
    calls = code_snippets.curl(client.base, whole, keyed=keyed), code_snippets.openai(client.base, whole, keyed=keyed)
    return (
        index,
        "",
        *seen,
        details.page(picture, record),
        picture["path"],
        *calls,
        json.dumps(record, indent=2, ensure_ascii=False),
    )


def _at(shown: list[Any], index: int) -> dict[str, Any]:
    """Return the chosen image's entry. Raises `ValueError`."""
    if not 0 <= index < len(shown):
        raise ValueError("Choose a picture first.")
    picture: dict[str, Any] = shown[index]
    return picture
