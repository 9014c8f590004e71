"""Reads the headers of a model in several safetensors files (shards), which an index beside them lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from stable_diffusion_server.pipelines.library.file_headers import (
    MAX_TENSORS,
    TensorHeader,
    read_json_object,
    read_safetensors,
    shown,
)
from stable_diffusion_server.pipelines.library.identity import UnreadableModel

_MAX_SHARDS = 256
_INDEX = re.compile(r".+?(?P<ending>\.safetensors(\.[A-Za-z0-9]{1,20})?\.index(\.[A-Za-z0-9]{1,20})?\.json)")
_SHARD = re.compile(r"(?P<name>.+?)(?P<variant>\.[A-Za-z0-9]{1,20})?-\d{5}-of-\d{5}\.safetensors")


def index_ending(name: str) -> str:
    """The ending of the name of an index, such as `.safetensors.index.fp16.json`; empty for another file."""
    found = _INDEX.fullmatch(name)
    return found["ending"] if found else ""


def indexes_of_shard(name: str) -> tuple[str, ...]:
    """The names that the index of a shard may have, by the shard's name; none for a file that is no shard."""
    found = _SHARD.fullmatch(name)
    if found is None:
        return ()
    start, variant = found["name"], found["variant"] or ""
    return (
        f"{start}{variant}.safetensors.index.json",
        f"{start}.safetensors.index{variant}.json",
        f"{start}.safetensors{variant}.index.json",
    )


def with_shards(file: Path) -> tuple[Path, ...]:
    """A weight file; for an index also the files that it lists, as far as it can be read."""
    if index_ending(file.name):
        with suppress(UnreadableModel):
            return (file, *shards_of(file))
    return (file,)


def shards_of(index: Path) -> list[Path]:
    """The files that an index lists, sorted; all lie beside it. Raises `UnreadableModel`."""
    listed = read_json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UnreadableModel("lists no files")
    names = sorted({str(name)[:1000] for name in listed.values()})
    if len(names) > _MAX_SHARDS or len(listed) > MAX_TENSORS:
        raise UnreadableModel(f"lists {len(names):,} files of {len(listed):,} tensors, which is too much")
    for name in names:
        if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise UnreadableModel(f"lists {shown(name)!r}, which is no safetensors file beside it")
    return [index.parent / name for name in names]


def read_shards(index: Path) -> TensorHeader:
    """The tensors of all files that an index lists. Raises `UnreadableModel`, naming the file that is wrong."""
    headers = list[TensorHeader]()
    for file in shards_of(index):
        try:
            header = read_safetensors(file)
        except UnreadableModel as error:
            raise UnreadableModel(f"lists {shown(file.name)}, which {error}") from error
        # Only the first one's metadata count; 256 files may hold 4 GB of them.
        headers.append(replace(header, metadata={}) if headers else header)
        if sum(len(header.shapes) for header in headers) > MAX_TENSORS:
            raise UnreadableModel(f"lists files of more than {MAX_TENSORS:,} tensors")
    return _merged(headers)


def _merged(headers: Sequence[TensorHeader]) -> TensorHeader:
    shapes: dict[str, Sequence[int]] = {}
    amounts: dict[str, int] = {}
    for header in headers:
        if twice := shapes.keys() & header.shapes.keys():
            raise UnreadableModel(f"lists files that hold {shown(min(twice))} twice")
        shapes.update(header.shapes)
        for dtype, amount in header.amounts.items():
            amounts[dtype] = amounts.get(dtype, 0) + amount
    return TensorHeader(shapes, amounts, headers[0].metadata)
