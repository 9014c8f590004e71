"""Editing by instruction over a real socket: OpenAI's client, our own endpoint, jobs and replays, with a tiny klein."""

from __future__ import annotations

import base64
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from conftest import ROOT
from fakes import file_of, settings_in, until
from live_servers import serving
from mcp import Client
from numpy.typing import NDArray
from PIL import Image
from tiny_families import build, picture

from stable_diffusion_server.app import create_app

pytestmark = pytest.mark.slow

MODEL = "flux-2-klein-4b"
PROMPT = "make it green, turn the sky dark"
SIZES = (96, 64, 160)
FILES = [file_of(np.asarray(picture(side, seed))) for seed, side in enumerate(SIZES)]
SIDE, STEPS, SEED = 256, 2, 5


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over a tiny klein and the embedded models, of which the embedded SDXL is the default."""
    folder = tmp_path_factory.mktemp("weights")
    build("flux2-klein").save_pretrained(folder / MODEL)
    (folder / f"{MODEL}.toml").write_text(f'native_size = [256, 256]\nsteps = {STEPS}\ndtype = "float32"\n')
    settings = settings_in(
        tmp_path_factory.mktemp("home"), port=0, models_dir=folder, text_to_image_model="embedded-sdxl"
    )
    with serving(create_app(settings), settings, seconds=300) as url:
        yield url


def pixels_of(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def edited(url: str, files: list[bytes], **changes: Any) -> NDArray[np.uint8]:
    """What OpenAI's client gets for these images, in this order."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, default_headers={"Connection": "close"})
    given: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "size": f"{SIDE}x{SIDE}", **changes}
    given["extra_body"] = {"seed": SEED, **given.pop("extra_body", {})}
    answer = client.images.edit(image=[(f"{n}.png", file) for n, file in enumerate(files)], **given)
    assert not answer.to_dict()["warnings"], answer.to_dict()["warnings"]
    return pixels_of(base64.b64decode((answer.data or [])[0].b64_json or ""))


def stock(files: list[bytes]) -> NDArray[np.uint8]:
    """What the stock pipeline draws of these images."""
    images = [Image.fromarray(pixels_of(file)) for file in files]
    generator = torch.Generator().manual_seed(SEED)
    drawn = build("flux2-klein")(
        image=images, prompt=PROMPT, height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=1.0,
        generator=generator,
    )  # fmt: skip
    return np.asarray(drawn.images[0])


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_three_references_give_the_stock_picture(url: str) -> None:
    """Through OpenAI's client; another order, and one image less, give other pictures, each the stock one."""
    orders = [FILES, FILES[::-1], FILES[:2]]
    ours, theirs = [edited(url, files) for files in orders], [stock(files) for files in orders]
    for mine, wanted in zip(ours, theirs, strict=True):
        assert difference(mine, wanted) <= 2
    # More than a picture may differ from the stock one: a wrong order would fail above.
    assert difference(ours[0], ours[1]) > 2
    assert difference(ours[0], ours[2]) > 2


def test_the_endpoint_of_its_own_draws_the_same(url: str) -> None:
    """Files in a form, data URLs in JSON, and a job: one picture, one key; other orders have keys of their own."""
    given = {"model": MODEL, "prompt": PROMPT, "width": SIDE, "height": SIDE, "seed": SEED, "format": "png"}
    files = [("image_file", ("a.png", file)) for file in FILES]
    by_form = httpx.post(f"{url}/edit_and_upload_image", data=given, files=files, timeout=60)
    assert by_form.status_code == 200, by_form.text
    assert difference(pixels_of(httpx.get(by_form.json()["path"]).content), stock(FILES)) <= 2
    urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in FILES]
    by_json = httpx.post(f"{url}/edit_and_upload_image", json={**given, "image_url": urls}, timeout=60).json()
    assert (by_json["key"], by_json["cached"]) == (by_form.json()["key"], True)
    turned = httpx.post(f"{url}/edit_and_upload_image", json={**given, "image_url": urls[::-1]}, timeout=60).json()
    assert turned["key"] != by_form.json()["key"]
    job = httpx.post(
        f"{url}/edit_and_upload_image",
        data={**given, "seed": SEED + 1},
        files=files,
        headers={"Prefer": "respond-async"},
        timeout=60,
    )
    assert job.status_code == 202, job.text
    state = f"{url}/jobs/{job.json()['id']}"
    until(lambda: httpx.get(state).json()["state"] == "done", seconds=60)


def test_an_edit_can_be_replayed_with_its_files_in_order(url: str) -> None:
    """The same files give the same pixels; another order is refused with the digest of the file that belongs there."""
    given = {"model": MODEL, "prompt": PROMPT, "width": SIDE, "height": SIDE, "seed": 8, "format": "png"}
    files = [("image_file", ("a.png", file)) for file in FILES]
    made = httpx.post(f"{url}/edit_and_upload_image", data=given, files=files, timeout=60).json()
    image = ("picture_file", ("p.png", httpx.get(made["path"]).content))
    replayed = httpx.post(f"{url}/v1/replay", files=[image, *files], timeout=60)
    assert replayed.status_code == 200, replayed.text
    assert replayed.json()["replay"]["equal"]
    for wrong in (files[::-1], files[:2], [*files, files[0]], []):
        refused = httpx.post(f"{url}/v1/replay", files=[image, *wrong], timeout=60)
        assert (refused.status_code, refused.json()["field"]) == (422, "image_file"), refused.text


