"""Recognises model folders by model_index.json and config.json, as diffusers and transformers write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stable_diffusion_server.pipelines.library.file_headers import is_folder, is_there, read_json_object, shown
from stable_diffusion_server.pipelines.library.identity import FileIdentity, Kind, ModelTask, UnreadableModel
from stable_diffusion_server.pipelines.library.shards import index_ending, indexes_of_shard, with_shards
from stable_diffusion_server.pipelines.stock_classes import is_of_diffusers

INDEX, MODULAR, CONFIG = "model_index.json", "modular_model_index.json", "config.json"
# What a folder of blocks may have: code, which diffusers would run with trust_remote_code, and files that name it.
_CODE, _NAMES_CODE, _AUTO_MAP = ".py", (CONFIG, "modular_config.json"), "auto_map"
_MAX_PARTS, _MAX_LISTED = 64, 2000
# Z-Image and Z-Image-Turbo have the same networks, and another shift of the schedule: 6 and 3.
_TURBO_SHIFT = 3.0

# Beginnings of pipeline classes and their family; longer ones before shorter ones.
_PIPELINES = (
    ("StableDiffusionXL", "sdxl"), ("StableDiffusion3", "sd3"), ("StableDiffusion", ""), ("Flux2Klein", "flux2"),
    ("Flux2", "flux2"), ("Flux3", "flux3"), ("Flux", "flux"), ("ZImage", "z-image"), ("QwenImage", "qwen-image"),
    ("Krea2", "krea2"), ("Chroma", "chroma"), ("PixArtAlpha", "pixart"), ("PixArtSigma", "pixart"), ("Sana", "sana"),
    ("Wan", "wan"), ("Lumina2", "lumina2"), ("Lumina", "lumina"), ("HiDreamImage", "hidream"),
    ("HunyuanDiT", "hunyuan-dit"), ("HunyuanImage", "hunyuan-image"), ("HunyuanVideo", "hunyuan-video"),
    ("AuraFlow", "auraflow"),
    ("Kolors", "kolors"), ("StableCascade", "stable-cascade"), ("Anima", "anima"), ("Cosmos", "cosmos"),
    ("LTX2", "ltx2"), ("LTX", "ltx-video"), ("Mochi", "mochi"), ("Ideogram4", "ideogram4"), ("GlmImage", "glm-image"),
    ("ErnieImage", "ernie-image"), ("OvisImage", "ovis-image"), ("LongCatImage", "longcat-image"), ("PRX", "prx"),
    ("Kandinsky", "kandinsky"), ("OmniGen", "omnigen"), ("Bria", "bria"), ("CogView", "cogview"),
    ("LatentConsistencyModel", "sd15"), ("IF", "deepfloyd-if"), ("Wuerstchen", "wuerstchen"),
)  # fmt: skip
_BLOCKS = "ModularPipeline"
# The pipeline of images as prompts, which draws nothing itself.
_REDUX = "FluxPriorReduxPipeline"
# Parts of pipeline classes, and the task they stand for.
_TASKS = (
    ("Kontext", ModelTask.EDIT), ("Edit", ModelTask.EDIT), ("InstructPix2Pix", ModelTask.EDIT),
    ("Fill", ModelTask.FILL),
    ("Inpaint", ModelTask.INPAINT), ("Upscale", ModelTask.UPSCALE), ("Video", ModelTask.VIDEO),
    ("FluxControl", ModelTask.CONTROL), ("Depth2Img", ModelTask.DEPTH),
)  # fmt: skip
# Class of a network in config.json → kind, families and variant.
_NETWORKS: dict[str, tuple[Kind, tuple[str, ...], str]] = {
    "UNet2DConditionModel": (Kind.DENOISER, (), ""),
    "FluxTransformer2DModel": (Kind.DENOISER, ("flux",), ""),
    "Flux2Transformer2DModel": (Kind.DENOISER, ("flux2",), ""),
    "SD3Transformer2DModel": (Kind.DENOISER, ("sd3",), ""),
    "ZImageTransformer2DModel": (Kind.DENOISER, ("z-image",), ""),
    "QwenImageTransformer2DModel": (Kind.DENOISER, ("qwen-image",), ""),
    "ChromaTransformer2DModel": (Kind.DENOISER, ("chroma",), ""),
    "PixArtTransformer2DModel": (Kind.DENOISER, ("pixart",), ""),
    "SanaTransformer2DModel": (Kind.DENOISER, ("sana",), ""),
    "WanTransformer3DModel": (Kind.DENOISER, ("wan",), ""),
    "AutoencoderKL": (Kind.VAE, (), ""),
    "AutoencoderKLFlux2": (Kind.VAE, ("flux2",), ""),
    "AutoencoderKLQwenImage": (Kind.VAE, ("qwen-image",), ""),
    "AutoencoderKLWan": (Kind.VAE, ("wan",), ""),
    "AutoencoderTiny": (Kind.TINY_VAE, (), "taesd"),
    "ControlNetModel": (Kind.CONTROLNET, (), ""),
    "ControlNetUnionModel": (Kind.CONTROLNET, (), "union"),
    "FluxControlNetModel": (Kind.CONTROLNET, ("flux",), ""),
    "SD3ControlNetModel": (Kind.CONTROLNET, ("sd3",), ""),
    "QwenImageControlNetModel": (Kind.CONTROLNET, ("qwen-image",), ""),
    "ZImageControlNetModel": (Kind.CONTROLNET, ("z-image",), ""),
    "T2IAdapter": (Kind.CONTROLNET, (), "t2i-adapter"),
    "CLIPTextModel": (Kind.TEXT_ENCODER, (), "clip"),
    "CLIPTextModelWithProjection": (Kind.TEXT_ENCODER, (), "clip"),
    "T5EncoderModel": (Kind.TEXT_ENCODER, (), "t5"),
    "T5ForConditionalGeneration": (Kind.TEXT_ENCODER, (), "t5"),
    "UMT5EncoderModel": (Kind.TEXT_ENCODER, (), "umt5"),
    "Qwen3ForCausalLM": (Kind.TEXT_ENCODER, (), "qwen3"),
    "Qwen3Model": (Kind.TEXT_ENCODER, (), "qwen3"),
    "Qwen2_5_VLForConditionalGeneration": (Kind.TEXT_ENCODER, (), "qwen2.5-vl"),
    "Gemma2Model": (Kind.TEXT_ENCODER, (), "gemma2"),
    "CLIPVisionModelWithProjection": (Kind.IMAGE_ENCODER, (), "clip-vision"),
    "SiglipVisionModel": (Kind.IMAGE_ENCODER, (), "siglip"),
}


def identify_folder(folder: Path, identify_file: Callable[[Path], FileIdentity]) -> FileIdentity:
    """What a folder is; `identify_file` identifies a weight file in it."""
    for name, read in ((INDEX, _pipeline), (MODULAR, _modular), (CONFIG, _network)):
        file = folder / name
        if is_there(file):
            try:
                return read(folder, read_json_object(file), identify_file)
            except UnreadableModel as error:
                return FileIdentity(Kind.UNKNOWN, container="folder", reason=f"has a {name} that {error}")
    return FileIdentity(Kind.UNKNOWN, container="folder", reason=f"has neither {INDEX} nor {CONFIG}")


def evidence_of(folder: Path) -> tuple[Path, ...]:
    """The files that decide what a folder is; while none changes, neither does its identity."""
    part = next((folder / name for name in ("unet", "transformer") if is_folder(folder / name)), folder)
    weights = _first_weights(part)
    known: tuple[Path, ...] = (
        folder / INDEX,
        folder / CONFIG,
        folder / "scheduler" / "scheduler_config.json",
        part / CONFIG,
    )
    if is_there(folder / MODULAR):
        known += (folder / MODULAR, *(folder / name for name in _NAMES_CODE), *_code_in(folder))
    return (*known, *with_shards(weights)) if weights else known


def _modular(folder: Path, index: dict[str, Any], identify_file: Callable[[Path], FileIdentity]) -> FileIdentity:
    """A pipeline of blocks, whose index says of each part where it was loaded from: here the folder's own are read."""
    listed = {name: value[:2] for name, value in index.items() if isinstance(value, list) and len(value) == 3}
    own = {name: value for name, value in listed.items() if is_folder(folder / name)}
    found = _pipeline(folder, {"_class_name": index.get("_class_name"), **own}, identify_file, MODULAR)
    named = (name for name in _NAMES_CODE if is_there(folder / name) and _AUTO_MAP in read_json_object(folder / name))
    code = next(iter((*(shown(file.name, 60) for file in _code_in(folder)), *named)), "")
    reason = f"brings code of its own ({code}), and code of models is never run here" if code else found.reason
    return replace(found, reason=reason)


