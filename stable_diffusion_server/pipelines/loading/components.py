"""Loads the parts of a pipeline from their files, whole or not at all. Knows no jobs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import structlog
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from stable_diffusion_server.errors import ModelLoadError, ServerError
from stable_diffusion_server.pipelines.catalog import ModelSpec
from stable_diffusion_server.pipelines.loading.compatibility import check_pipeline
from stable_diffusion_server.pipelines.loading.folders import folder_in
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.placement import CONTROL
from stable_diffusion_server.pipelines.loading.weight_files import (
    DIFFUSERS,
    INDEX,
    FileFault,
    WeightPart,
    check_part,
    check_texts,
    files_of,
    files_of_part,
    parts_of,
    read_json,
)

_log = structlog.get_logger(__name__)

# The variant of a ControlNet's files that is preferred: there are no others in use.
_CONTROL_VARIANT = "fp16"


def choose_device(name: str) -> torch.device:
    """The torch device of that name; `auto` takes CUDA, then MPS, then the CPU.

    Raises `ModelLoadError` in one sentence when the machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    device = torch.device(name)
    if not available[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ModelLoadError(f"DEVICE={name} was asked for, and this machine has no such device.")
    return device


def dtype_of(facts: ModelSpec, device: torch.device) -> torch.dtype:
    """The torch type a model's weights are loaded in on `device`."""
    dtype: torch.dtype = getattr(torch, facts.cpu_dtype if device.type == "cpu" else facts.dtype)
    return dtype


def load_pipeline(
    facts: ModelSpec, models_dir: Path, device: torch.device, *, hub: HubClient | None = None, move: bool = True
) -> Any:
    """The stock diffusers pipeline of a model, in its type for `device`, and moved there unless `move` is false.

    Its weights take no gradients: of layers that could, PyTorch multiplies few rows in another order.

    Only with `hub` is a network reached for, when the folder is not there. Raises `ModelLoadError` when files are
    missing, damaged or of another class, or when the parts were not made for one another.
    """
    quieten_libraries()
    folder = model_folder(facts, models_dir, hub=hub)
    dtype = dtype_of(facts, device)
    with _translate_load_errors(facts.folder, folder):
        variants = _check(facts, folder)
        parts = {
            part.name: _whole(_class_of(part), folder / part.name, f"{facts.folder}/{part.name}", dtype, variant)
            for part, variant in variants.items()
        }
        pipeline = getattr(diffusers, facts.pipeline_class).from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **parts
        )
        check_pipeline(facts.folder, pipeline)
        if pipeline.vae.config.force_upcast and dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # it overflows in fp16, and is small
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipeline.to(device) if move else pipeline


def load_controlnet(
    facts: ModelSpec, models_dir: Path, device: torch.device, *, hub: HubClient | None = None, move: bool = True
) -> Any:
    """The model's ControlNet for edges, in the model's type for `device`; `None` when there is none.

    Raises `ModelLoadError` as `load_pipeline`.
    """
    folder = control_folder(facts, models_dir, hub=hub)
    if folder is None or facts.control_folder is None:
        return None
    with _translate_load_errors(facts.control_folder, folder):
        found = read_json(folder / "config.json").get("_class_name")
        if found != facts.control_class:
            raise ModelLoadError(f"{facts.control_folder} holds a {found}, and a {facts.control_class} is needed.")
        variant = check_part(folder, DIFFUSERS, _CONTROL_VARIANT).variant
        kind = getattr(diffusers, facts.control_class)
        network = _whole(kind, folder, facts.control_folder, dtype_of(facts, device), variant)
    network.requires_grad_(False)
    return network.to(device) if move else network


def lcm_file(facts: ModelSpec, folder_name: str, models_dir: Path, *, hub: HubClient | None = None) -> Path:
    """The LoRA file in a folder beside the models. Raises `ModelLoadError` when it is missing."""
    folder = folder_in(models_dir, folder_name)
    if hub and facts.lcm_repo and not folder.is_dir():
        folder = hub.adapters(facts.lcm_repo)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"The LoRA of {facts.name} is missing: no .safetensors file in {folder_name}.")
    return files[0]


