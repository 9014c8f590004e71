"""Reads LoRA files: header, content and digest; says why a file cannot be used."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stable_diffusion_server.errors import ModelLoadError

LARGEST_BYTES = 4 * 2**30
# A few megabytes of header are usually a trainer's metadata; parsing holds Python's lock.
LARGEST_HEADER = 8 * 2**20
_ANY_HEADER = 100_000_000
_POINTER = b"version https://git-lfs"

# First parts of tensor names in LoRA files for a UNet, and for a transformer.
_UNET = (
    "unet. lora_unet_down_blocks lora_unet_mid_block lora_unet_up_blocks lora_unet_input_blocks lora_unet_middle_block "
    "lora_unet_output_blocks lora_unet_time_embed lora_unet_label_emb lora_unet_conv_ lora_unet_out_ "
    "diffusion_model.input_blocks diffusion_model.middle_block diffusion_model.output_blocks "
    "diffusion_model.time_embed diffusion_model.label_emb diffusion_model.out."
)
_TRANSFORMER = (
    "transformer. lora_transformer_ diffusion_model. double_blocks. single_blocks. base_model.model. "
    "lora_unet_double_blocks lora_unet_single_blocks lora_unet_final_layer lora_unet_img_in lora_unet_txt_in "
    "lora_unet_time_in lora_unet_vector_in lora_unet_guidance_in"
)
DENOISERS = {"unet": tuple(_UNET.split()), "transformer": tuple(_TRANSFORMER.split())}
_OTHER_KINDS = {".oft_": "OFT", ".on_input": "IA3", ".a1.": "GLoRA", ".boft_": "BOFT", ".vera_": "VeRA"}
_MARKS = ("lora", "lycoris", ".hada_", ".lokr_", ".diff")


class LoraIdentity(NamedTuple):
    """Identifies a file's content: if one of these fields changes, the content may have changed."""

    device: int
    inode: int
    size: int
    changed_ns: int
    status_changed_ns: int


class LoraHeader(NamedTuple):
    """Tensor name → `dtype`, `shape` and `data_offsets`; `notes` is the file's `__metadata__`."""

    tensors: dict[str, dict[str, Any]]
    notes: dict[str, str]


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file in memory. `digest` is the first 16 hexadecimal digits of the SHA-256 of `data`."""

    name: str
    identity: LoraIdentity
    digest: str
    header: LoraHeader
    data: bytes = field(repr=False)


@contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a regular file for reading; yields the file and its `stat` result.

    Follows links. Refuses pipes and devices and never blocks on one. Raises `ModelLoadError` with the file and the
    reason.
    """
    try:
        _check_regular(file.name, os.stat(file))
        source = os.fdopen(os.open(file, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)), "rb")
    except OSError as error:
        dangling = isinstance(error, FileNotFoundError) and file.is_symlink()
        why = "is a link to a file that is not there" if dangling else f"cannot be read: {error.strerror}"
        raise ModelLoadError(f"{file.name} {why}.") from error
    with source:
        facts = os.fstat(source.fileno())
        _check_regular(file.name, facts)
        yield source, facts


