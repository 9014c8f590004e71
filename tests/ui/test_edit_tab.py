"""The Edit tab with a tiny klein, in a real browser, and its events as strangers send them."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from browsers import Tab
from conftest import Server, free_port, start_server
from fakes import file_of, until
from playwright.sync_api import expect
from tiny_families import build, picture

from scripts.browser import ask, draw

pytestmark = pytest.mark.slow

MODEL = "flux-2-klein-4b"
FILES = [file_of(np.asarray(picture(side, seed))) for seed, side in enumerate((96, 64, 160))]
SIDE, SEED = 256, "5"


@pytest.fixture(scope="module")
def editing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny klein and the embedded models, of which the embedded SDXL is the default; its UI is loaded."""
    weights, port = tmp_path_factory.mktemp("weights"), free_port()
    build("flux2-klein").save_pretrained(weights / MODEL)
    (weights / f"{MODEL}.toml").write_text('native_size = [256, 256]\nsteps = 2\ndtype = "float32"\n')
    environment = {"MODELS_DIR": str(weights), "TEXT_TO_IMAGE_MODEL": "embedded-sdxl", "UI_RATE_LIMIT": ""}
    serve = (sys.executable, "-m", "stable_diffusion_server", "serve")
    server = start_server(tmp_path_factory.mktemp("editing"), port, *serve, PORT=str(port), **environment)
    httpx.get(f"{server.url}/ui/")
    until(lambda: "gradio_config" in httpx.get(f"{server.url}/ui/", timeout=60).text, 120)
    yield server
    server.stop()


def edit_tab(tab: Tab, files: list[bytes]) -> None:
    """Open the tab, choose the files, and set the size and the seed."""
    inside = tab.open("Edit")
    given = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": file} for n, file in enumerate(files)]
    inside.locator("#sds-edit-image_file input[type=file]").set_input_files(given)
    expect(inside.locator(".sds-references li")).to_have_count(len(files))
    for name in ("Width", "Height"):
        inside.get_by_label(name, exact=True).fill(str(SIDE))
    inside.get_by_label("Seed", exact=True).fill(SEED)
    inside.get_by_label("Keep this seed").check()


def key_of(server: Server, files: list[bytes], prompt: str) -> str:
    """The key of the same edit over the API, which must be stored already."""
    given = {"model": MODEL, "prompt": prompt, "width": SIDE, "height": SIDE, "seed": SEED}
    sent = [("image_file", ("a.png", file)) for file in files]
    answer = httpx.post(f"{server.url}/edit_and_upload_image", data=given, files=sent, timeout=60).json()
    return str(answer["key"]) if answer["cached"] else ""


def shown_key(tab: Tab) -> str:
    return str(tab.inside.locator(".sds-gallery img").first.get_attribute("src")).partition("/files/")[2]


def stored(server: Server, tab: Tab) -> list[bytes]:
    """The files that the server keeps of the shown references, in order."""
    sources = [image.get_attribute("src") for image in tab.inside.locator(".sds-references img").all()]
    return [httpx.get(source).content for source in sources]


def test_pictures_are_edited_in_the_order_shown(tab_of: Callable[..., Tab], editing_server: Server) -> None:
    """Three references; the last one first; the second removed: each time the API's picture of those files in order."""
    tab = tab_of(editing_server.url)
    edit_tab(tab, FILES)
    expect(tab.page.locator("#sds-edit-model input")).to_have_value(re.compile(f"^{MODEL}"))
    tab.inside.get_by_text(f"{MODEL} looks at up to 4 pictures, in this order.").wait_for()
    first, second, third = stored(editing_server, tab)
    keys = []
    for change, files in (
        ((), [first, second, third]),
        (("Move picture 3 forward", "Move picture 2 forward"), [third, first, second]),
        (("Remove picture 2",), [third, second]),
    ):
        for name in change:
            tab.inside.get_by_role("button", name=name).click()
        prompt = f"swap them, {len(keys)}"
        ask(tab.inside, prompt)
        # The picture of the click before is shown until this one is done.
        shown = re.compile(f"/files/(?!{'|'.join(map(re.escape, keys)) or '-'})")
        expect(tab.inside.locator(".sds-gallery img").first).to_have_attribute("src", shown)
        expect(tab.inside.locator(".sds-made")).to_contain_text(f"256 × 256, {MODEL}, 2 steps")
        keys.append(shown_key(tab))
        assert keys[-1] == key_of(editing_server, files, prompt)
    assert len(set(keys)) == 3
    tab.inside.get_by_text("Before and after").wait_for()
    tab.was_quiet()


