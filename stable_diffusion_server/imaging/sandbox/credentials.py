"""Part of the program of a decoding process: signs files that have ingredients, and reads the credentials of files.

The worker loads it by its path when it first gets such a request. Nothing here opens a connection: remote manifests and
OCSP are off in every call, no host is allowed, and the process can open no file meanwhile, so no socket either.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import c2pa

# A request is the length of a JSON head, the head, and the files that it lists with their sizes.
HEAD = struct.Struct(">I")
# Credentials of an ingredient beyond this are left out: a chain of edits grows by about 15 KB with each.
_MAX_CREDENTIALS = 1_000_000
_MAX_MANIFESTS, _MAX_ENTRIES, _MAX_TEXT, _MAX_CODES = 20, 20, 200, 20
_MAX_CHUNKS = 100_000
_LEFT_OUT = "Its Content Credentials are too large to be kept."


def sign(request: bytes, ask: Callable[[bytes], bytes]) -> bytes:
    """Return a file with signed credentials; `ask` returns the signature of bytes.

    The head has `format`, `manifest` with `ingredients`, `chain`, `algorithm` and `sizes`: of the file, and of the file
    of each ingredient in turn.
    """
    head, (file, *inputs) = _unpack(request)
    manifest = head["manifest"]
    ingredients, manifest["ingredients"] = manifest["ingredients"], []
    described = []
    for ingredient, data in zip(ingredients, inputs, strict=True):
        media_type = media_type_of(data)
        if media_type is None:  # another format: named, without its content
            manifest["ingredients"].append(ingredient)
            continue
        if sum(end - start for start, end in credential_chunks(data)) > _MAX_CREDENTIALS:
            data, ingredient = without_credentials(data), {**ingredient, "description": _LEFT_OUT}
        described.append((ingredient, media_type, data))
    context = _context()
    target = io.BytesIO()
    kind = c2pa.C2paSigningAlg[head["algorithm"].upper()]
    with c2pa.Builder(manifest, context) as builder, c2pa.Signer.from_callback(ask, kind, head["chain"]) as signer:
        for ingredient, media_type, data in described:
            builder.add_ingredient(ingredient, media_type, io.BytesIO(data))
        builder.sign(signer, head["format"], io.BytesIO(file), target)
    return target.getvalue()


def inspect(request: bytes) -> bytes:
    """Return what the credentials of a file say, as JSON of a few KB.

    The head has `anchor`, the certificate that issued this server's own: a state of `Trusted` is relative to it alone.
    """
    head, (file,) = _unpack(request)
    media_type = media_type_of(file)
    if media_type is None:
        return b'{"state": "None"}'
    found = sum(end - start for start, end in credential_chunks(file))
    if found > _MAX_CREDENTIALS:
        return b'{"state": "TooLarge"}'
    if not found:  # an address alone, which is not followed, is none
        return b'{"state": "None"}'
    try:
        with c2pa.Reader(media_type, io.BytesIO(file), context=_context(head["anchor"])) as reader:
            store = json.loads(reader.json())
    except c2pa.C2paError:
        return b'{"state": "Unreadable"}'
    return json.dumps(_summary(store)).encode()


def media_type_of(file: bytes) -> str | None:
    """Return the media type of a PNG, JPEG or WebP, `None` for other files."""
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if file.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    return "image/webp" if file[:4] == b"RIFF" and file[8:12] == b"WEBP" else None


def credential_chunks(file: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each chunk or segment that may hold credentials, in linear time."""
    kind, offset = media_type_of(file), 8
    if kind == "image/png":
        for _ in range(_MAX_CHUNKS):
            if offset + 8 > len(file):
                return
            length, name = struct.unpack_from(">I4s", file, offset)
            end = min(offset + 12 + length, len(file))
            if name == b"caBX":
                yield offset, end
            offset = end
    elif kind == "image/webp":
        offset = 12
        for _ in range(_MAX_CHUNKS):
            if offset + 8 > len(file):
                return
            name, length = struct.unpack_from("<4sI", file, offset)
            end = min(offset + 8 + length + length % 2, len(file))
            if name == b"C2PA":
                yield offset, end
            offset = end
    elif kind == "image/jpeg":
        offset = 2
        for _ in range(_MAX_CHUNKS):
            if offset + 4 > len(file):
                return
            lead, marker, length = struct.unpack_from(">BBH", file, offset)
            if lead != 0xFF or marker == 0xDA or length < 2:
                return
            end = min(offset + 2 + length, len(file))
            if marker == 0xEB:  # APP11, for JUMBF
                yield offset, end
            offset = end


