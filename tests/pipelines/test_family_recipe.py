"""The recipe for a new family works: one file and one catalogue row are enough for the whole server."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fakes import settings_in, until
from fastapi.testclient import TestClient
from painted_family import COLOUR, ROW
from PIL import Image

from stable_diffusion_server.app import create_app
from stable_diffusion_server.pipelines import catalog

pytestmark = pytest.mark.slow

SIZE: dict[str, Any] = {"prompt": "anything", "width": 96, "height": 64}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server over the embedded models and the painted one, which is the default."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(catalog._EMBEDDED, ROW.name, ROW)
        settings = settings_in(
            tmp_path_factory.mktemp("painted"),
            models="embedded",
            text_to_image_model=ROW.name,
            model_aliases=("dall-e-3", "brush=painted"),
        )
        address: dict[str, Any] = {"base_url": "http://127.0.0.1:8000", "client": ("127.0.0.1", 5)}
        with TestClient(create_app(settings), **address) as opened:
            until(lambda: opened.get("/readyz").status_code == 200, seconds=200)
            yield opened


def test_a_family_of_one_file_and_one_row_draws_by_default(client: TestClient) -> None:
    """Stored with its revision's defaults, in its own colour and the requested size."""
    answer = client.get("/create_and_upload_image", params=SIZE).json()
    assert (answer["model"], answer["num_inference_steps"], answer["scheduler"]) == ("painted", 2, "euler")
    image = Image.open(io.BytesIO(client.get(answer["path"]).content)).convert("RGB")
    assert image.size == (96, 64)
    assert np.abs(np.asarray(image).astype(int) - COLOUR).max() <= 3


def test_every_interface_knows_the_new_family(client: TestClient) -> None:
    """`/readyz`, the OpenAPI document, OpenAI's list, AUTOMATIC1111's list, and an alias."""
    assert "painted" in [model["name"] for model in client.get("/readyz").json()["models"]]
    assert '"painted"' in client.get("/openapi.json").text
    assert "painted" in [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert "painted" in [model["model_name"] for model in client.get("/sdapi/v1/sd-models").json()]
    drawn = client.post("/v1/images/generations", json={"prompt": "anything", "model": "brush", "size": "64x64"})
    assert drawn.status_code == 200, drawn.text


def test_its_own_bounds_are_kept(client: TestClient) -> None:
    """A scheduler that its row does not list is refused, and the sentence names the model."""
    refused = client.get("/create_and_upload_image", params={**SIZE, "scheduler": "ddim"})
    assert (refused.status_code, refused.json()["field"]) == (422, "scheduler")
    assert "painted" in refused.json()["detail"]