def test_a_result_becomes_a_reference_more(tab_of: Callable[..., Tab], editing_server: Server) -> None:
    """What Create drew is put behind the picture that is there; a wrong size is shown at its field; cancel ends it."""
    tab = tab_of(editing_server.url)
    edit_tab(tab, FILES[:1])
    inside = tab.open("Create")
    draw(inside, "a red circle on a blue background")
    inside.get_by_role("button", name="Edit this one").click()
    tiles = tab.page.locator("#sds-edit-image_file li")
    expect(tiles).to_have_count(2)
    tab.inside.get_by_label("Width", exact=True).fill("9000")
    ask(tab.inside, "blend them")
    tab.page.locator("#sds-fault-edit-width").wait_for()
    tab.inside.get_by_label("Width", exact=True).fill("1024")
    tab.inside.get_by_role("button", name="More").click()
    tab.inside.get_by_label("Steps", exact=True).fill("100")
    ask(tab.inside, "blend them")
    tab.reported("of 100")
    tab.inside.get_by_role("button", name="Cancel").click()
    tab.reported("Cancelled.")
    tab.inside.get_by_role("button", name="Remove all").click()
    expect(tiles).to_have_count(0)
    tab.inside.get_by_role("button", name="Draw", exact=True).click()
    tab.page.locator("#sds-fault-edit-image_file", has_text="Choose a picture to edit first.").wait_for()
    tab.was_quiet()


def test_the_page_says_that_no_model_edits(tab_of: Callable[..., Tab]) -> None:
    """With the embedded models: a sentence names models that would; the picker offers none."""
    tab = tab_of()
    tab.open("Edit")
    tab.reported("No model of this server looks at reference pictures")
    expect(tab.page.locator("#sds-edit-model input")).to_have_value("There is none")
    tab.was_quiet()


class Stranger:
    """Sends events of the page as a program."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        page = self.http.get("/ui/").text
        config = json.loads(page.split("window.gradio_config = ", 1)[1].split(";</script>", 1)[0])
        (field,) = (one["id"] for one in config["components"] if one["props"].get("elem_id") == "sds-edit-image_file")
        self.draw = next(
            event for event in config["dependencies"] if event["inputs"][:1] == [field] and len(event["inputs"]) > 8
        )

    def references(self, value: object) -> tuple[int, str]:
        """Send a value of the field of references; the status, and what the session is told."""
        session = secrets.token_hex(8)
        data = [value, *[None] * (len(self.draw["inputs"]) - 1)]
        data[3] = "blend them"
        body = {"data": data, "event_data": None, "fn_index": self.draw["id"], "trigger_id": None}
        answer = self.http.post("/ui/gradio_api/queue/join", json={**body, "session_hash": session})
        if answer.status_code != 200:
            return answer.status_code, answer.text
        parts = []
        with self.http.stream("GET", "/ui/gradio_api/queue/data", params={"session_hash": session}) as news:
            for line in news.iter_lines():
                parts.append(line)
                if "close_stream" in line:
                    break
        return 200, "\n".join(parts)


@pytest.mark.fault(100)
def test_what_strangers_send_as_references_is_bounded(editing_server: Server) -> None:
    """Paths, addresses, unknown tokens, thousands of them, one token a thousand times: a sentence, and no request."""
    stranger = Stranger(editing_server.url)
    own = stranger.http.post("/ui/pictures", content=FILES[0]).json()["token"]
    jobs = len(stranger.http.get("/jobs").json()["jobs"])
    invented = [secrets.token_urlsafe(32) for _ in range(1_000)]
    for value, said in (
        ("/etc/passwd file:///etc/passwd http://127.0.0.1:1/", "Choose a picture to edit first."),
        (f"{own[:-1]}\n", "Choose a picture to edit first."),
        ("\u2003" * 20_000, "Choose a picture to edit first."),
        (invented[0], "not kept any more"),
        (f"{own} {invented[0]}", "not kept any more"),
        (" ".join(invented), "Choose at most 16 pictures."),
    ):
        status, told = stranger.references(value)
        assert (status, said in told) == (200, True), told[:500]
    for value in ([own], {"path": "/etc/passwd"}, 7, True):
        assert stranger.references(value)[0] == 422
    assert stranger.references("x" * 70_000)[0] == 413
    assert len(stranger.http.get("/jobs").json()["jobs"]) == jobs
    # A thousand times the same one is one reference.
    status, told = stranger.references(" ".join([own] * 1_000))
    assert (status, "Done in" in told) == (200, True), told[-2000:]
