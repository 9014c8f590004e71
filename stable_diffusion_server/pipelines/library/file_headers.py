"""Reads the header of a safetensors file strictly, in bounded time and memory, and recognises other files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import prod
from operator import mul
from pathlib import Path
from typing import Any, BinaryIO

from stable_diffusion_server.pipelines.library.identity import UnreadableModel

# The format allows 100 MB. Checkpoints have 0.4 MB, LoRAs with much training metadata a few MB.
MAX_HEADER_BYTES = 16 * 2**20
_FORMAT_LIMIT = 100_000_000
MAX_TENSORS = 65_536
# Lists and objects, those within metadata texts included; bounds the memory that parsing takes.
_MAX_BRACKETS = 1_000_000
_MAX_SIDES, _MAX_NUMBER = 16, 2**48
MAX_JSON_BYTES = 2 * 2**20
_MAX_METADATA, _MAX_METADATA_LENGTH = 64, 2000

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

# First bytes of files that are no safetensors file, and what they are.
_BEGINNINGS = (
    (b"version https://git-lfs", "is a pointer of git-lfs and not the file itself; `git lfs pull` fetches it"),
    (b"PK\x03\x04", "is a pickle under another name; only safetensors and GGUF files are read"),
    (b"\x80\x02", "is a pickle under another name; only safetensors and GGUF files are read"),
    (b"\x80\x04", "is a pickle under another name; only safetensors and GGUF files are read"),
    (b"GGUF", "is a GGUF file under another name; name it .gguf"),
    (b"<!DOC", "is a web page and not a model; the download needs a login or another address"),
    (b"<!doc", "is a web page and not a model; the download needs a login or another address"),
    (b"<html", "is a web page and not a model; the download needs a login or another address"),
    (b"{\"", "is a text in JSON and not a model"),
    (b"\x1f\x8b", "is a compressed archive and not a model"),
    (b"Rar!", "is a compressed archive and not a model"),
)  # fmt: skip
_PICKLED = 0x80
_TRAINER = frozenset(
    "ss_base_model_version ss_sd_model_name ss_network_module ss_network_dim ss_network_alpha ss_v2 ss_clip_skip "
    "ss_output_name sshash_model_hash format prediction_type".split()
)


@dataclass(frozen=True)
class TensorHeader:
    """The tensors of a file by name, and its metadata, without the weights.

    Attributes:
        shapes: Name → shape, in PyTorch's order.
        amounts: Type → bytes of all tensors of that type; for GGUF the number of their elements.
        metadata: All texts of the file's metadata, unbounded; show `shown_metadata` only.
        container: `safetensors` or `gguf`.
    """

    shapes: Mapping[str, Sequence[int]]
    amounts: Mapping[str, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
    container: str = "safetensors"

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def side(self, name: str, axis: int) -> int:
        """One side of a tensor's shape; 0 if there is no such tensor or axis."""
        shape = self.shapes.get(name, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    @cached_property
    def heads(self) -> frozenset[str]:
        """The first parts of all names."""
        return frozenset(name.partition(".")[0] for name in self.shapes)

    @cached_property
    def tails(self) -> frozenset[str]:
        """The last one and two parts of all names, as dotted texts."""
        tails: set[str] = set()
        for name in self.shapes:
            start, _, last = name.rpartition(".")
            tails.add(last)
            tails.add(f"{start.rpartition('.')[2]}.{last}")
        return frozenset(tails)


@contextmanager
def opened_file(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file; yields it and its size in bytes. Never blocks on a pipe. Raises `UnreadableModel`."""
    try:
        _check_regular(os.stat(file))
        source = os.fdopen(os.open(file, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)), "rb")
    except OSError as error:
        raise UnreadableModel(_why_not_opened(file, error)) from error
    with source:
        facts = os.fstat(source.fileno())
        _check_regular(facts)
        try:
            yield source, facts.st_size
        except OSError as error:
            raise UnreadableModel(f"cannot be read ({error.strerror})") from error


def _why_not_opened(file: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is a link that leads nowhere" if file.is_symlink() else "is not there"
    return f"cannot be read ({error.strerror})"


def _check_regular(facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise UnreadableModel("is a folder" if stat.S_ISDIR(facts.st_mode) else "is a device or a pipe, not a file")
    if not facts.st_size:
        raise UnreadableModel("is empty")


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; false if that cannot be found out, as with a name that is too long."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether a file, a folder or a link is at a path; false if that cannot be found out."""
    try:
        return path.exists() or path.is_symlink()
    except OSError:
        return False


def read_safetensors(file: Path) -> TensorHeader:
    """Read and check the header of a safetensors file. Raises `UnreadableModel`."""
    with opened_file(file) as (source, size):
        beginning = source.read(32)
        for lead, reason in _BEGINNINGS:
            # The length of a header of 640 bytes begins as a pickle does; a brace follows only in a header.
            if beginning.startswith(lead) and (lead[0] != _PICKLED or beginning[8:9] != b"{"):
                raise UnreadableModel(reason)
        length = int.from_bytes(beginning[:8], "little")
        if len(beginning) < 10 or length > _FORMAT_LIMIT or beginning[8:9] != b"{":
            raise UnreadableModel(f"is not a safetensors file ({size:,} bytes)")
        if length > size - 8:
            raise UnreadableModel(f"is truncated within its header: {size:,} of {8 + length:,} bytes or more are there")
        if length > MAX_HEADER_BYTES:
            raise UnreadableModel(f"has a header of {length:,} bytes, and {MAX_HEADER_BYTES:,} are read")
        source.seek(8)
        text = source.read(length)
    return parse_safetensors(text, size - 8 - length)


def parse_safetensors(text: bytes, data_bytes: int) -> TensorHeader:
    """Parse a header of a file with `data_bytes` bytes of tensors after it. Raises `UnreadableModel`."""
    if text.count(b"[") + text.count(b"{") > _MAX_BRACKETS:
        raise UnreadableModel("has a header with too many lists")
    parsed = _load_object(text)
    metadata = parsed.pop("__metadata__", {})
    if len(parsed) > MAX_TENSORS:
        raise UnreadableModel(f"has {len(parsed):,} tensors, and {MAX_TENSORS:,} are read")
    return TensorHeader(*_check_tensors(parsed, data_bytes), _check_metadata(metadata))


def _load_object(text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
        if isinstance(parsed, dict) and not _surely_unique(text, len(parsed) - ("__metadata__" in parsed)):
            parsed = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UnreadableModel("has a header that is not JSON") from error
    if not isinstance(parsed, dict):
        raise UnreadableModel("has a header that is not a JSON object")
    return parsed


def _surely_unique(text: bytes, tensors: int) -> bool:
    """Whether no tensor name can occur twice: each tensor has one `dtype`, written without escapes.

    Counting takes a tenth of the time of a hook that is called for each of thousands of objects.
    """
    return text.count(b'"dtype"') == tensors and b"\\u" not in text and text.count(b'"__metadata__"') <= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnreadableModel("has a header that gives a name twice")
    return found


def _check_tensors(parsed: dict[str, Any], data_bytes: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Shapes by name, and bytes by type. All tensors are checked at once, which is several times faster."""
    try:
        shapes = {name: facts["shape"] for name, facts in parsed.items()}
        dtypes = [facts["dtype"] for facts in parsed.values()]
        spans = [facts["data_offsets"] for facts in parsed.values()]
        if not _are_lists_of_numbers(shapes.values(), _MAX_SIDES) or not _are_lists_of_numbers(spans, 2):
            raise UnreadableModel("has a header with shapes or offsets that are nonsense")
        sizes = [end - begin for begin, end in spans]
        bits = list(map(mul, map(prod, shapes.values()), map(BITS.__getitem__, dtypes)))
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableModel("has a header that is nonsense") from error
    if [8 * size for size in sizes] != bits:
        wrong = next(name for name, size, bit in zip(shapes, sizes, bits, strict=True) if 8 * size != bit)
        raise UnreadableModel(f"has a header whose sizes are nonsense at {shown(wrong)}")
    _check_spans(spans, data_bytes)
    amounts: dict[str, int] = {}
    for dtype, size in zip(dtypes, sizes, strict=True):
        amounts[dtype] = amounts.get(dtype, 0) + size
    return shapes, amounts


def _are_lists_of_numbers(lists: Collection[Any], most: int) -> bool:
    """Whether these are lists of up to `most` whole numbers each, none of them negative or absurd."""
    if not set(map(type, lists)) <= {list} or max(map(len, lists), default=0) > most:
        return False
    numbers = list(chain.from_iterable(lists))
    return set(map(type, numbers)) <= {int} and (not numbers or (min(numbers) >= 0 and max(numbers) <= _MAX_NUMBER))


def _check_spans(spans: list[list[int]], data_bytes: int) -> None:
    """The tensors must follow one another without gap or overlap, and end with the file, as the format says."""
    spans = sorted(spans)
    begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
    if begins != [0, *ends[:-1]][: len(begins)]:
        raise UnreadableModel("has a header whose tensors overlap or leave gaps")
    last = ends[-1] if ends else 0
    if last > data_bytes:
        raise UnreadableModel(f"is truncated: {data_bytes:,} of {last:,} bytes of tensors are there")
    if last < data_bytes:
        raise UnreadableModel(f"has {data_bytes - last:,} bytes after its last tensor")


def _check_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnreadableModel("has metadata that is not a list of texts")
    return metadata


def shown_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that say what a model is, cut to a bounded length."""
    kept = {name: text for name, text in metadata.items() if name.startswith("modelspec.") or name in _TRAINER}
    chosen = sorted(kept.items())[:_MAX_METADATA]
    # Thumbnails are pictures in base64.
    return {shown(name): shown(text, _MAX_METADATA_LENGTH) for name, text in chosen if not name.endswith(".thumbnail")}


def shown(text: str, most: int = 100) -> str:
    """A text of a file as it may be printed: one line, no control characters, no lone surrogates, bounded."""
    cut = text[:most]
    printable = cut if cut.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in cut)
    return printable + ("…" if len(text) > most else "")


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a small JSON object, such as a configuration. Raises `UnreadableModel`."""
    with opened_file(file) as (source, size):
        if size > MAX_JSON_BYTES:
            raise UnreadableModel(f"has {size:,} bytes, and {MAX_JSON_BYTES:,} are read of a configuration")
        text = source.read(MAX_JSON_BYTES + 1)
    if text.startswith(_BEGINNINGS[0][0]):
        raise UnreadableModel(_BEGINNINGS[0][1])
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableModel("is not JSON") from error
    if not isinstance(parsed, dict):
        raise UnreadableModel("is not a JSON object")
    return parsed