def _code_in(folder: Path) -> tuple[Path, ...]:
    """Files with code, by name."""
    try:
        return tuple(sorted(file for file in folder.iterdir() if file.suffix.lower() == _CODE)[:_MAX_PARTS])
    except OSError:
        return ()


def _pipeline(
    folder: Path, index: dict[str, Any], identify_file: Callable[[Path], FileIdentity], name: str = INDEX
) -> FileIdentity:
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise UnreadableModel("names no class")
    if class_name.endswith(_BLOCKS) != (name == MODULAR):
        raise UnreadableModel(f"names the class {shown(class_name)}, which such a file does not list the parts of")
    parts = tuple(
        shown(name, 40)
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and (None not in value or class_name.endswith(_BLOCKS))
    )[:_MAX_PARTS]
    if class_name == _REDUX:
        return FileIdentity(Kind.IMAGE_PROMPT, ("flux",), "redux", container="folder", layout="diffusers", parts=parts)
    family = next((family for start, family in _PIPELINES if class_name.startswith(start)), None)
    if family is None and is_of_diffusers(class_name):
        family = class_name.removesuffix("Pipeline").lower()
    if family is None:
        reason = f"holds a pipeline of the class {shown(class_name)}, which is not known"
        return FileIdentity(Kind.UNKNOWN, container="folder", layout="diffusers", parts=parts, reason=reason)
    found = FileIdentity(
        Kind.PIPELINE,
        (family,) if family else (),
        container="folder",
        layout="diffusers",
        parts=parts,
        pipeline_class=shown(class_name),
    )
    found = _with_denoiser(folder, found, class_name, identify_file)
    if found.variant == "klein" and index.get("is_distilled") is not True:  # the stock class takes it for false
        found = replace(found, variant="klein-base")
    return _with_scheduler(folder, found)


