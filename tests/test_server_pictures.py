"""Image inputs with the embedded models in a server process, as a user sees it."""

from __future__ import annotations

import io

import httpx
import numpy as np
from conftest import Server
from fakes import disc, file_of
from numpy.typing import NDArray
from PIL import Image

SCENE = disc(128, 128, "red", "blue")
MASK = np.zeros((128, 128, 3), np.uint8)
MASK[44:84, 44:84] = 255


def drawn(server: Server, path: str, files: dict[str, bytes], **words: object) -> NDArray[np.uint8]:
    answer = httpx.post(f"{server.url}{path}", data=words, files=files, timeout=120)
    assert answer.status_code == 200, answer.text
    picture = httpx.get(answer.json()["path"])
    return np.asarray(Image.open(io.BytesIO(picture.content)).convert("RGB"))


def test_style_transfer_changes_the_colour_and_keeps_the_shape(server: Server) -> None:
    """A red disc on blue becomes a green disc on white: green in place of red, light in place of blue."""
    words = {"prompt": "a green circle on a white background", "strength": 0.7, "seed": 1, "format": "png"}
    result = drawn(
        server, "/style_transfer_bytes_and_upload_image", {"image_file": file_of(SCENE)}, **words, num_inference_steps=8
    ).astype(int)
    inside = SCENE[..., 0] > 100
    green = (result[..., 1] > result[..., 0] + 30) & (result[..., 1] > result[..., 2] + 30)
    overlap = (green & inside).sum() / (green | inside).sum()
    assert overlap > 0.6


def test_a_picture_drawn_alone_is_drawn_again_bit_for_bit(server: Server) -> None:
    """Text, image with edges, and inpainting with the embedded models, each reproduced from the image's metadata."""
    alone = {"batch": "alone", "num_inference_steps": 2, "prompt": "a red circle on a blue background"}
    image, both = {"image_file": file_of(SCENE)}, {"image_file": file_of(SCENE), "mask_file": file_of(MASK)}
    orders: tuple[tuple[str, dict[str, bytes], dict[str, object]], ...] = (
        ("/create_and_upload_image", {}, {"width": 128, "height": 192, "negative_prompt": "green"}),
        ("/create_and_upload_image", {}, {"width": 128, "height": 128, "model": "flux", "format": "png"}),
        ("/style_transfer_bytes_and_upload_image", image, {"strength": 0.9, "canny": True}),
        ("/inpaint_and_upload_image", both, {"feather": 4, "format": "jpeg"}),
    )
    for path, files, words in orders:
        first = httpx.post(f"{server.url}{path}", data={**alone, **words}, files=files or None, timeout=120).json()
        assert first["batched"] is False
        files = {"picture_file": httpx.get(first["path"]).content, **files}
        again = httpx.post(f"{server.url}/v1/replay", files=files, timeout=120).json()
        assert again["replay"] == {"same_order": True, "equal": True, "decibels": None}, path
        assert (again["seed"], again["batched"], again["cached"]) == (first["seed"], False, False)


def test_inpainting_paints_inside_the_mask_and_nowhere_else(server: Server) -> None:
    """Yellow inside; outside every pixel equals the input."""
    files = {"image_file": file_of(SCENE), "mask_file": file_of(MASK)}
    words = {"prompt": "a yellow square on a red background", "seed": 1, "format": "png"}
    result = drawn(server, "/inpaint_and_upload_image", files, **words)
    assert (result[MASK == 0] == SCENE[MASK == 0]).all()
    red, green, blue = result[50:78, 50:78].reshape(-1, 3).mean(0)
    assert min(red, green) > 120 > blue
