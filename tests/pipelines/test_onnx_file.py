"""The walk through an ONNX file before it is read: whole networks pass, and no bytes make the walk fail otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import vision_files
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from stable_diffusion_server.pipelines.vision.onnx_file import RefusedFile, check_onnx


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A network with weights, a loop with a body, and metadata."""
    folder = tmp_path_factory.mktemp("networks")
    model = onnx.load_model_from_string(vision_files.endless(folder / "loop.onnx").read_bytes())
    weights = np.arange(2000, dtype=np.float32).reshape(20, 100)
    model.graph.initializer.append(numpy_helper.from_array(weights, "big"))
    model.metadata_props.add(key="names", value="{0: 'a'}")
    return model.SerializeToString()


def outcome(data: bytes) -> str:
    try:
        check_onnx(data)
    except RefusedFile as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", sorted({"FLOAT", "FLOAT16", "INT64", "INT4", "BOOL", "STRING", "DOUBLE", "BFLOAT16"}))
def test_tensors_of_every_type_pass(tmp_path: Path, kind: str) -> None:
    """As raw bytes and as typed values, empty ones and scalars too."""
    number = getattr(TensorProto, kind)
    for shape in ([], [0], [3, 5], [1, 1, 1]):
        count = int(np.prod(shape))
        values = [b"x"] * count if kind == "STRING" else [1] * count
        tensor = helper.make_tensor("t", number, shape, values)
        model = onnx.load_model_from_string(vision_files.weighted_channels(tmp_path / "a.onnx", (1, 1, 1)).read_bytes())
        model.graph.initializer.append(tensor)
        assert outcome(model.SerializeToString()) == ""


def test_the_network_passes_whole_and_is_refused_cut(network: bytes) -> None:
    """Every shorter beginning lacks something, unless only trailing fields of the model are cut."""
    assert outcome(network) == ""
    refused = [outcome(network[:length]) for length in range(0, len(network) - 200, 97)]
    assert all(refused)
    assert all(sentence.startswith("It ") and sentence.endswith(".") for sentence in refused)


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_any_bytes_pass_or_are_refused(data: bytes) -> None:
    """Nothing else is raised."""
    outcome(data)


@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_network_with_changed_bytes_passes_or_is_refused(network: bytes, changes: list[tuple[float, int]]) -> None:
    """As bits flip on a disk, or as an attacker sets them."""
    data = bytearray(network)
    for place, value in changes:
        data[int(place * len(data))] = value
    outcome(bytes(data))


def test_nesting_and_numbers_are_bounded() -> None:
    """Graphs in attributes of nodes of graphs, 60 deep; tensors of 17 sides; sides near 2 to the 64."""

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        parts = []
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    graph = b""
    for _ in range(60):
        graph = field(1, field(5, field(6, graph)))
    assert "deeper" in outcome(b"\x08\x09" + field(7, graph))
    for sides in ([1] * 17, [2**64 - 1], [2**32, 2**32, 2**32]):
        tensor = b"".join(varint(1 << 3) + varint(side) for side in sides)
        assert "larger tensors" in outcome(b"\x08\x09" + field(7, field(5, tensor)))
        packed = field(1, b"".join(varint(side) for side in sides))
        assert "larger tensors" in outcome(b"\x08\x09" + field(7, field(5, packed)))
    assert "not an ONNX file" in outcome(b"\x08\x09" + b"\x3b\x3c")  # a group, which ONNX has none of