def _with_denoiser(
    folder: Path, found: FileIdentity, class_name: str, identify_file: Callable[[Path], FileIdentity]
) -> FileIdentity:
    """Add what the denoiser's configuration and weights say."""
    part = next((name for name in ("unet", "transformer") if is_folder(folder / name)), "")
    task = next((task for mark, task in _TASKS if mark in class_name and "ControlNet" not in class_name), found.task)
    if not part:
        listed = next((name for name in ("unet", "transformer") if name in found.parts), "")
        return replace(found, task=task, reason=f"lacks the folder {listed} that {INDEX} lists" if listed else "")
    try:
        config = read_json_object(folder / part / CONFIG)
    except UnreadableModel as error:
        return replace(found, task=task, reason=f"has a {part}/{CONFIG} that {error}")
    weights = _first_weights(folder / part)
    inner = identify_file(weights) if weights else FileIdentity(Kind.UNKNOWN, reason="is missing")
    families, variant, own = _by_config(config, found.families, class_name)
    found = replace(
        found,
        families=families,
        variant=variant,
        task=task if task is not ModelTask.NORMAL else own,
        in_channels=_number(config.get("in_channels")),
        precision=inner.precision,
        scaled=inner.scaled,
        reason=_quantizer(config),
    )
    # Shards without an index rarely have the names that tell a kind; the configuration says it.
    if inner.kind is Kind.UNKNOWN and "of no known kind" not in inner.reason and not found.reason:
        name = weights.name if weights else "its weights (*.safetensors)"
        return replace(found, reason=f"has a {part} that cannot be read: {name} {inner.reason}")
    return found


