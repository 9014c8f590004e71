"""Reads the tensors of a safetensors or GGUF file, with packed weights left packed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stable_diffusion_server.pipelines.library.gguf_header import GGUF, GgufHeader, GgufTensor, read_gguf_header
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.loading.gguf_blocks import UNPACKERS
from stable_diffusion_server.pipelines.loading.packed_weights import FLOAT8, PackedWeight
from stable_diffusion_server.pipelines.loading.scaled_fp8 import pack_float8
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError, read_header, shown

_DTYPES = {
    **FLOAT8,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MADV_DONTNEED = 4
_PLAIN = {"F32": torch.float32, "F16": torch.float16}

Tensors = dict[str, torch.Tensor | PackedWeight]


def read_tensors(*files: Path, meta: bool = False) -> Tensors:
    """The tensors of files by name, memory-mapped; with `meta`, only shapes and dtypes (on torch's meta device).

    Matrices in float8 and in GGUF's block formats are `PackedWeight`. Raises `WeightFileError`.
    """
    if files[0].suffix == GGUF:
        return _read_gguf(files[0], meta=meta)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:  # together, since the scale of a weight may be in another shard
        tensors.update(_read_plain(file, meta=meta))
    return pack_float8(tensors)


def _read_gguf(file: Path, *, meta: bool) -> Tensors:
    tensors = read_gguf_file(file).tensors
    if meta:
        return {name: _packed(tensor, _empty(tensor)) for name, tensor in tensors.items()}
    try:
        whole = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise WeightFileError(f"{shown(file)} cannot be read") from error
    return {name: _packed(tensor, whole[tensor.start : tensor.start + tensor.size]) for name, tensor in tensors.items()}


def _read_plain(file: Path, *, meta: bool) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file as they are stored."""
    header = read_header(file)
    if meta:
        unknown = sorted({str(facts.get("dtype")) for facts in header.values()} - _DTYPES.keys())
        if unknown:
            raise WeightFileError(f"{shown(file)} holds weights of the type {unknown[0][:20]}, which is not read")
        return {
            name: torch.empty(facts["shape"], dtype=_DTYPES[facts["dtype"]], device="meta")
            for name, facts in header.items()
        }
    try:
        read: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightFileError(f"{shown(file)} cannot be read ({error})") from error
    return read


def read_gguf_file(file: Path) -> GgufHeader:
    """The header of a GGUF file, with the lists of its metadata.

    Raises `WeightFileError`, also for types of weights that cannot be unpacked.
    """
    try:
        header = read_gguf_header(file, lists=True)
    except UnreadableModel as error:
        raise WeightFileError(f"{shown(file)} {error}") from error
    for name, tensor in header.tensors.items():
        if tensor.format not in (*_PLAIN, *UNPACKERS):
            raise WeightFileError(
                f"{shown(file)} holds {name} as {tensor.format}, which is not read; there are "
                f"{', '.join((*_PLAIN, *UNPACKERS))}"
            )
    return header


def forget_pages(file: Path) -> None:
    """Drop the pages of a mapped file from this process; a later access reads them again. Does nothing but on Linux.

    Otherwise a load holds the whole file beside what was made of it: 6.5 GB for SDXL. The mappings must not have been
    written to.
    """
    if sys.platform != "linux":
        return
    path = str(file.resolve())
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == path:
            first, last = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def shapes_of(tensors: Mapping[str, torch.Tensor | PackedWeight]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by name, unpacked."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _empty(tensor: GgufTensor) -> torch.Tensor:
    return torch.empty(tensor.size, dtype=torch.uint8, device="meta")


def _packed(tensor: GgufTensor, raw: torch.Tensor) -> torch.Tensor | PackedWeight:
    """The tensor as its type says; block formats other than matrices are unpacked."""
    if tensor.format in _PLAIN:
        # A copy, since the bytes may lie at an address that is no multiple of the dtype's size.
        return raw.clone().view(_PLAIN[tensor.format]).reshape(tensor.shape)
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    packed = PackedWeight(raw.reshape(rows, -1), tensor.format)
    return packed if len(tensor.shape) == 2 else packed.unpack(torch.float32).reshape(tensor.shape)
