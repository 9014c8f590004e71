"""Load a pipeline's parts once, measure and place them; make schedulers and token counters. Knows no jobs."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from stable_diffusion_server.errors import WeightsUnusable
from stable_diffusion_server.pipelines.catalog import ModelFacts, SchedulerFacts
from stable_diffusion_server.pipelines.folders import folder_in
from stable_diffusion_server.pipelines.placement import CONTROL, Footprint, Residency

# What one drawing needs beside the weights, for each pixel: the widest layers of a VAE decoder, roughly.
_WORKING_BYTES = 2048


def choose_device(name: str) -> torch.device:
    """The torch device of that name; `auto` takes CUDA, then MPS, then the CPU.

    Raises `WeightsUnusable` in one sentence when the machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    device = torch.device(name)
    if not available[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise WeightsUnusable(f"DEVICE={name} was asked for, and this machine has no such device.")
    return device


def dtype_of(facts: ModelFacts, device: torch.device) -> torch.dtype:
    """The torch type a model's weights are loaded in on `device`."""
    dtype: torch.dtype = getattr(torch, facts.cpu_dtype if device.type == "cpu" else facts.dtype)
    return dtype


def load_pipeline(
    facts: ModelFacts, models_dir: Path, device: torch.device, *, hub: bool = False, move: bool = True
) -> Any:
    """The stock diffusers pipeline of a model, in its type for `device`, and moved there unless `move` is false.

    Its weights take no gradients: of layers that could, PyTorch multiplies few rows in another order.

    Only with `hub` is a network reached for, when the folder is not there. Raises `WeightsUnusable` when files are
    missing, damaged or of another class.
    """
    quieten_libraries()
    kind = getattr(diffusers, facts.pipeline_class)
    folder = _folder_of(facts, models_dir, hub=hub)
    dtype = dtype_of(facts, device)
    with _weights_told(facts.folder):
        variant = _variant_in(folder, facts)
        given = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "variant": variant}
        parts = {name: _load_part(folder, name, given) for name in (facts.denoiser, "vae")}
        pipeline = kind.from_pretrained(folder, **given, **parts)
        if pipeline.vae.config.force_upcast and dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # it overflows in fp16, and is small
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipeline.to(device) if move else pipeline


def load_controlnet(
    facts: ModelFacts, models_dir: Path, device: torch.device, *, hub: bool = False, move: bool = True
) -> Any:
    """The model's ControlNet for edges, in the model's type for `device`; `None` when there is none.

    Raises `WeightsUnusable` as `load_pipeline`.
    """
    if facts.control_folder is None:
        return None
    folder = folder_in(models_dir, facts.control_folder)
    if hub and facts.control_repo and not folder.is_dir():
        patterns = ["*.json", "diffusion_pytorch_model*.safetensors"]
        folder = _from_hub(facts.control_repo, lambda repo: snapshot_download(repo, allow_patterns=patterns))
    if not folder.is_dir():
        return None
    with _weights_told(facts.control_folder):
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
        if found != facts.control_class:
            raise WeightsUnusable(f"{facts.control_folder} holds a {found}, and a {facts.control_class} is needed.")
        variant = "fp16" if list(folder.glob("*.fp16.safetensors")) else None
        network = getattr(diffusers, facts.control_class).from_pretrained(
            folder, dtype=dtype_of(facts, device), local_files_only=True, use_safetensors=True, variant=variant
        )
    network.requires_grad_(False)
    return network.to(device) if move else network