def test_models_that_cannot_say_which_can(url: str) -> None:
    """Without a model the one that edits is taken; a model that does not names it; too many images are refused."""
    given = {"prompt": PROMPT, "width": SIDE, "height": SIDE}
    files = [("image_file", ("a.png", file)) for file in FILES]
    chosen = httpx.post(f"{url}/edit_and_upload_image", data=given, files=files, timeout=60)
    assert chosen.json()["model"] == MODEL
    refused = httpx.post(f"{url}/edit_and_upload_image", data={**given, "model": "embedded-sdxl"}, files=files)
    assert (refused.status_code, refused.json()["field"]) == (422, "model")
    assert MODEL in refused.json()["detail"]
    many = httpx.post(f"{url}/edit_and_upload_image", data=given, files=[files[0]] * 5)
    assert (many.status_code, many.json()["field"]) == (422, "image_file[4]")
    broken = [files[0], ("image_file", ("b.png", b"no image")), files[2]]
    unread = httpx.post(f"{url}/edit_and_upload_image", data=given, files=broken, timeout=60)
    assert (unread.status_code, unread.json()["field"]) == (415, "image_file[1]")
    other = httpx.post(
        f"{url}/v1/images/edits",
        data={"model": "embedded-sdxl", "prompt": PROMPT, "size": "256x256"},
        files=[("image[]", file[1]) for file in files],
        timeout=60,
    )
    (warning,) = other.json()["warnings"]
    assert warning["code"] == "images-unused"
    assert MODEL in warning["message"]


def test_a_picture_that_is_too_narrow_is_named_as_it_was_sent(url: str) -> None:
    """By file, by URL, and in OpenAI's words; also after the first of several."""
    narrow = file_of(np.asarray(picture(160).crop((0, 0, 16, 160))))
    given = {"model": MODEL, "prompt": PROMPT, "width": SIDE, "height": SIDE}
    files = [("image_file", ("a.png", file)) for file in (FILES[0], narrow)]
    refused = [httpx.post(f"{url}/edit_and_upload_image", data=given, files=files, timeout=60).json()["field"]]
    urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in (FILES[0], FILES[1], narrow)]
    by_url = httpx.post(f"{url}/edit_and_upload_image", json={**given, "image_url": urls}, timeout=60)
    refused.append(by_url.json()["field"])
    assert refused == ["image_file[1]", "image_url[2]"]
    form = {"model": MODEL, "prompt": PROMPT, "size": f"{SIDE}x{SIDE}"}
    for sent, name in (([narrow], "image"), ([FILES[0], narrow], "image[1]")):
        answer = httpx.post(
            f"{url}/v1/images/edits", data=form, files=[("image[]", ("a.png", file)) for file in sent], timeout=60
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), answer.text


def test_the_documented_command_works(url: str, tmp_path: Path) -> None:
    """docs/http-api.md, as printed, but for the address."""
    command = re.search(
        r"curl -X POST \"http://localhost:8000/edit_and_upload_image\".*?\n```",
        (ROOT / "docs" / "http-api.md").read_text(),
        re.DOTALL,
    )
    assert command is not None
    (tmp_path / "person.png").write_bytes(FILES[0])
    Image.fromarray(pixels_of(FILES[1])).save(tmp_path / "place.jpg")
    words = shlex.split(command[0].removesuffix("```").replace("\\\n", " ").replace("http://localhost:8000", url))
    done = subprocess.run([*words, "--fail", "--silent"], cwd=tmp_path, capture_output=True, check=True)  # noqa: S603  # the documented command
    assert b"edited.webp" in done.stdout


async def test_an_agent_edits_with_two_references_in_order(url: str) -> None:
    """The tool's image equals the route's, bit for bit; the other order is another image."""
    texts = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in FILES[:2]]
    given = {"prompt": PROMPT, "model": MODEL, "width": SIDE, "height": SIDE, "seed": SEED, "format": "png"}
    async with httpx.AsyncClient(timeout=60) as http, Client(f"{url}/mcp") as client:
        stored = {}
        for name, images in (("in order", texts), ("turned", texts[::-1])):
            answer = await client.call_tool("edit", {**given, "images": images})
            assert not answer.is_error, answer
            assert answer.structured_content["receipt"]["task"] == "edit"
            stored[name] = (await http.get(answer.structured_content["receipt"]["path"])).content
        by_route = (await http.post(f"{url}/edit_and_upload_image", json={**given, "image_url": texts})).json()
        assert np.array_equal(pixels_of(stored["in order"]), pixels_of((await http.get(by_route["path"])).content))
        assert not np.array_equal(pixels_of(stored["in order"]), pixels_of(stored["turned"]))
