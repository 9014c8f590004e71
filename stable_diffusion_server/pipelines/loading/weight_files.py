"""Finds the weight files of a model's components and checks them before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_diffusion_server.pipelines.stock_classes import stock_class

SAFETENSORS = ".safetensors"
# Weight files that are not read: most are pickles, which execute code.
OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".gguf", ".onnx", ".onnx_data", ".pb")
# Configurations and tokenizers; images depend on them.
TEXTS = (".json", ".txt", ".model", ".jinja")
INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
# First part of the names of weight files, by the library that writes them.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
# The variant of weight files in half precision.
HALF = "fp16"

_HEADER_LIMIT = 100_000_000
_POINTER = b"version https://git-lfs"
_PICKLE = b"\x80\x02"
_LEADS = (
    (_POINTER, "is a pointer of git-lfs and not the file itself; `git lfs pull` in its folder fetches it"),
    (b"PK\x03\x04", "is a pickle under another name; only safetensors files are read"),
    (_PICKLE, "is a pickle under another name; only safetensors files are read"),
    (b"GGUF", "is a GGUF file under another name; only safetensors files are read"),
    (b"<!DOC", "is a web page and not weights"),
    (b"<html", "is a web page and not weights"),
)
# Last part of the names of tensors with scales of quantized weights.
_FACTORS = ("scale_weight", "weight_scale", "scaled_fp8", "SCB", "absmax", "quant_map", "qweight", "qzeros")
_WHOLE = ("I8", "U8")
# Parts of blocks that are for requests which are not drawn here.
_UNUSED_BLOCKS = ("controlnet", "control_image_processor", "image_encoder", "feature_extractor")


class WeightFileError(Exception):
    """A file cannot be used. The message names it and the reason, without a full stop."""


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A component of a model as its index lists it: library and class."""

    name: str
    library: str
    kind: str

    @property
    def has_weights(self) -> bool:
        """Whether it has weight files; schedulers, guiders, processors and tokenizers have only text files."""
        if self.library == "diffusers":
            return self.name not in ("guider", "ocr_guider") and not self.kind.endswith(("Scheduler", "Processor"))
        return not any(word in self.kind for word in ("Tokenizer", "Processor", "FeatureExtractor"))

    @property
    def stem(self) -> str:
        """First part of the names of its weight files."""
        return TRANSFORMERS if self.library == "transformers" else DIFFUSERS


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a component, the index of the shards first if there is one, and their variant."""

    variant: str | None
    files: tuple[Path, ...]


def parts_of(folder: Path) -> list[WeightPart]:
    """The components listed in the index of a model's folder. Raises `WeightFileError`."""
    file = index_of(folder)
    index = read_json(file)
    unused = unused_parts(str(index.get("_class_name")))
    listed = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    if file.name == MODULAR_INDEX:
        listed = _listed_of_blocks(folder, index)
    listed = {name: value for name, value in listed.items() if name not in unused}
    parts = [WeightPart(name, str(value[0]), str(value[1])) for name, value in listed.items() if None not in value]
    if not parts:
        raise WeightFileError(f"{INDEX} lists no parts")
    return parts


def index_of(folder: Path) -> Path:
    """The index of a pipeline's folder; that of a pipeline of blocks where there is no other."""
    modular = folder / MODULAR_INDEX
    return modular if modular.is_file() and not (folder / INDEX).is_file() else folder / INDEX


