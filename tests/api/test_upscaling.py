"""`/upscale_and_upload_image`: stored once, within limits of its own, as a job, cancelled by tile."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import disc, file_of, until
from PIL import Image

from stable_diffusion_server.app import upscalers as app_upscalers
from stable_diffusion_server.imaging import Pixels

ROUTE = "/upscale_and_upload_image"
PIXELS = disc(60, 40)
PICTURE = file_of(PIXELS)
pytestmark = pytest.mark.slow


def upscaled(running_app: RunningApp, picture: bytes = PICTURE, **parameters: Any) -> httpx.Response:
    headers = parameters.pop("headers", {})
    return running_app.client.post(ROUTE, files={"image_file": picture}, data=parameters, headers=headers)


def stored_image(running_app: RunningApp, answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    file = running_app.client.get(answer.json()["path"])
    assert file.status_code == 200
    return Image.open(io.BytesIO(file.content))


def test_an_image_is_enlarged_stored_and_found_again(running_app: RunningApp) -> None:
    """By the embedded upscaler and a factor of 2; an equal request finds it; nothing is drawn by a model."""
    answer = upscaled(running_app)
    assert stored_image(running_app, answer).size == (120, 80)
    body = answer.json()
    assert (body["task"], body["model"], body["width"], body["height"]) == ("upscale", "embedded-2x", 120, 80)
    assert body["seed"] is None
    assert body["num_inference_steps"] is None
    assert {"queue", "upscale", "encode", "store", "total"} == set(body["timings"])
    again = upscaled(running_app, upscaler="embedded-2x", scale=2).json()
    assert (again["cached"], again["key"]) == (True, body["key"])
    assert (again["task"], again["model"], again["width"]) == ("upscale", "embedded-2x", 120)
    assert not running_app.squares.prepared


def test_every_way_to_send_an_image_works(running_app: RunningApp) -> None:
    """As a file, as a data URL in JSON and in a query; all the same object."""
    url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    keys = {
        upscaled(running_app).json()["key"],
        running_app.client.post(ROUTE, json={"image_url": url, "scale": 2.0}).json()["key"],
        running_app.client.get(ROUTE, params={"image_url": url, "scale": "2"}).json()["key"],
    }
    assert len(keys) == 1


def test_sizes_are_those_asked_for(running_app: RunningApp) -> None:
    """By a factor, or to a width and height, where what exceeds the aspect ratio is cut off evenly."""
    for parameters, size in (
        ({"scale": 3}, (180, 120)),
        ({"scale": "1.5"}, (90, 60)),
        ({"width": 200, "height": 100}, (200, 100)),
        ({"scale": 16}, (960, 640)),
        ({"scale": 1}, (60, 40)),
    ):
        assert stored_image(running_app, upscaled(running_app, **parameters)).size == size
    assert upscaled(running_app, scale=1).json()["warnings"] == []  # stored already
    codes = [one["code"] for one in upscaled(running_app, width=30, height=20).json()["warnings"]]
    assert codes == ["not-enlarged"]


def test_pixels_are_those_of_the_upscaler(running_app: RunningApp) -> None:
    """Filters as Pillow has them; the embedded network is close to the true disc."""
    for name, resampling in (("Lanczos", Image.Resampling.LANCZOS), ("nearest", Image.Resampling.NEAREST)):
        expected = np.asarray(Image.fromarray(PIXELS).resize((120, 80), resampling))
        found = np.asarray(stored_image(running_app, upscaled(running_app, upscaler=name, format="png")))
        assert (found == expected).all()
    drawn = np.asarray(stored_image(running_app, upscaled(running_app, format="png"))).astype(int)
    assert np.abs(drawn - disc(120, 80)).mean() < 6


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"scale": 0.5}, "scale"),
    ({"scale": 17}, "scale"),
    ({"scale": "1e9"}, "scale"),
    ({"scale": "nan"}, "scale"),
    ({"width": 100}, "height"),
    ({"height": 100}, "width"),
    ({"width": 100, "height": 100, "scale": 2}, "scale"),
    ({"width": 0, "height": 10}, "width"),
    ({"width": 100_000, "height": 10}, "width"),
    ({"width": 8192, "height": 8192}, "width"),
    ({"upscaler": "../../models/embedded-upscaler/embedded-2x.safetensors"}, "upscaler"),
    ({"upscaler": "R-ESRGAN 4x+"}, "upscaler"),
    ({"upscaler": "x" * 300}, "upscaler"),
    ({"prompt": "a cat"}, "prompt"),
    ({"save_path": "../x.png"}, "save_path"),
]


def test_what_is_wrong_is_named(running_app: RunningApp) -> None:
    """Out of range, contradictory, unknown; the parameter is named, and nothing is stored."""
    for parameters, field in REFUSED:
        answer = upscaled(running_app, **parameters)
        assert (answer.status_code, answer.json()["field"]) == (422, field), parameters
    assert running_app.client.post(ROUTE, data={"scale": 2}).status_code == 422
    assert upscaled(running_app, b"no image at all").status_code in (415, 422)
    assert not list((running_app.folder / "bucket").rglob("*.webp"))


def test_both_limits_hold_on_both_sides(run_app: Callable[..., RunningApp]) -> None:
    """MAX_UPSCALED_SIDE and MAX_UPSCALED_PIXELS; MAX_SIDE is for drawing alone."""
    running_app = run_app(max_side=64, max_upscaled_side=240, max_upscaled_pixels=240 * 160)
    assert upscaled(running_app, scale=4).status_code == 200
    assert upscaled(running_app, scale=4.01).json()["field"] == "scale"
    assert upscaled(running_app, width=240, height=160).status_code == 200
    assert upscaled(running_app, width=241, height=10).json()["field"] == "width"
    assert upscaled(running_app, width=240, height=161).json()["field"] == "width"
    large = file_of(disc(150, 20))
    assert upscaled(running_app, large, scale=1.6).status_code == 200
    refused = upscaled(running_app, large)
    assert (refused.status_code, refused.json()["field"]) == (422, "image_file")
    assert "300 × 40" in refused.json()["detail"]


def test_names_formats_and_overwriting_are_as_elsewhere(running_app: RunningApp) -> None:
    """`save_path` is checked first; another order under it is told; `overwrite` replaces it."""
    first = upscaled(running_app, save_path="mine/a.png", upscaler="Lanczos")
    assert first.json()["key"].endswith("mine/a.png")
    assert stored_image(running_app, first).format == "PNG"
    other = upscaled(running_app, save_path="mine/a.png", upscaler="Nearest").json()
    assert (other["cached"], other["warnings"][0]["code"]) == (True, "different-request")
    assert other["model"] == "Lanczos"
    new = upscaled(running_app, save_path="mine/a.png", upscaler="Nearest", overwrite=True).json()
    assert (new["cached"], new["model"]) == (False, "Nearest")
    drawn = running_app.draw(prompt="a red square", save_path="mine/a.png").json()
    assert drawn["warnings"][0]["code"] == "different-request"


def test_what_changes_the_pixels_changes_the_key(running_app: RunningApp) -> None:
    """Upscaler, factor, size, image and format; 1.5 and 1.50 are equal."""
    requests: list[dict[str, Any]] = [{}, {"scale": 1.5}, {"upscaler": "Lanczos"}, {"width": 120, "height": 80}]
    requests += [{"format": "png"}, {"quality": 50}]
    keys = [upscaled(running_app, **one).json()["key"] for one in requests]
    keys.append(upscaled(running_app, file_of(disc(60, 40, "green"))).json()["key"])
    assert len(set(keys)) == len(keys)
    assert upscaled(running_app, scale="1.50").json()["key"] == keys[1]


def test_how_it_was_made_is_in_the_file_and_in_the_history(running_app: RunningApp) -> None:
    """With the record of the image that it was made from, if that was made here."""
    drawn = running_app.draw(prompt="a red square", format="png").json()
    picture = running_app.client.get(drawn["path"]).content
    key = upscaled(running_app, picture).json()["key"]
    record = running_app.client.get(f"/files/{key}?record=1").json()["record"]
    assert (record["task"], record["upscaler"]) == ("upscale", "embedded-2x")
    assert record["source_record"]["prompt"] == "a red square"
    entries = running_app.client.get("/history").json()["pictures"]
    assert [(entry["task"], entry["model"]) for entry in entries[:1]] == [("upscale", "embedded-2x")]


def test_a_job_reports_each_tile(run_app: Callable[..., RunningApp]) -> None:
    """`Prefer: respond-async` as for drawing; its result is found again."""
    running_app = run_app()
    picture = file_of(disc(700, 500))
    accepted = upscaled(running_app, picture, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202, accepted.text
    place = accepted.headers["location"]
    until(lambda: running_app.client.get(place).json()["state"] == "done", 60)
    receipt = running_app.client.get(place).json()["receipt"]
    assert (receipt["task"], receipt["width"]) == ("upscale", 1400)
    assert upscaled(running_app, picture).json()["cached"]


def test_equal_requests_at_a_time_are_one(run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch) -> None:
    """They share one enlargement, and both get its address."""
    running_app, calls = run_app(), []
    real = app_upscalers.Upscalers.enlarge

    def counted(self: Any, name: str, *rest: Any) -> Pixels:
        calls.append(name)
        return real(self, name, *rest)

    monkeypatch.setattr(app_upscalers.Upscalers, "enlarge", counted)
    picture, answers = file_of(disc(600, 400)), []
    threads = [threading.Thread(target=lambda: answers.append(upscaled(running_app, picture).json())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["key"] for answer in answers}) == 1
    assert len(calls) == 1


def test_a_cancelled_job_ends_after_its_tile(
    run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DELETE of a running job: no further tile is drawn, nothing is stored, the next request works."""
    running_app, reached, go_on, tiles = run_app(), threading.Event(), threading.Event(), []
    real = app_upscalers.Upscalers.enlarge

    def slowly(self: Any, name: str, pixels: Pixels, width: int, height: int, report: Any) -> Pixels:
        def watched(done: int, total: int) -> None:
            tiles.append((done, total))
            report(done, total)
            if done == 1:
                reached.set()
                go_on.wait(20)

        return real(self, name, pixels, width, height, watched)

    monkeypatch.setattr(app_upscalers.Upscalers, "enlarge", slowly)
    accepted = upscaled(running_app, file_of(disc(900, 700)), headers={"Prefer": "respond-async"})
    place = accepted.headers["location"]
    assert reached.wait(60)
    assert running_app.client.get(place).json()["steps"] == tiles[0][1] > 4
    threading.Timer(0.5, go_on.set).start()
    assert running_app.client.delete(place).status_code in (200, 202, 204)
    until(lambda: running_app.client.get(place).json()["state"] == "cancelled", 30)
    until(lambda: len(tiles) >= 3 or go_on.is_set())
    assert max(done for done, _ in tiles) <= 2
    assert not list((running_app.folder / "bucket").rglob("*.webp"))
    monkeypatch.setattr(app_upscalers.Upscalers, "enlarge", real)
    assert upscaled(running_app).status_code == 200