def _by_config(
    config: dict[str, Any], families: tuple[str, ...], class_name: str
) -> tuple[tuple[str, ...], str, ModelTask]:
    """Families, variant and task by the configuration of a denoiser and the class of its pipeline."""
    width, channels = config.get("cross_attention_dim"), config.get("in_channels")
    own = {9: ModelTask.INPAINT, 8: ModelTask.EDIT}.get(_number(channels), ModelTask.NORMAL)
    if not families:
        known = {768: ("sd15",), 1024: ("sd2",), 2048: ("sdxl",)}
        return known.get(_number(width), ("sd15", "sd2")), "", own
    if families == ("sdxl",):
        if (
            config.get("projection_class_embeddings_input_dim") == 2560
            or len(config.get("down_block_types") or ()) == 4
        ):
            return families, "refiner", ModelTask.REFINER
        return families, "lcm" if config.get("time_cond_proj_dim") else "", own
    if families == ("flux",):
        for mark in ("Kontext", "Fill", "Control"):
            if mark in class_name and "ControlNet" not in class_name:
                return families, mark.lower(), ModelTask.NORMAL
        return families, "dev" if config.get("guidance_embeds") else "schnell", ModelTask.NORMAL
    if families == ("flux2",):
        kinds = (("KleinKV", "klein-kv"), ("Klein", "klein"))
        return families, next((kind for mark, kind in kinds if mark in class_name), "dev"), ModelTask.NORMAL
    return families, "", ModelTask.NORMAL


def _with_scheduler(folder: Path, found: FileIdentity) -> FileIdentity:
    file = folder / "scheduler" / "scheduler_config.json"
    if not is_there(file):
        return found
    try:
        config = read_json_object(file)
    except UnreadableModel as error:
        return replace(found, reason=found.reason or f"has a scheduler/{file.name} that {error}")
    prediction = config.get("prediction_type")
    known = prediction if prediction in ("epsilon", "v_prediction") else ""
    metadata = {"scheduler": shown(str(config.get("_class_name", "")))}
    variant = found.variant
    if found.family == "z-image":
        variant = "turbo" if config.get("shift") == _TURBO_SHIFT else "base"
    return replace(
        found,
        variant=variant,
        prediction=known,
        zero_snr=config.get("rescale_betas_zero_snr") is True,
        metadata=MappingProxyType(metadata),
    )


def _network(folder: Path, config: dict[str, Any], identify_file: Callable[[Path], FileIdentity]) -> FileIdentity:
    """One network with its configuration: a VAE, a ControlNet, a text encoder, a denoiser."""
    listed = config.get("architectures")
    names = [config.get("_class_name"), *(listed if isinstance(listed, list) else ())]
    known = next((_NETWORKS[name] for name in names if isinstance(name, str) and name in _NETWORKS), None)
    weights = _first_weights(folder)
    if known is None:
        named = next((name for name in names if isinstance(name, str)), "")
        reason = f"holds a network of the class {shown(named) or 'unknown'}, which is not known"
        return FileIdentity(Kind.UNKNOWN, container="folder", reason=reason)
    kind, families, variant = known
    inner = identify_file(weights) if weights else FileIdentity(Kind.UNKNOWN, reason="is missing")
    reason = _quantizer(config)
    if not weights:
        reason = reason or "has no weights in safetensors"
    elif inner.kind is Kind.UNKNOWN and "of no known kind" not in inner.reason:
        reason = reason or f"has weights that cannot be read: {weights.name} {inner.reason}"
    same = inner.kind is kind
    return FileIdentity(
        kind,
        families or (inner.families if same else ()),
        (inner.variant if same else "") or variant,
        inner.task if same else ModelTask.NORMAL,
        "diffusers" if isinstance(config.get("_class_name"), str) else "transformers",
        inner.precision,
        inner.scaled,
        container="folder",
        in_channels=inner.in_channels if same else 0,
        remarks=inner.remarks if same and not families else (),
        reason=reason,
    )


def _quantizer(config: dict[str, Any]) -> str:
    """Why a quantized network is not read; empty for a plain one."""
    quantized = config.get("quantization_config")
    if not isinstance(quantized, dict):
        return ""
    method = shown(str(quantized.get("quant_method", "another program")), 40)
    return f"is quantized by {method}, which is not read; take the plain weights"


def _first_weights(folder: Path) -> Path | None:
    """The first safetensors file, or index of such files, in a folder by name; one in half precision before others."""
    try:
        inside = sorted(folder.iterdir())[:_MAX_LISTED]
    except OSError:
        return None
    names = {file.name for file in inside}
    files = [
        file
        for file in inside
        if index_ending(file.name)
        or (file.suffix == ".safetensors" and not names.intersection(indexes_of_shard(file.name)))
    ]
    return next((file for file in files if ".fp16" in file.name), files[0] if files else None)


def _number(value: Any) -> int:
    return value if type(value) is int else 0