def _check_regular(name: str, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a device or a pipe"
        raise ModelLoadError(f"{name} is {kind}, not a file.")


def read_header(file: Path) -> Mapping[str, Any]:
    """Read the header of a safetensors file: tensor name → `dtype`, `shape` and `data_offsets`.

    Raises `ModelLoadError` when it is not a safetensors file, or is shorter than its header says.
    """
    with opened(file) as (source, facts):
        return header_of(source, facts.st_size, file.name, _ANY_HEADER).tensors


def header_of(source: BinaryIO, size: int, name: str, limit: int = LARGEST_HEADER) -> LoraHeader:
    """Read the header at the beginning of `source`, a file of `size` bytes. Raises `ModelLoadError`."""
    try:
        begins = source.read(len(_POINTER))
        if begins == _POINTER:
            raise ModelLoadError(f"{name} is a pointer of git-lfs; the weights themselves were not fetched.")
        length = int.from_bytes(begins[:8], "little")
        if limit < length < size - 8:
            raise ModelLoadError(f"{name} has a header of {length} bytes, and {limit} are taken.")
        # A length out of bounds reads no bytes, which is invalid JSON.
        read = json.loads(begins[8:] + source.read(length + 8 - len(begins)) if 8 < length <= limit else b"")
        notes = read.pop("__metadata__", None)
        end = max((_end_of(facts) for facts in read.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{name} is not a safetensors file.") from error
    if size < 8 + length + end:
        raise ModelLoadError(f"{name} is truncated: {size} of {8 + length + end} bytes are there.")
    return LoraHeader(read, notes if isinstance(notes, dict) else {})


def _end_of(facts: Any) -> int:
    """End offset of a tensor's bytes. Raises `ValueError`, `KeyError` or `TypeError` if the entry is malformed."""
    first, last = facts["data_offsets"]
    if not isinstance(facts["dtype"], str) or not all(isinstance(side, int) and side >= 0 for side in facts["shape"]):
        raise ValueError(facts)
    if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last):
        raise ValueError(facts)
    return last


def read_lora(file: Path, largest: int = LARGEST_BYTES) -> LoraFile:
    """Read a LoRA file into memory, once. Raises `ModelLoadError`."""
    with opened(file) as (source, facts):
        check_lora(source, facts, file.name, largest)
        source.seek(0)
        data = source.read(facts.st_size)
        if len(data) != facts.st_size or identity_of(os.fstat(source.fileno())) != identity_of(facts):
            raise ModelLoadError(f"{file.name} is being written to at this moment; ask again.")
    header = header_of(io.BytesIO(data), len(data), file.name)
    return LoraFile(file.name, identity_of(facts), hashlib.sha256(data).hexdigest()[:16], header, data)


def digest_of(file: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file."""
    with opened(file) as (source, _):
        return hashlib.file_digest(source, "sha256").hexdigest()[:16]  # type: ignore[arg-type]  # it is a binary file


def identity_of(facts: os.stat_result) -> LoraIdentity:
    """The identity of a file's content."""
    return LoraIdentity(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def reason_unusable(header: LoraHeader) -> str:
    """Why these tensors are not a usable LoRA, as the end of a sentence; empty if they may be one."""
    names = header.tensors
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in name for name in names):
            return f"is a {kind}, and only LoRA, LoCon, LoHa, LoKr and DoRA are taken here"
    if control := _of_a_control_lora(names):
        return (
            "is a control LoRA, which would change the input of the shared Flux transformer; use an ordinary LoRA, or "
            f"a ControlNet for edges. Its tensor {control[:100]!a} has the shape {names[control]['shape'][:4]}"
        )
    if not any(mark in name for name in names for mark in _MARKS):
        return f"holds no LoRA; its tensors are named like {next(iter(names), 'nothing')[:60]!a}"
    return ""


def _of_a_control_lora(names: Iterable[str]) -> str:
    """The name of a tensor that marks a Flux control LoRA (Black Forest Labs' format); empty if there is none.

    A control LoRA widens the transformer's input in place, to take edges beside the latents. That would break all
    other requests of the model. Ordinary LoRAs do not change the input's width.
    """
    for name in names:
        part, _, kind = name.rpartition(".lora_A.")
        embeds_input = kind == "weight" and part.rpartition(".")[2] in ("x_embedder", "img_in")
        if embeds_input or "query_norm.scale" in name:
            return name
    return ""


def denoisers_of(header: LoraHeader) -> Collection[str]:
    """The denoisers (`unet`, `transformer`) that the tensors may belong to, according to their names."""
    kinds = (
        next((kind for kind, begins in DENOISERS.items() if name.startswith(begins)), "") for name in header.tensors
    )
    return {kind for kind in kinds if kind} or DENOISERS


def check_lora(source: BinaryIO, facts: os.stat_result, name: str, largest: int) -> LoraHeader:
    """Read the header and check that the file may be a LoRA. Raises `ModelLoadError`."""
    if facts.st_size > largest:
        raise ModelLoadError(f"{name} has {facts.st_size} bytes, and MAX_LORA_BYTES is {largest}.")
    header = header_of(source, facts.st_size, name)
    if why := reason_unusable(header):
        raise ModelLoadError(f"{name} {why}.")
    return header
