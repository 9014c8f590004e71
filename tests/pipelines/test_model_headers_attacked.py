"""Headers made to harm: any bytes give an answer, in bounded time and memory, and nonsense is never a model."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import FILES, SDXL_LAYERS, flux, header_bytes, kohya, write_gguf, write_safetensors
from python_steps import steps_of

from stable_diffusion_server.pipelines.library import identify
from stable_diffusion_server.pipelines.library.file_headers import MAX_TENSORS, parse_safetensors
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.library.shards import read_shards
from stable_diffusion_server.pipelines.library.spec_file import read_spec

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = kohya(SDXL_LAYERS)


def file_with(folder: Path, header: bytes, data: bytes = b"", ending: str = ".safetensors") -> Path:
    file = folder / f"a{ending}"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


def tensor(
    *, dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


NONSENSE: dict[str, object] = {
    "a list": [1, 2],
    "a number": 5,
    "a tensor that is a text": {"a": "text"},
    "a tensor that is nothing": {"a": None},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "an unknown dtype": {"a": tensor(dtype="F7")},
    "a dtype that is a list": {"a": tensor(dtype=["F32"])},
    "more than three facts": {"a": tensor(more=1)},
    "a shape that is a text": {"a": tensor(shape="1")},
    "an empty text as shape": {"a": tensor(shape="")},
    "a negative side": {"a": tensor(shape=[-1])},
    "two negative sides": {"a": tensor(shape=[-1, -1])},
    "a side that is true": {"a": tensor(shape=[True])},
    "a side with a point": {"a": tensor(shape=[1.0])},
    "an absurd side": {"a": tensor(shape=[2**60])},
    "a hundred sides": {"a": tensor(shape=[1] * 100)},
    "one offset": {"a": tensor(offsets=[4])},
    "three offsets": {"a": tensor(offsets=[0, 4, 8])},
    "offsets the wrong way round": {"a": tensor(offsets=[4, 0])},
    "negative offsets": {"a": tensor(offsets=[-4, 0])},
    "offsets with a point": {"a": tensor(offsets=[0.0, 4.0])},
    "offsets that are true": {"a": tensor(dtype="U8", offsets=[False, True])},
    "offsets of another size": {"a": tensor(offsets=[0, 8])},
    "a gap at the start": {"a": tensor(offsets=[4, 8])},
    "a gap": {"a": tensor(), "b": tensor(offsets=[8, 12])},
    "an overlap": {"a": tensor(shape=[2], offsets=[0, 8]), "b": tensor(offsets=[4, 8])},
    "the same bytes twice": {"a": tensor(), "b": tensor()},
    "metadata that is a list": {"__metadata__": [], "a": tensor()},
    "metadata with numbers": {"__metadata__": {"a": 1}, "a": tensor()},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_nonsense_header_is_refused(tmp_path: Path, name: str) -> None:
    """Facts of tensors that cannot be true."""
    found = identify(file_with(tmp_path, json.dumps(NONSENSE[name]).encode(), bytes(12)))
    assert (found.kind.value, found.families, bool(found.reason)) == ("unknown", (), True)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"\\u0064type":"F16"}}',
        b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_a_name_that_is_given_twice_is_refused(header: bytes) -> None:
    """Also with escapes: readers differ in which of the two they take."""
    with pytest.raises(UnreadableModel, match="twice"):
        parse_safetensors(header, 4)


@pytest.mark.parametrize(
    "header",
    [
        b"{" * 5_000_000,
        b'{"a":' * 1_000_000,
        b'{"a":' + b"[" * 3_000_000,
        b'{"a":[' + b"[]," * 1_500_000 + b"[]]}",
        b'{"a":[' + b"1," * 2_000_000 + b"1]}",
        b'{"a":' + b"9" * 3_000_000 + b"}",
        b'{"a":"' + b"\\u0041" * 700_000 + b'"}',
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 500) + b'],"data_offsets":[0,4]}}',
        b'{"a":"' + b"\xff\xfe" * 1_000_000 + b'"}',
    ],
    ids=["braces", "objects", "lists", "many lists", "numbers", "a long number", "escapes", "long sides", "not text"],
)
def test_a_header_bomb_is_refused_in_bounded_time(tmp_path: Path, header: bytes) -> None:
    """Megabytes of brackets, numbers and escapes; the bound of a test is a hundred times what they take."""
    began = time.thread_time()
    found = identify(file_with(tmp_path, header, bytes(4)))
    assert (found.kind.value, bool(found.reason)) == ("unknown", True)
    assert time.thread_time() - began < 30


def header_of(tensors: int) -> tuple[bytes, int]:
    text, size = header_bytes({f"layer.{number}.weight": (4, 4) for number in range(tensors)})
    return text[8:], size


def test_the_steps_of_a_header_grow_with_its_length() -> None:
    """Ten times the tensors take ten times the steps, 10 each."""
    few, many = (steps_of(partial(parse_safetensors, *header_of(tensors))) for tensors in (300, 3_000))
    assert many < 11 * few
    assert many < 15 * 3_000


def test_the_longest_header_is_read_in_bounded_time() -> None:
    """The square of 65,536 tensors would show here also within C; the bound is fifty times what it takes."""
    header, size = header_of(MAX_TENSORS)
    began = time.thread_time()
    assert len(parse_safetensors(header, size).shapes) == MAX_TENSORS
    assert time.thread_time() - began < 30


@QUICK
@given(content=st.binary(max_size=400))
@pytest.mark.parametrize("ending", [".safetensors", ".gguf", ".toml"])
def test_any_bytes_get_an_answer(tmp_path: Path, ending: str, content: bytes) -> None:
    """Never an exception, and never a model."""
    file = tmp_path / f"a{ending}"
    file.write_bytes((b"GGUF\x03\x00\x00\x00" if ending == ".gguf" else b"") + content)
    if ending == ".toml":
        read_spec(file)
        return
    assert identify(file).reason


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_FACTS = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "U8"]) | _JSON, "shape": _JSON, "data_offsets": _JSON}
)


@QUICK
@given(header=st.dictionaries(st.sampled_from([*FILES["esrgan"], "__metadata__", "a"]), _FACTS | _JSON, max_size=5))
def test_any_json_gets_an_answer(tmp_path: Path, header: dict[str, Any]) -> None:
    """Headers of the right form with any values in it."""
    identify(file_with(tmp_path, json.dumps(header).encode(), bytes(16)))


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
def test_a_flipped_byte_in_a_header_does_no_harm(tmp_path: Path, ending: str, data: st.DataObject) -> None:
    """A real header with any byte changed, or cut anywhere."""
    file = tmp_path / f"a{ending}"
    if ending == ".gguf":
        write_gguf(file, flux(double=1, single=1, width=256))
    else:
        write_safetensors(file, SMALL)
    content = bytearray(file.read_bytes()[:6000])
    at = data.draw(st.integers(0, min(len(content), 3000) - 1))
    content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    identify(file)


@pytest.mark.parametrize(
    ("tensors", "entries", "rest"),
    [
        (2**63, 0, b""),
        (0, 2**63, b""),
        (1, 0, struct.pack("<Q", 2**63)),
        (0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**62)),
        (0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**62)),
        (0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 3) * 40),
        (0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 99)),
        (1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31)),
        (1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 33, 8, 0)),
        (1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 32, 77, 0)),
        (1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<IQQQQQIQ", 5, *([2**63] * 5), 0, 0)),
    ],
)
def test_a_nonsense_gguf_header_is_refused(tmp_path: Path, tensors: int, entries: int, rest: bytes) -> None:
    """Counts and lengths beyond the file, lists in lists, unknown types, rows that are no whole blocks."""
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest + bytes(300))
    found = identify(file)
    assert (found.kind.value, bool(found.reason)) == ("unknown", True)


@pytest.mark.parametrize("size", [640, 1152])
def test_a_header_whose_length_begins_as_a_pickle_is_read(size: int, tmp_path: Path) -> None:
    """640 is 80 02 in a file, as are the first bytes of pickles; one of 4,096 checkpoints has such a header."""
    few = dict(list(FILES["vae-sd"].items())[:4])
    header, data = header_bytes(few)
    text = header[8:].ljust(size)
    found = identify(file_with(tmp_path, text, bytes(data)))
    assert "is of no known kind" in found.reason


INDEXES: dict[str, tuple[object, str]] = {
    "a climbing path": ({"a": "../../etc/passwd.safetensors"}, "no safetensors file beside it"),
    "an absolute path": ({"a": "/etc/hosts.safetensors"}, "no safetensors file beside it"),
    "a backslash": ({"a": "..\\x.safetensors"}, "is not there"),
    "a NUL": ({"a": "x\0.safetensors"}, "no safetensors file beside it"),
    "another ending": ({"a": "x.bin"}, "no safetensors file beside it"),
    "itself": ({"a": "m.safetensors.index.json"}, "no safetensors file beside it"),
    "a very long name": ({"a": "x" * 900 + ".safetensors"}, "cannot be read"),
    "a list": (["x.safetensors"], "lists no files"),
    "nothing": ({}, "lists no files"),
    "a number": ({"a": 5}, "no safetensors file beside it"),
    "a thousand files": ({str(n): f"{n}.safetensors" for n in range(1000)}, "which is too much"),
    "a shard that is not there": ({"a": "gone.safetensors"}, "gone.safetensors, which is not there"),
    "a shard that is a folder": ({"a": "folder.safetensors"}, "is a folder"),
    "a shard that is a pipe": ({"a": "pipe.safetensors"}, "is a device or a pipe"),
    "a shard that is no model": ({"a": "text.safetensors"}, "is not a safetensors file"),
    "the same tensors twice": ({"a": "one.safetensors", "b": "two.safetensors"}, "twice"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_shards_names_files_beside_it_only(name: str, tmp_path: Path) -> None:
    """Whatever it lists: a sentence, and no file elsewhere is opened."""
    listed, sentence = INDEXES[name]
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "text.safetensors").write_text("a text of some length")
    for shard in ("one", "two"):
        write_safetensors(tmp_path / f"{shard}.safetensors", {"a": (1,)})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    found = identify(index)
    assert found.kind.value == "unknown"
    assert sentence in found.reason
    assert len(found.reason) < 400


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes_as_an_index_give_an_answer(tmp_path: Path, data: bytes) -> None:
    """Also JSON that is nested deeper than Python can read."""
    index = tmp_path / "m.safetensors.index.json"
    index.write_bytes(data)
    assert identify(index).kind.value == "unknown"
    index.write_text("[" * 100_000)
    assert "is not JSON" in identify(index).reason


def test_metadata_of_many_shards_are_not_kept(tmp_path: Path) -> None:
    """Twelve files with 4 MB of metadata each: the memory is that of a few, not of all."""
    metadata = {"__metadata__": {f"{n}": "x" * 1_000_000 for n in range(4)}}
    listed = {f"t{n}": f"{n}.safetensors" for n in range(12)}
    for name, file in listed.items():
        header = json.dumps({**metadata, name: tensor()}).encode()
        (tmp_path / file).write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    tracemalloc.start()
    try:
        assert len(read_shards(index).shapes) == 12
        assert tracemalloc.get_traced_memory()[1] < 36_000_000
    finally:
        tracemalloc.stop()
