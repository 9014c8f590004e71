"""LoRA adapters of one pipeline: which may be used, and which are on. Knows files and names, and neither jobs nor rows.

An adapter has one scaling for the whole model, so rows with and without it cannot share a forward pass: jobs are
grouped by their adapters (`Job.shape`), and `use` switches when the group changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from stable_diffusion_server.errors import InvalidInput, WeightsUnusable

Loras = Sequence[tuple[str, float]]

# Adapters kept in memory beside those in use; the one used longest ago goes first.
KEPT = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SUFFIX = ".safetensors"
_HEADER_LIMIT = 100_000_000


def names_in(folder: Path | None) -> tuple[str, ...]:
    """The adapters of the allowed folder, by name and sorted: its `.safetensors` files."""
    if folder is None or not folder.is_dir():
        return ()
    return tuple(sorted(p.stem for p in folder.iterdir() if p.suffix == _SUFFIX and _NAME.fullmatch(p.stem)))


def find(folder: Path | None, name: str) -> Path:
    """The file of an adapter by its name. Raises `InvalidInput` for a name that is none of the folder's own.

    Names are compared with what the folder holds and never joined into a path; links that lead out are refused.
    """
    if folder is None or not folder.is_dir():
        raise InvalidInput("No adapters are offered here.", field="lora")
    if name not in names_in(folder):
        raise InvalidInput(f"{name[:100]!r} is not an adapter here.", field="lora")
    file = (folder / f"{name}{_SUFFIX}").resolve()
    if folder.resolve() not in file.parents or not file.is_file():
        raise InvalidInput(f"{name!r} is not an adapter here.", field="lora")
    return file


def read_header(file: Path) -> Mapping[str, Any]:
    """The header of a safetensors file: name of each tensor → its `dtype`, `shape` and `data_offsets`.

    Raises `WeightsUnusable` when the file is none, or shorter than its header says.
    """
    try:
        with file.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            # A length out of bounds reads as nothing, which is no JSON.
            header = json.loads(source.read(length if length <= _HEADER_LIMIT else 0))
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        end = max((facts["data_offsets"][1] for facts in tensors.values()), default=0)
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsUnusable(f"{file.name} is not a safetensors file.") from error
    if size < 8 + length + end:
        raise WeightsUnusable(f"{file.name} is truncated: {size} of {8 + length + end} bytes are there.")
    return tensors


def digest_of(file: Path) -> str:
    """What tells these weights from others of the same name: the first 16 hexadecimal digits of their SHA-256."""
    facts = file.stat()
    return _digest(file, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=256)
def _digest(file: Path, changed: int, size: int) -> str:  # the same file is read again when one of the two differs
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()[:16]


def add_to_controlnet(controlnet: Any, file: Path) -> None:
    """Put a LoRA on a ControlNet for good. Raises `WeightsUnusable` for one of another kind."""
    refuse_control_lora(file)
    try:
        controlnet.load_lora_adapter(str(file.parent), weight_name=file.name, prefix=_prefix(file), adapter_name="own")
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError) as error:
        raise WeightsUnusable(f"CONTROLNET_LORA: {file.name} does not fit the ControlNet.") from error
    if "own" not in getattr(controlnet, "peft_config", {}):
        raise WeightsUnusable(f"CONTROLNET_LORA: {file.name} holds nothing for the ControlNet.")


def _prefix(file: Path) -> str | None:
    """The part of a pipeline that the names in a LoRA file begin with, if they do."""
    first = next(iter(read_header(file)), "").partition(".")[0]
    return first if first in ("transformer", "controlnet", "unet") else None


def refuse_control_lora(file: Path) -> None:
    """Raise `WeightsUnusable` for a Flux control LoRA of Black Forest Labs' kind.

    It widens the transformer's input in place, for the edges beside the latents, and so breaks every other job of
    the model; ordinary adapters leave the input's width alone.
    """
    for name, facts in read_header(file).items():
        part, _, kind = name.rpartition(".lora_A.")
        embeds_input = kind == "weight" and part.rpartition(".")[2] in ("x_embedder", "img_in")
        if embeds_input or "query_norm.scale" in name:
            raise WeightsUnusable(
                f"{file.name} is a control LoRA, which would change the input of the shared Flux transformer; "
                f"use an ordinary LoRA, or a ControlNet for edges. Its tensor {name} has the shape {facts['shape']}."
            )


class Adapters:
    """The adapters of one pipeline, loaded when first asked for. For the device thread alone.

    `always` are (file, weight) of those that belong to the model whatever a job asks for; they are loaded at once.
    """

    def __init__(self, pipeline: Any, folder: Path | None = None, always: Sequence[tuple[Path, float]] = ()) -> None:
        self._pipeline = pipeline
        self._folder = folder
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._always: list[tuple[str, float]] = []
        self._active: Loras | None = None
        for number, (file, weight) in enumerate(always):
            # "@" is in no name a job can give.
            name = f"always@{number}"
            self._load(name, file)
            self._always.append((name, weight))
        self.use(())

    def use(self, loras: Loras) -> None:
        """Turn exactly these adapters on, by name and weight, loading what is not loaded.

        Raises `InvalidInput` for an unknown name, or a file made for another model.
        """
        wanted = tuple(loras)
        if wanted == self._active:
            return
        files = {name: find(self._folder, name) for name, _ in wanted if name not in self._loaded}
        self._active = None  # until all of it has worked: loading one turns it on
        for name, _ in wanted:
            if name in files:
                self._load(name, files[name])
                self._loaded[name] = None
            self._loaded.move_to_end(name)
        self._switch(wanted)
        self._active = wanted
        self._forget({name for name, _ in wanted})

    def _switch(self, loras: Loras) -> None:
        on = [*((_key(name), weight) for name, weight in loras), *self._always]
        if on:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters([name for name, _ in on], [weight for _, weight in on])
        elif self._loaded:
            self._pipeline.disable_lora()

    def _load(self, name: str, file: Path) -> None:
        refuse_control_lora(file)
        try:
            self._pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=_key(name))
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            self._active = None
            raise InvalidInput(f"{file.stem!r} is not an adapter for this model.", field="lora") from error

    def _forget(self, used: set[str]) -> None:
        for name in [name for name in self._loaded if name not in used][: max(0, len(self._loaded) - KEPT)]:
            self._pipeline.delete_adapters(_key(name))
            del self._loaded[name]


def _key(name: str) -> str:
    """The adapter's name inside the pipeline, where a dot would separate modules."""
    return name.replace(".", "@dot@")
