"""Credentials of strangers: malformed, huge, forged, looping and remote ones cost one request and open no socket."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from fakes import disc, file_of
from PIL import Image

from stable_diffusion_server.app.credentials import make_certificate
from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.imaging import ContentSigner, DecoderPool, encode_image
from stable_diffusion_server.types import Format

c2pa = pytest.importorskip("c2pa")

MANIFEST: dict[str, Any] = {
    "claim_generator_info": [{"name": "Stable Diffusion Server", "version": "1"}],
    "ingredients": [{"title": "image", "relationship": "parentOf", "label": "input0"}],
    "assertions": [
        {
            "label": "c2pa.actions.v2",
            "data": {
                "actions": [
                    {"action": "c2pa.opened", "parameters": {"ingredientIds": ["input0"]}},
                    {"action": "c2pa.edited"},
                ]
            },
        }
    ],
}


@pytest.fixture
async def decoder() -> AsyncIterator[DecoderPool]:
    pool = DecoderPool(max_bytes=2**24, max_pixels=2**20, max_side=4096, processes=1, seconds=20)
    yield pool
    await pool.close()


@pytest.fixture(scope="module")
def signer() -> ContentSigner:
    return new_signer()


def new_signer() -> ContentSigner:
    key, mark, chain = make_certificate().partition(b"-----BEGIN CERTIFICATE-----")
    signer = ContentSigner()
    signer.open(mark + chain, key)
    return signer


def signed(signer: ContentSigner, file_format: Format = Format.PNG) -> bytes:
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    actions = {"actions": [{"action": "c2pa.created", "digitalSourceType": source}]}
    created = {"assertions": [{"label": "c2pa.actions.v2", "data": actions}]}
    return signer.sign(encode_image(np.asarray(disc()), file_format, 90, None), file_format, created)


async def edited(decoder: DecoderPool, signer: ContentSigner, source: bytes) -> tuple[str, dict[str, Any]]:
    """The reader's verdict on an edit of a file, and its active manifest; signed in the sandbox or it raises."""
    signer.sandbox = decoder.handle_credentials
    head = {"format": "image/png", "manifest": MANIFEST, "chain": signer.chain, "algorithm": signer.algorithm}
    made = await decoder.handle_credentials(head, (file_of(disc()), source), "image", sign=signer.sign_bytes)
    settings = c2pa.Settings.from_json('{"verify": {"remote_manifest_fetch": false}}')
    store = json.loads(c2pa.Reader("image/png", io.BytesIO(made), context=c2pa.Context(settings)).json())
    return store["validation_state"], store["manifests"][store["active_manifest"]]


async def read(decoder: DecoderPool, signer: ContentSigner, file: bytes) -> dict[str, Any]:
    """What the sandbox says of a file."""
    answer: dict[str, Any] = json.loads(await decoder.handle_credentials({"anchor": signer.anchor}, (file,), "image"))
    return answer


def with_chunk(file: bytes, content: bytes) -> bytes:
    """A PNG with these credentials in place of its own."""
    chunk = struct.pack(">I4s", len(content), b"caBX") + content
    return file[:33] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + file[33:]