def test_an_upscaler_that_fails_costs_one_request(
    run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error is opaque; the server goes on."""
    running_app, real = run_app(), app_upscalers.Upscalers.enlarge

    def broken(*args: Any) -> Pixels:
        raise RuntimeError("secret")

    monkeypatch.setattr(app_upscalers.Upscalers, "enlarge", broken)
    answer = upscaled(running_app)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    monkeypatch.setattr(app_upscalers.Upscalers, "enlarge", real)
    assert upscaled(running_app).status_code == 200


def test_files_of_the_operator_are_used_by_name(run_app: Callable[..., RunningApp], tmp_path: Path) -> None:
    """A file put there while the server runs is found; a pickle is refused with the reason."""
    import upscaler_files

    models = tmp_path / "models"
    models.mkdir()
    running_app = run_app(models_dir=(models,), models="embedded")
    upscaler_files.saved(models, "mine_x4", upscaler_files.rrdb())
    (models / "upscale_models" / "old.pth").write_bytes(b"PK\x03\x04")
    until(lambda: upscaled(running_app, upscaler="mine_x4", scale=4).status_code == 200)
    answer = upscaled(running_app, upscaler="mine_x4", scale=4)
    assert stored_image(running_app, answer).size == (240, 160)
    refused = upscaled(running_app, upscaler="old")
    assert (refused.status_code, refused.json()["field"]) == (422, "upscaler")
    assert "pickled" in refused.json()["detail"]