def lora_file(name: str, models_dir: Path, *, hub: HubClient | None = None) -> Path:
    """The LoRA of CONTROLNET_LORA: a file, the one file of a folder, here or among the models, or of a repository.

    Raises `ModelLoadError` when there is none, or more than one.
    """
    place = next((place for place in (Path(name), models_dir / name) if place.exists()), None)
    if place is None and hub:
        place = hub.adapters(name)
    files = [] if place is None else [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelLoadError(f"CONTROLNET_LORA={name} names {len(files)} .safetensors files, and one is needed.")
    return files[0]


def empty_pipeline(facts: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> dict[str, torch.nn.Module]:
    """The model's parts by name, with shapes and without weights (on torch's meta device), from its configurations.

    Its ControlNet is among them, as `control`, when there is one. Raises `ModelLoadError` when configurations are
    missing or of another class.
    """
    folder = model_folder(facts, models_dir, hub=hub)
    with _translate_load_errors(facts.folder, folder), torch.device("meta"):
        parts: dict[str, torch.nn.Module] = {}
        for part in (part for part in parts_of(folder) if part.has_weights):
            made = _class_of(part)
            if part.library == "diffusers":
                parts[part.name] = made.from_config(made.load_config(folder / part.name))
            else:
                parts[part.name] = made(made.config_class.from_pretrained(folder / part.name))
    try:
        edges = control_folder(facts, models_dir, hub=hub)
        if edges is not None:
            with _translate_load_errors(facts.control_folder or "", edges), torch.device("meta"):
                made = getattr(diffusers, facts.control_class)
                parts[CONTROL] = made.from_config(made.load_config(edges))
    except ModelLoadError:  # told when it is loaded; the model draws without it
        parts.pop(CONTROL, None)
    return parts


def model_files(facts: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> dict[str, Path]:
    """The files of a model that decide what it draws, by their names in its folder. Raises `ModelLoadError`."""
    folder = model_folder(facts, models_dir, hub=hub)
    with _translate_load_errors(facts.folder, folder):
        return files_of(folder, parts_of(folder), facts.variant)


def control_files(facts: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> dict[str, Path]:
    """The files of a model's ControlNet by their names; none when it has none. Raises `ModelLoadError`."""
    folder = control_folder(facts, models_dir, hub=hub)
    if folder is None or facts.control_folder is None:
        return {}
    with _translate_load_errors(facts.control_folder, folder):
        return {file.name: file for file in files_of_part(folder, DIFFUSERS, _CONTROL_VARIANT)}


def model_folder(facts: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> Path:
    """The folder of a model, fetched from the hub when there is one and it is not here; it holds the right class.

    Raises `ModelLoadError`.
    """
    folder = folder_in(models_dir, facts.folder)
    if folder.is_symlink() and not folder.exists():
        raise ModelLoadError(f"The model {facts.name} is missing: {facts.folder} is a link that leads nowhere.")
    if hub and facts.repo and not folder.is_dir():
        repo, source = facts.repo, hub
        folder = _from_hub(repo, lambda: source.pipeline(repo, facts.variant))
    index = folder / INDEX
    if not index.exists():
        raise ModelLoadError(f"The model {facts.name} is missing: no {INDEX} in {facts.folder}.")
    with _translate_load_errors(facts.folder, folder):
        found = read_json(index).get("_class_name")
    if found != facts.pipeline_class:
        raise ModelLoadError(f"{facts.folder} holds a {found}, and {facts.name} needs a {facts.pipeline_class}.")
    return folder


def control_folder(facts: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> Path | None:
    """The folder of a model's ControlNet, likewise; `None` when it has none. Raises `ModelLoadError`."""
    if facts.control_folder is None:
        return None
    folder = folder_in(models_dir, facts.control_folder)
    if folder.is_symlink() and not folder.exists():
        raise ModelLoadError(f"{facts.control_folder} is a link that leads nowhere.")
    if hub and facts.control_repo and not folder.is_dir():
        repo, source = facts.control_repo, hub
        folder = _from_hub(repo, lambda: source.network(repo, _CONTROL_VARIANT))
    return folder if folder.is_dir() else None


def _from_hub(repo: str, download: Any) -> Path:
    """The folder of a repository, downloaded; the one place where a network is reached for."""
    folder: Path = download()
    _log.debug("read from the hub's cache", repo=repo)
    return folder


def _class_of(part: WeightPart) -> Any:
    """The class of a part. Raises `FileFault` for one of no library in use."""
    library = {"diffusers": diffusers, "transformers": transformers}.get(part.library)
    kind = getattr(library, part.kind, None)
    if kind is None:
        raise FileFault(
            f"{INDEX} lists {part.kind[:60]} of {part.library[:60]} as {part.name}, which is not known here"
        )
    return kind


def _check(facts: ModelSpec, folder: Path) -> dict[WeightPart, str | None]:
    """The variant each network is read in; all files are looked at before the first gigabytes. Raises `FileFault`."""
    variants = {}
    for part in parts_of(folder):
        check_texts(folder / part.name)
        if part.has_weights:
            _class_of(part)
            variants[part] = check_part(folder / part.name, part.stem, facts.variant).variant
    return variants


def _whole(kind: Any, folder: Path, told: str, dtype: torch.dtype, variant: str | None) -> Any:
    """A network whose weights are all there: the libraries alone would invent the missing ones, and only log it."""
    given = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "variant": variant}
    if not issubclass(kind, diffusers.ModelMixin):
        given["ignore_mismatched_sizes"] = True  # or transformers prints which they are, and tells its caller nothing
    network, found = kind.from_pretrained(folder, **given, output_loading_info=True)
    if lacking := sorted({*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])}):
        raise ModelLoadError(f"{told} lacks {len(lacking)} of its weights ({', '.join(lacking[:2])}).")
    hollow = [name for name, tensor in network.named_parameters() if tensor.is_meta]
    if hollow:
        raise ModelLoadError(f"{told} lacks {len(hollow)} of its weights ({', '.join(hollow[:2])}).")
    return network


@contextmanager
def _translate_load_errors(told: str, folder: Path) -> Iterator[None]:
    """Turn what is found wrong with files, and whatever the libraries raise, into a sentence; the log has all of it."""
    try:
        yield
    except ServerError:
        raise
    except FileFault as fault:
        raise ModelLoadError(f"The files in {told} cannot be loaded: {fault}.") from fault
    except Exception as error:  # the libraries have no class of their own for files they cannot read
        _log.warning(
            "model files cannot be loaded", folder=told, why=f"{type(error).__name__}: {error}"
        )  # where the library stood helps nobody
        words = " ".join(str(error).split()).replace(str(folder), told).replace(str(Path.home()), "~").rstrip(".")
        raise ModelLoadError(
            f"The files in {told} cannot be loaded ({type(error).__name__}: {words[:300]})."
        ) from error


def quieten_libraries() -> None:
    """Keep the libraries' bars and remarks on optional packages off the console; errors still show."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # A LoRA for the denoiser alone is the ordinary case, and remarked on for every text encoder.
    logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)
    # Several adapters in one model, and taking one back that does not fit, are meant; the last is diffusers' to mend.
    for remark in (
        "Already found a `peft_config` attribute",
        "Adapter .* was active which is now deleted",
        "`FluxPosEmbed` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=remark)