def credentials_in(file: bytes) -> bytes:
    """The JUMBF of a signed PNG."""
    start = file.index(b"caBX")
    return file[start + 4 : start + 4 + int.from_bytes(file[start - 4 : start], "big")]


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port on loopback, and what was sent to it."""
    calls: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                calls.append(b"call")
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], calls
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
async def test_a_remote_manifest_opens_no_socket(
    decoder: DecoderPool, signer: ContentSigner, listener: tuple[int, list[bytes]], file_format: str
) -> None:
    """The address in its XMP is called neither for reading nor for an ingredient; the edit is signed."""
    port, calls = listener
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
        f'dcterms:provenance="http://127.0.0.1:{port}/m.c2pa"/></rdf:RDF></x:xmpmeta>'
    )
    target = io.BytesIO()
    options: dict[str, Any] = {"xmp": packet.encode()}
    if file_format == "PNG":
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", packet)
        options = {"pnginfo": text}
    Image.fromarray(np.asarray(disc())).save(target, file_format, **options)
    assert (await read(decoder, signer, target.getvalue()))["state"] == "None"
    assert (await edited(decoder, signer, target.getvalue()))[0] == "Valid"
    assert calls == []
    with socket.create_connection(("127.0.0.1", port)):  # the listener does count
        pass
    for _ in range(200):
        if calls:
            break
        threading.Event().wait(0.01)
    assert calls == [b"call"]


BOXES = {
    "empty": b"",
    "noise": bytes(range(256)) * 40,
    "endless length": b"\xff\xff\xff\xff" + b"jumb" + b"\0" * 100,
    "length 0": b"\0\0\0\0jumb" * 1000,
    "length 1, 64 bits": b"\0\0\0\x01jumb" + b"\xff" * 8,
    "nested": b"".join(struct.pack(">I4s", 8 * (20_000 - depth), b"jumb") for depth in range(20_000)),
}


@pytest.mark.parametrize("name", BOXES)
async def test_malformed_credentials_cost_nothing_but_themselves(
    decoder: DecoderPool, signer: ContentSigner, name: str
) -> None:
    """They are never called intact, and the process lives or is replaced: the next file is read."""
    file = with_chunk(file_of(disc()), BOXES[name])
    try:
        state = (await read(decoder, signer, file))["state"]
    except ServerError:
        state = "Unreadable"
    assert state in ("Unreadable", "Invalid", "None")
    assert (await read(decoder, signer, signed(signer)))["state"] == "Trusted"


@pytest.mark.parametrize("file_format", [Format.PNG, Format.JPEG, Format.WEBP])
async def test_every_cut_and_flip_of_credentials_is_survived(
    decoder: DecoderPool, signer: ContentSigner, file_format: Format
) -> None:
    """A hundred mutations of a real manifest: trusted only where unsigned padding was hit, and nothing else is said."""
    whole = signed(signer, file_format)
    intact = await read(decoder, signer, whole)
    start = whole.index(b"jumb") - 4
    random = np.random.default_rng(5)
    for place in random.integers(start, start + 3000, 100):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(8))
        try:
            answer = await read(decoder, signer, bytes(broken))
        except ServerError:
            continue
        assert answer["state"] != "Trusted" or answer == intact, place


async def test_huge_credentials_are_left_out_of_an_edit(decoder: DecoderPool, signer: ContentSigner) -> None:
    """Two megabytes are neither read nor carried on; the ingredient says so."""
    bomb = with_chunk(file_of(disc()), struct.pack(">I4s", 2**21, b"jumb") + b"\0" * (2**21 - 8))
    assert (await read(decoder, signer, bomb))["state"] == "TooLarge"
    state, manifest = await edited(decoder, signer, bomb)
    assert state == "Valid"
    assert manifest["ingredients"][0]["description"] == "Its Content Credentials are too large to be kept."
    assert "active_manifest" not in manifest["ingredients"][0]


async def test_an_edit_is_signed_whatever_its_input_carries(decoder: DecoderPool, signer: ContentSigner) -> None:
    """Where the sandbox gives up, the credentials name the input without its content."""
    signer.sandbox = decoder.handle_credentials
    for name, content in BOXES.items():
        made = await signer.sign_edited(
            file_of(disc()), Format.PNG, MANIFEST, [with_chunk(file_of(disc()), content)], ""
        )
        settings = c2pa.Settings.from_json('{"verify": {"remote_manifest_fetch": false}}')
        reader = c2pa.Reader("image/png", io.BytesIO(made), context=c2pa.Context(settings))
        assert reader.get_validation_state() == "Valid", name


async def test_a_forged_name_is_not_ours(decoder: DecoderPool, signer: ContentSigner) -> None:
    """Another certificate with the same names is intact and not trusted."""
    answer = await read(decoder, signer, signed(new_signer()))
    assert answer["state"] == "Valid"
    assert answer["manifests"][0]["signer"]["common_name"] == "Stable Diffusion Server"


async def test_our_credentials_on_another_picture_are_invalid(decoder: DecoderPool, signer: ContentSigner) -> None:
    """They are moved into a file that they were not made for."""
    other = np.asarray(disc())[::-1].copy()
    moved = with_chunk(encode_image(other, Format.PNG, 90, None), credentials_in(signed(signer)))
    assert (await read(decoder, signer, moved))["state"] == "Invalid"


async def test_a_manifest_that_names_itself_ends(decoder: DecoderPool, signer: ContentSigner) -> None:
    """An ingredient's address is replaced by that of the manifest that holds it, so it loops."""
    signer.sandbox = decoder.handle_credentials
    twice = await signer.sign_edited(file_of(disc()), Format.PNG, MANIFEST, [signed(signer)], "")
    inner = credentials_in(twice)
    labels = sorted({inner[at : at + 45] for at in _places(inner, b"urn:c2pa:")})
    assert len(labels) == 2
    for old, new in (labels, labels[::-1]):
        looped = with_chunk(file_of(disc()), inner.replace(old, new))
        try:
            state = (await read(decoder, signer, looped))["state"]
        except ServerError:
            continue
        assert state in ("Invalid", "Unreadable")


def _places(data: bytes, wanted: bytes) -> Iterator[int]:
    at = data.find(wanted)
    while at >= 0:
        yield at
        at = data.find(wanted, at + 1)
