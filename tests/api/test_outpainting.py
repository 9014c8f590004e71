"""Extending an image at `/inpaint_and_upload_image`: the old part is exact, sides bounded, replays and jobs work."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import COLOURS, FakeImageDenoiser, disc, file_of, until
from numpy.typing import NDArray
from PIL import Image

pytestmark = pytest.mark.slow

INPAINT = "/inpaint_and_upload_image"
NOISE = np.random.default_rng(1).integers(0, 256, (80, 100, 3), dtype=np.uint8)
IMAGE = file_of(NOISE)


@pytest.fixture
def app(run_app: Callable[..., RunningApp]) -> RunningApp:
    """A running app with fake image models, and sides of at most 512 pixels."""
    return run_app(FakeImageDenoiser(), max_side=512)


def post(app: RunningApp, files: dict[str, bytes] | None = None, **words: Any) -> httpx.Response:
    parts = {name: (f"{name}.png", data) for name, data in (files or {"image_file": IMAGE}).items()}
    return app.client.post(INPAINT, data={"prompt": "a red square", **words}, files=parts)


def pixels_of(app: RunningApp, answer: httpx.Response) -> NDArray[np.uint8]:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(app.client.get(answer.json()["path"]).content)).convert("RGB"))


@pytest.mark.parametrize("words", [{"format": "png"}, {"format": "webp", "quality": 100}])
@pytest.mark.parametrize(
    "sides",
    [
        {"extend_right": 60},
        {"extend_left": 7, "extend_bottom": 1},
        {"extend_left": 64, "extend_right": 64, "extend_top": 64, "extend_bottom": 64},
        {"extend_top": 33, "fill": "noise", "feather": 4},
        {"extend_right": 412, "fill": "surroundings"},
    ],
)
def test_the_old_part_is_bit_exact_and_the_new_one_is_drawn(
    app: RunningApp, sides: dict[str, Any], words: dict[str, Any]
) -> None:
    """In lossless files, on any side, also where the model draws another size."""
    answer = post(app, **sides, **words)
    made = pixels_of(app, answer)
    left, right, top, bottom = (sides.get(f"extend_{side}", 0) for side in ("left", "right", "top", "bottom"))
    assert made.shape == (80 + top + bottom, 100 + left + right, 3)
    assert (made[top : top + 80, left : left + 100] == NOISE).all()
    assert (answer.json()["task"], answer.json()["width"]) == ("inpaint", made.shape[1])
    new = np.ones(made.shape[:2], bool)
    new[top : top + 80, left : left + 100] = False
    if not sides.get("feather"):
        assert np.abs(made[new].astype(int) - COLOURS["red"]).mean() < 20
    (job,) = app.squares.finished
    assert job.mask is not None
    assert job.mask.pixels.any()


def test_an_overlap_fades_into_the_old_part_and_ends_there(app: RunningApp) -> None:
    """Within the overlap the old picture gives way towards the new side; beyond it, it is exact."""
    white = file_of(np.full((80, 100, 3), 250, np.uint8))
    made = pixels_of(app, post(app, {"image_file": white}, extend_right=40, extend_overlap=16, format="png"))
    assert (made[:, :84] == 250).all()
    row = made[40, 84:100, 1].astype(int)
    assert (np.diff(row) < 0).all()
    assert row[0] > 230
    assert row[-1] < 70


def test_a_mask_repaints_more_beside_the_new_side(app: RunningApp) -> None:
    """Both are repainted, and nothing else."""
    mask = np.zeros((80, 100, 3), np.uint8)
    mask[10:30, 20:50] = 255
    made = pixels_of(app, post(app, {"image_file": IMAGE, "mask_file": file_of(mask)}, extend_left=28, format="png"))
    assert (made[:, 28:][mask[..., 0] == 0] == NOISE[mask[..., 0] == 0]).all()
    assert np.abs(made[10:30, 48:78].astype(int) - COLOURS["red"]).mean() < 20
    black = post(app, {"image_file": IMAGE, "mask_file": file_of(mask * 0)}, extend_left=28)
    assert (black.status_code, black.json()["field"]) == (422, "mask_file")


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ({"extend_left": -1}, {"extend_left"}),
        ({"extend_left": 513}, {"extend_left"}),
        ({"extend_right": 413}, {"extend_right"}),
        ({"extend_left": 206, "extend_right": 207}, {"extend_left", "extend_right"}),
        ({"extend_top": 433, "extend_right": 413}, {"extend_top", "extend_right"}),
        ({"extend_left": 10**30}, {"extend_left"}),
        ({"extend_left": "8; rm"}, {"extend_left"}),
        ({"extend_left": 1.5}, {"extend_left"}),
        ({"extend_left": "nan"}, {"extend_left"}),
        ({"extend_left": 8, "extend_overlap": 257}, {"extend_overlap"}),
        ({"extend_left": 8, "extend_overlap": -1}, {"extend_overlap"}),
        ({"extend_overlap": 8}, {"extend_overlap", "mask_url", "mask_file"}),
        ({"extend_left": 8, "fill": "gold"}, {"fill"}),
        ({"extend_left": 0}, {"mask_url", "mask_file"}),
    ],
)
def test_a_side_out_of_its_bounds_is_refused_by_name(app: RunningApp, words: dict[str, Any], fields: set[str]) -> None:
    """Nothing is drawn."""
    answer = post(app, **words)
    assert answer.status_code == 422, answer.text
    assert {fault["field"] for fault in answer.json()["errors"]} <= fields
    assert answer.json()["field"] in fields
    assert app.squares.finished == []


@pytest.mark.parametrize("words", [{"extend_right": 412}, {"extend_top": 216, "extend_bottom": 216}])
def test_the_largest_size_is_drawn(app: RunningApp, words: dict[str, Any]) -> None:
    """Exactly MAX_SIDE is accepted."""
    assert 512 in pixels_of(app, post(app, **words)).shape


def test_true_is_no_number_of_pixels(app: RunningApp) -> None:
    """As for every number in JSON."""
    body = {"prompt": "a red square", "image_url": "http://a.example/", "extend_left": True}
    answer = app.client.post(INPAINT, json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, "extend_left")


def test_an_extension_is_part_of_the_identity_and_its_absence_is_not(app: RunningApp) -> None:
    """Equal requests meet; other sides and overlaps are other pictures; zeros are no extension."""
    mask = {"image_file": IMAGE, "mask_file": file_of(np.full((80, 100, 3), 255, np.uint8))}
    first, again, wider, softer = (
        post(app, extend_left=8, **more).json()
        for more in ({}, {"extend_right": 0}, {"extend_right": 1}, {"extend_overlap": 1})
    )
    assert (again["cached"], again["key"]) == (True, first["key"])
    assert len({body["key"] for body in (first, wider, softer)}) == 3
    plain, zeros = post(app, mask).json(), post(app, mask, extend_left=0, fill="original").json()
    assert (zeros["cached"], zeros["key"]) == (True, plain["key"])


def test_an_extended_picture_is_drawn_again_from_its_image_alone(app: RunningApp) -> None:
    """The replay has the same digest and the same pixels; a forged side is bounded as at the route."""
    path = post(app, extend_left=20, extend_overlap=3, format="png").json()["path"]
    picture = app.client.get(path).content
    files = {"picture_file": picture, "image_file": IMAGE}
    answer = app.client.post("/v1/replay", files=files)
    assert answer.status_code == 200, answer.text
    assert answer.json()["replay"] == {"same_order": True, "equal": True, "decibels": None}
    extra = app.client.post("/v1/replay", files={**files, "mask_file": IMAGE})
    assert (extra.status_code, extra.json()["field"]) == (422, "mask_file")


def test_a_job_extends_as_the_route_does(app: RunningApp) -> None:
    """`Prefer: respond-async`: the sides survive the job store."""
    form = {"prompt": "a red square", "extend_bottom": "48", "save_path": "job.png"}
    files = {"image_file": ("a.png", IMAGE)}
    answer = app.client.post(INPAINT, data=form, files=files, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    status = answer.headers["location"]
    until(lambda: app.client.get(status).json()["state"] == "done")
    made = np.asarray(Image.open(io.BytesIO(app.client.get("/files/static/uploads/job.png").content)))
    assert made.shape == (128, 100, 3)
    assert (made[:80] == NOISE).all()


def test_the_old_part_of_a_photograph_is_exact_too(app: RunningApp) -> None:
    """A JPEG is extended over its own decoded pixels."""
    photograph = file_of(disc(100, 80), "JPEG", quality=90)
    made = pixels_of(app, post(app, {"image_file": photograph}, extend_top=16, format="png"))
    assert (made[16:] == np.asarray(Image.open(io.BytesIO(photograph)))).all()


def outpainted(app: RunningApp, script: str, args: Any, **more: Any) -> httpx.Response:
    body = {"prompt": "a red square", "init_images": [base64.b64encode(IMAGE).decode()], "denoising_strength": 1}
    return app.client.post("/sdapi/v1/img2img", json={**body, "script_name": script, "script_args": args, **more})


@pytest.mark.parametrize(
    ("script", "args", "size"),
    [
        ("outpainting mk2", ["", 32, 0, ["left", "down"], 1.0, 0.05], (112, 132)),
        ("Outpainting mk2", [None, 16, 0, ["right"]], (80, 116)),
        ("poor man's outpainting", [24, 0, "latent noise", ["up"]], (104, 100)),
        ("Poor man's outpainting", [24.0, 0, 0, "left"], (80, 124)),
    ],
)
def test_automatic1111s_scripts_extend_the_image(app: RunningApp, script: str, args: list[Any], size: Any) -> None:
    """By the directions that they name; the image has its own size, and without a blur its old part is exact."""
    answer = outpainted(app, script, args, width=512, height=512)
    assert answer.status_code == 200, answer.text
    made = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).convert("RGB"))
    assert made.shape == (*size, 3)
    left = 0 if "right" in args[3] or "up" in args[3] else made.shape[1] - 100
    top = made.shape[0] - 80 if "up" in args[3] else 0
    assert (made[top : top + 80, left : left + 100] == NOISE).all()
    assert not json.loads(answer.json()["info"]).get("not_honoured")


@pytest.mark.parametrize(
    "args",
    [
        ["", 32, 0, ["north"]],
        ["", 32, 0, []],
        ["", 32, 0, [["left"]]],
        ["", True, 0, ["left"]],
        ["", "32px", 0, ["left"]],
        ["", -8, 0, ["left"]],
        ["", 1e12, 0, ["left"]],
        ["", 512, 0, ["left"]],
        ["", 8, 257, ["left"]],
        ["", 8, 0, {"left": 1}],
    ],
)
def test_arguments_of_a_script_that_are_none_are_refused(app: RunningApp, args: list[Any]) -> None:
    """422 that names `script_args`; nothing is drawn."""
    answer = outpainted(app, "outpainting mk2", args)
    assert answer.status_code == 422, answer.text
    assert "script_args" in answer.text
    assert app.squares.finished == []


@pytest.mark.parametrize(("script", "args"), [("X/Y/Z plot", [1, 2]), ("../../etc/passwd", None), ("x" * 200, {})])
def test_other_scripts_are_told_and_not_run(app: RunningApp, script: str, args: Any) -> None:
    """The image is drawn without them."""
    answer = outpainted(app, script, args, width=128, height=128)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["info"])["not_honoured"] == ["script_name is not honoured."]