def lcm_file(facts: ModelFacts, folder_name: str, models_dir: Path, *, hub: bool = False) -> Path:
    """The LoRA file in a folder beside the models. Raises `WeightsUnusable` when it is missing."""
    folder = folder_in(models_dir, folder_name)
    if hub and facts.lcm_repo and not folder.is_dir():
        folder = _from_hub(facts.lcm_repo, lambda repo: snapshot_download(repo, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsUnusable(f"The LoRA of {facts.name} is missing: no .safetensors file in {folder_name}.")
    return files[0]


def lora_file(name: str, models_dir: Path, *, hub: bool = False) -> Path:
    """The LoRA of CONTROLNET_LORA: a file, the one file of a folder, here or among the models, or of a repository.

    Raises `WeightsUnusable` when there is none, or more than one.
    """
    place = next((place for place in (Path(name), models_dir / name) if place.exists()), None)
    if place is None and hub:
        place = _from_hub(name, lambda repo: snapshot_download(repo, allow_patterns=["*.safetensors"]))
    files = [] if place is None else [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsUnusable(f"CONTROLNET_LORA={name} names {len(files)} .safetensors files, and one is needed.")
    return files[0]


def skeleton(facts: ModelFacts, models_dir: Path, *, hub: bool = False) -> dict[str, torch.nn.Module]:
    """The model's parts by name, with shapes and without weights (on torch's meta device), from its configurations.

    Its ControlNet is among them, as `control`, when its folder is there. Raises `WeightsUnusable` when configurations
    are missing or of another class.
    """
    folder = _folder_of(facts, models_dir, hub=hub)
    with _weights_told(facts.folder), torch.device("meta"):
        index = json.loads((folder / "model_index.json").read_text())
        parts: dict[str, torch.nn.Module] = {}
        for name, (library, kind) in ((name, value) for name, value in index.items() if isinstance(value, list)):
            if library == "diffusers" and name != "scheduler":
                made = getattr(diffusers, kind)
                parts[name] = made.from_config(made.load_config(folder / name))
            elif library == "transformers" and name.startswith("text_encoder"):
                made = getattr(transformers, kind)
                parts[name] = made(made.config_class.from_pretrained(folder / name))
        if facts.control_folder is not None and (edges := folder_in(models_dir, facts.control_folder)).is_dir():
            made = getattr(diffusers, facts.control_class)
            parts[CONTROL] = made.from_config(made.load_config(edges))
    return parts


def footprint_of(facts: ModelFacts, parts: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> Footprint:
    """What these parts need in `dtype`, by their shapes; a ControlNet may be among them."""
    layers = [
        sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for part in parts.values()
        for module in part.modules()
    ]
    size = dtype.itemsize
    return Footprint(
        parts={name: parameters_of(part) * size for name, part in parts.items()},
        quantized=tuple(name for name in facts.quantized if name in parts),
        layer=max(layers, default=0) * size,
        weight_bytes=size,
        working=_WORKING_BYTES * facts.native_pixels,
    )


def parameters_of(module: torch.nn.Module) -> int:
    """Number of weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_of(*modules: torch.nn.Module) -> int:
    """Bytes the modules hold in memory; storage they share, among themselves too, counts once."""
    storages: dict[tuple[str, int], int] = {}

    def visit(tensor: Any) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # a quantized tensor is made of others
            for name in tensor.__tensor_flatten__()[0]:
                visit(getattr(tensor, name))
        else:
            storage = tensor.untyped_storage()
            storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()

    for module in modules:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            visit(tensor)
    return sum(storages.values())


def settle(pipeline: Any, controlnet: Any, device: torch.device, residency: Residency) -> None:
    """Put the weights where they live between drawings, by diffusers' own hooks. Adapters come before."""
    match residency:
        case Residency.RESIDENT:
            pipeline.to(device)
        case Residency.MODEL:
            pipeline.enable_model_cpu_offload(device=device)
        case Residency.GROUP:
            offload = {
                "onload_device": device,
                "offload_device": torch.device("cpu"),
                "offload_type": "leaf_level",
                "use_stream": device.type == "cuda",
            }
            pipeline.enable_group_offload(**offload)
            if controlnet is not None:
                controlnet.enable_group_offload(**offload)
        case Residency.SEQUENTIAL:
            pipeline.enable_sequential_cpu_offload(device=device)
    if controlnet is not None and residency is not Residency.GROUP:
        controlnet.to(device)  # no part of the pipeline, so its hooks pass it by; it is small


def _folder_of(facts: ModelFacts, models_dir: Path, *, hub: bool) -> Path:
    """The folder of a model, fetched from the hub when told to and not there; it holds the right class."""
    folder = folder_in(models_dir, facts.folder)
    if hub and facts.repo and not folder.is_dir():
        kind = getattr(diffusers, facts.pipeline_class)
        folder = _from_hub(facts.repo, lambda repo: kind.download(repo, variant=facts.variant, use_safetensors=True))
    index = folder / "model_index.json"
    if not index.is_file():
        raise WeightsUnusable(f"The model {facts.name} is missing: no {index.name} in {facts.folder}.")
    with _weights_told(facts.folder):
        found = json.loads(index.read_text()).get("_class_name")
    if found != facts.pipeline_class:
        raise WeightsUnusable(f"{facts.folder} holds a {found}, and {facts.name} needs a {facts.pipeline_class}.")
    return folder


def _load_part(folder: Path, name: str, given: Mapping[str, Any]) -> Any:
    """A part whose weights are all there: diffusers alone would invent the missing ones, and only log it."""
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())[name][1])
    part, found = kind.from_pretrained(folder / name, **given, output_loading_info=True)
    if lacking := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise WeightsUnusable(f"{folder.name}/{name} lacks {len(lacking)} of its weights.")
    return part


def _variant_in(folder: Path, facts: ModelFacts) -> str | None:
    """The variant of the files, when the folder has it for the largest part."""
    there = facts.variant and list((folder / facts.denoiser).glob(f"*.{facts.variant}.safetensors*"))
    return facts.variant if there else None


def _from_hub(repo: str, download: Callable[[str], str]) -> Path:
    try:
        return Path(download(repo))
    except Exception as error:  # the hub's client has a class for each of a dozen ways to fail
        raise WeightsUnusable(f"{repo} cannot be had from the hub ({type(error).__name__}).") from error


@contextmanager
def _weights_told(folder: str) -> Iterator[None]:
    """Turn what the libraries raise for damaged files into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise WeightsUnusable(f"The files in {folder} cannot be loaded ({type(error).__name__}).") from error


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


def make_scheduler(facts: SchedulerFacts, like: Any) -> Any:
    """A fresh scheduler of a kind, with the training facts (betas, prediction type …) of the model's own one.

    Carries `draws_noise`: whether its `step` takes a generator.
    """
    kind = getattr(diffusers, facts.class_name)
    scheduler = kind.from_config(like.config, **facts.options)
    scheduler.draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    return scheduler


def set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Give a scheduler just `steps` timesteps.

    Counting down from 1000 by fractions, diffusers' trailing spacing sometimes (61 steps, for one) adds a timestep of
    −1 at the end, which is none; it and its sigma are taken away.
    """
    scheduler.set_timesteps(steps, device=device)
    if len(scheduler.timesteps) == steps + 1 and scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """A function that counts a text's tokens, special ones included, on a copy of `tokenizer` of its own.

    The copy and the lock are needed: fast tokenizers keep truncation settings inside and are not shared by threads.
    """
    own, lock = copy.deepcopy(tokenizer), Lock()
    # Counting texts that are too long is the very purpose, so its warning about them says nothing.
    own.model_max_length = int(1e9)

    def count(text: str) -> int:
        with lock:
            return len(own(text, truncation=False).input_ids)

    return count
