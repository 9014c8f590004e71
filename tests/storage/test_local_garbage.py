"""Invalid files in the local bucket: never served, and replaced by a new generation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import RunningApp

from stable_diffusion_server.storage.local import LocalBucket

pytestmark = pytest.mark.slow

NAME = "static/uploads/a.webp"
GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "html": lambda picture: b"<html>garbage</html>",
    "zeros of the length": lambda picture: bytes(len(picture)),
    "text of the length": lambda picture: b"x" * len(picture),
    "empty": lambda picture: b"",
    "a byte": lambda picture: b"R",
    "half a picture": lambda picture: picture[: len(picture) // 2],
    "without its end": lambda picture: picture[:-1],
    "without its beginning": lambda picture: picture[1:],
}


@pytest.mark.fault(194)
@pytest.mark.parametrize("recorded", [True, False], ids=["with its record", "without a record"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_the_folder_counts_as_absent_and_is_drawn_again(
    run_app: Callable[..., RunningApp], garbage: str, recorded: bool
) -> None:
    """With or without its record: 404 for a reader, a new image for a generation request."""
    # Without a signature, which has a time of its own, equal requests make equal files.
    running_app = run_app(content_credentials="off")
    running_app.draw(prompt="a red square", save_path="a.webp")
    root = running_app.folder / "bucket"
    file, record = root / "objects" / NAME, root / "records" / NAME
    picture = file.read_bytes()
    file.unlink()
    file.write_bytes(GARBAGE[garbage](picture))
    if not recorded:
        record.unlink()
    running_app = run_app(content_credentials="off")  # a restart empties the existence cache
    assert running_app.client.get(f"/files/{NAME}").status_code == 404
    again = running_app.draw(prompt="a red square", save_path="a.webp")
    assert (again.status_code, again.json()["cached"]) == (200, False), again.text
    assert running_app.client.get(f"/files/{NAME}").content == file.read_bytes() == picture


@pytest.mark.fault(194)
@pytest.mark.parametrize("name", ["notes.txt", "model.bin", "page.html"])
def test_what_claims_to_be_no_picture_is_let_be(running_app: RunningApp, name: str) -> None:
    """Files of other types belong to somebody else and stay unchanged."""
    root = running_app.folder / "bucket"
    (root / "objects" / name).write_bytes(b"something else")
    bucket = LocalBucket(root)
    bucket.open()
    stored = bucket.stat(name)
    assert stored is not None
    assert (stored.size, bucket.read(name)) == (14, b"something else")