def _listed_of_blocks(folder: Path, index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Library and class of each part that is in the folder, whatever place the index names for it."""
    listed = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 3 and Path(name).name == name and (folder / name).is_dir():
            hint = value[2].get("type_hint") if isinstance(value[2], dict) else None
            hinted = hint if isinstance(hint, list) and len(hint) == 2 else [None, None]
            listed[name] = value[:2] if None not in value[:2] else hinted
    return {name: value for name, value in listed.items() if name not in _UNUSED_BLOCKS}


def unused_parts(pipeline_class: str) -> dict[str, Any]:
    """Arguments of a pipeline class that leave out what is not used: what judges or marks pictures."""
    known = stock_class(pipeline_class)
    return {name: False if name.startswith("requires_") else None for name in (known.unused if known else ())}


def check_pipeline_folder(folder: Path, variant: str | None = "fp16") -> None:
    """Raise `WeightFileError` if a part of a pipeline's folder is missing, damaged or of a format that is not read."""
    for part in parts_of(folder):
        if part.has_weights:
            check_part(folder / part.name, part.stem, variant)
        else:
            check_texts(folder / part.name)


def weight_files(folder: Path, stem: str, variant: str | None) -> WeightFiles:
    """The weight files of a component: those of `variant`, else the plain ones, else those in half precision.

    Raises `WeightFileError` naming what it found.
    """
    for wanted in dict.fromkeys((variant, None, HALF)):
        for name in _names(stem, wanted):
            file = folder / name
            if file.is_file() or file.is_symlink():
                shards = _shards(folder, file) if name.endswith(".json") else []
                return WeightFiles(wanted, (file, *shards))
    raise WeightFileError(_what_is_there(folder, stem))


def check_part(folder: Path, stem: str, variant: str | None) -> WeightFiles:
    """The weight files of a component, checked to be complete and of a supported format. Raises `WeightFileError`."""
    check_texts(folder)
    config = read_json(folder / "config.json")
    if isinstance(quantized := config.get("quantization_config"), dict):
        method = quantized.get("quant_method", "another program")
        raise WeightFileError(
            f"{shown(folder)} is quantized by {method}, which is not read here; take the plain weights, and QUANTIZE"
        )
    if "transformers_weights" in config:
        raise WeightFileError(f"{shown(folder / 'config.json')} names a weight file of its own, which is not followed")
    found = weight_files(folder, stem, variant)
    for file in found.files:
        if file.suffix == SAFETENSORS:
            check_weights(file)
    return found


def check_weights(file: Path) -> None:
    """Raise `WeightFileError` if a file is not safetensors, is truncated, or holds quantized weights."""
    tensors = read_header(file)
    factors = [name for name in tensors if name.rpartition(".")[2] in _FACTORS]
    sizes = {name: facts["data_offsets"][1] - facts["data_offsets"][0] for name, facts in tensors.items()}
    whole = sum(size for name, size in sizes.items() if tensors[name].get("dtype") in _WHOLE)
    if factors or 2 * whole > sum(sizes.values()) > 0:
        kind = f"{factors[0]} among them" if factors else "whole numbers"
        raise WeightFileError(
            f"{shown(file)} holds quantized weights ({kind}), which are not read; take the plain ones"
        )


def read_header(file: Path) -> Mapping[str, Any]:
    """Read a safetensors header: tensor name → `dtype`, `shape`, `data_offsets`. Raises `WeightFileError`."""
    size = check_there(file)
    try:
        with file.open("rb") as source:
            start = source.read(len(_POINTER))
            for lead, reason in _LEADS:
                # The length of a header of 640 bytes begins as a pickle does; a brace follows only in a header.
                if start.startswith(lead) and (lead != _PICKLE or start[8:9] != b"{"):
                    raise WeightFileError(f"{shown(file)} {reason}")
            length = int.from_bytes(start[:8], "little")
            source.seek(8)
            # A length out of bounds reads no bytes, which is invalid JSON.
            header = json.loads(source.read(length if length <= min(_HEADER_LIMIT, size) else 0))
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        end = max((int(facts["data_offsets"][1]) for facts in tensors.values()), default=0)
    except OSError as error:
        raise WeightFileError(f"{shown(file)} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise WeightFileError(f"{shown(file)} is not a safetensors file, or not all of it ({size:,} bytes)") from error
    if size < 8 + length + end:
        raise WeightFileError(f"{shown(file)} is truncated: {size:,} of {8 + length + end:,} bytes are there")
    return tensors


def check_there(file: Path) -> int:
    """The size of a file in bytes; follows links. Raises `WeightFileError` if it is missing, empty or not a file."""
    try:
        size = file.stat().st_size
    except OSError as error:
        leads = "is a link that leads nowhere" if file.is_symlink() else f"cannot be read ({error.strerror})"
        raise WeightFileError(f"{shown(file)} {leads}") from error
    if not file.is_file():
        raise WeightFileError(f"{shown(file)} is not a file")
    if not size:
        raise WeightFileError(f"{shown(file)} is empty")
    return size


def check_texts(folder: Path) -> None:
    """Raise `WeightFileError` if a configuration or tokenizer file is unreadable or a git-lfs pointer."""
    for file in texts_in(folder):
        check_there(file)
        with file.open("rb") as source:
            if source.read(len(_POINTER)) == _POINTER:
                raise WeightFileError(f"{shown(file)} {_LEADS[0][1]}")
        if file.suffix == ".json":
            read_json(file)


def texts_in(folder: Path) -> Iterator[Path]:
    """The configuration and tokenizer files of a component, sorted."""
    if folder.is_dir():
        yield from sorted(file for file in folder.iterdir() if file.suffix in TEXTS and not file.is_dir())


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `WeightFileError` if it holds none."""
    check_there(file)
    try:
        read = json.loads(file.read_bytes())
    except OSError as error:
        raise WeightFileError(f"{shown(file)} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"{shown(file)} is not JSON ({error})"[:200]) from error
    if not isinstance(read, dict):
        raise WeightFileError(f"{shown(file)} is not a JSON object")
    return read


def files_of(folder: Path, parts: list[WeightPart], variant: str | None) -> dict[str, Path]:
    """All files that determine a model's images, by their paths within `folder`. Raises `WeightFileError`.

    Other variants, sample images and notes are left out, so adding or removing them changes nothing.
    """
    files = [index_of(folder)]
    for part in parts:
        files += (
            files_of_part(folder / part.name, part.stem, variant) if part.has_weights else texts_in(folder / part.name)
        )
    return {file.relative_to(folder).as_posix(): file for file in files}


def files_of_part(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The configuration and the weight files of one network. Raises `WeightFileError`."""
    weights = weight_files(folder, stem, variant).files
    texts = (file for file in texts_in(folder) if ".index." not in file.name)  # the index in use is in `weights`
    return [*texts, *weights]


def _names(stem: str, variant: str | None) -> tuple[str, ...]:
    """Possible file names of a variant's weights: one file, or the index of its shards."""
    shards: tuple[str, ...]
    if variant is None:
        whole, shards = f"{stem}{SAFETENSORS}", (f"{stem}{SAFETENSORS}.index.json",)
    else:
        whole = f"{stem}.{variant}{SAFETENSORS}"
        shards = f"{stem}{SAFETENSORS}.index.{variant}.json", f"{stem}{SAFETENSORS}.{variant}.index.json"
    # If both exist, diffusers reads the shards and transformers the single file.
    return (*shards, whole) if stem == DIFFUSERS else (whole, *shards[:1])


def _shards(folder: Path, index: Path) -> list[Path]:
    """The shards that an index lists. Raises `WeightFileError` if one is missing."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise WeightFileError(f"{shown(index)} lists no files")
    names = sorted({str(name) for name in listed.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(SAFETENSORS):
            raise WeightFileError(f"{shown(index)} lists {name[:100]!r}, which is no safetensors file beside it")
        if not (folder / name).exists():
            leads = "is a link that leads nowhere" if (folder / name).is_symlink() else "is missing"
            raise WeightFileError(f"{shown(folder / name)} {leads}; {index.name} lists {len(names)} files")
    return [folder / name for name in names]


def _what_is_there(folder: Path, stem: str) -> str:
    """Why a folder has none of the expected weight files, according to file names."""
    wanted = f"{stem}{SAFETENSORS}"
    if not folder.is_dir():
        return f"{shown(folder)} {'is a link that leads nowhere' if folder.is_symlink() else 'is missing'}"
    names = sorted(file.name for file in folder.iterdir())
    if other := [name for name in names if name.endswith(SAFETENSORS)]:
        return f"{shown(folder)} holds {other[0]}, and {wanted} is looked for"
    if other := [name for name in names if name.endswith(OTHER_WEIGHTS)]:
        return f"{shown(folder)} holds {other[0]}, and only safetensors files are read ({wanted})"
    return f"{shown(folder)} holds no weights ({wanted} is looked for)"


def shown(file: Path) -> str:
    """The last two parts of a path: identifies the file without revealing the machine's folders."""
    return f"{file.parent.name}/{file.name}"