def without_credentials(file: bytes) -> bytes:
    """Return a file without its credentials."""
    kept, last = [], 0
    for start, end in credential_chunks(file):
        kept.append(file[last:start])
        last = end
    data = b"".join((*kept, file[last:]))
    return data if data[:4] != b"RIFF" else data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]


def _unpack(request: bytes) -> tuple[dict[str, Any], list[bytes]]:
    (length,) = HEAD.unpack_from(request)
    offset = HEAD.size + length
    head = json.loads(request[HEAD.size : offset])
    files = []
    for size in head["sizes"]:
        files.append(request[offset : offset + size])
        offset += size
    return head, files


def _context(anchor: str = "") -> c2pa.Context:
    trust = {"trust": {"user_anchors": anchor}} if anchor else {}
    settings = {
        "builder": {"thumbnail": {"enabled": False}},
        "core": {"allowed_network_hosts": [], "max_decompressed_manifest_size_in_mb": 1},
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
        **trust,
    }
    return c2pa.Context(c2pa.Settings.from_json(json.dumps(settings)))


def _summary(store: dict[str, Any]) -> dict[str, Any]:
    """What is told of a manifest store: the active manifest and those that it names, each text cut."""
    manifests = store.get("manifests", {})
    first = store.get("active_manifest")
    labels = [first, *(label for label in manifests if label != first)][:_MAX_MANIFESTS]
    results = store.get("validation_results", {})
    failures = [code.get("code", "") for code in results.get("activeManifest", {}).get("failure", [])]
    for delta in results.get("ingredientDeltas", [])[:_MAX_ENTRIES]:
        failures += [code.get("code", "") for code in delta.get("validationDeltas", {}).get("failure", [])]
    return {
        "state": store.get("validation_state", "Invalid"),
        "failures": [_text(code) for code in dict.fromkeys(failures)][:_MAX_CODES],
        "manifests": [_manifest(manifests.get(label, {}), label) for label in labels],
    }


def _manifest(manifest: dict[str, Any], label: object) -> dict[str, Any]:
    signature = manifest.get("signature_info") or {}
    claimed = [part for part in manifest.get("assertions", []) if str(part.get("label", "")).startswith("c2pa.actions")]
    actions = [action for part in claimed for action in (part.get("data") or {}).get("actions", [])]
    generators = manifest.get("claim_generator_info") or [{"name": manifest.get("claim_generator", "")}]
    return {
        "label": _text(label),
        "generator": _text(generators[0].get("name")),
        "signer": {
            name: _text(signature.get(name)) for name in ("issuer", "common_name", "cert_serial_number", "time")
        },
        "actions": [_action(action) for action in actions[:_MAX_ENTRIES]],
        "ingredients": [
            {name: _text(part.get(name)) for name in ("title", "relationship", "active_manifest")}
            for part in manifest.get("ingredients", [])[:_MAX_ENTRIES]
        ],
    }


def _action(action: dict[str, Any]) -> dict[str, str]:
    agent, parameters = action.get("softwareAgent") or {}, action.get("parameters") or {}
    agent = agent if isinstance(agent, dict) else {"name": agent}
    return {
        "action": _text(action.get("action")),
        "source_type": _text(action.get("digitalSourceType")),
        "software": _text(agent.get("name")),
        "version": _text(agent.get("version")),
        "when": _text(action.get("when")),
        "digest": _text(parameters.get("digest")) if isinstance(parameters, dict) else "",
    }


def _text(value: object) -> str:
    return value[:_MAX_TEXT] if isinstance(value, str) else ""
