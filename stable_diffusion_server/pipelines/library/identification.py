"""Says what a model file or folder is, by its header or its configuration alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePath
from types import MappingProxyType

from stable_diffusion_server.pipelines.library.denoiser_rules import DenoiserFacts, find_denoiser
from stable_diffusion_server.pipelines.library.file_headers import (
    TensorHeader,
    is_folder,
    opened_file,
    read_safetensors,
    shown,
    shown_metadata,
)
from stable_diffusion_server.pipelines.library.folder_rules import identify_folder
from stable_diffusion_server.pipelines.library.gguf_header import read_gguf
from stable_diffusion_server.pipelines.library.identity import FileIdentity, Kind, ModelTask, UnreadableModel
from stable_diffusion_server.pipelines.library.lora_rules import find_lora
from stable_diffusion_server.pipelines.library.part_rules import (
    find_controlnet,
    find_embedding,
    find_image_prompt,
    find_text_encoder,
    find_upscaler,
    find_vae,
)
from stable_diffusion_server.pipelines.library.precision_rules import precision_of
from stable_diffusion_server.pipelines.library.shards import index_ending, read_shards

SAFETENSORS, GGUF = ".safetensors", ".gguf"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
OTHERS = (".onnx", ".msgpack", ".h5", ".tflite", ".engine", ".mlmodel", ".sft")
SUFFIXES = (SAFETENSORS, GGUF, *PICKLES, *OTHERS)
_PICKLED = "is pickled: loading it would run code from the file. Only safetensors and GGUF files are read"
_CLIP, _OPEN_CLIP = "text_model.embeddings.token_embedding.weight", "token_embedding.weight"
# A tensor of each part that checkpoints may hold beside the denoiser.
_PARTS = {
    "first_stage_model.decoder.conv_in.weight": "vae", "vae.decoder.conv_in.weight": "vae",
    f"conditioner.embedders.0.transformer.{_CLIP}": "clip_l", f"conditioner.embedders.1.model.{_OPEN_CLIP}": "clip_g",
    f"conditioner.embedders.0.model.{_OPEN_CLIP}": "clip_g", f"cond_stage_model.transformer.{_CLIP}": "clip_l",
    "cond_stage_model.transformer.embeddings.token_embedding.weight": "clip_l",
    f"cond_stage_model.model.{_OPEN_CLIP}": "clip_h", f"text_encoders.clip_l.transformer.{_CLIP}": "clip_l",
    f"text_encoders.clip_g.transformer.{_CLIP}": "clip_g", "text_encoders.t5xxl.transformer.shared.weight": "t5",
    "text_encoders.qwen3_4b.transformer.model.embed_tokens.weight": "qwen3",
    "text_encoders.qwen25_7b.transformer.model.embed_tokens.weight": "qwen2.5",
}  # fmt: skip


def identify(path: Path) -> FileIdentity:
    """What a file or folder is. Never raises for its content; `reason` says what is wrong with it."""
    if is_folder(path):
        return identify_folder(path, identify_file)
    return identify_file(path)


def identify_file(file: Path) -> FileIdentity:
    """What a file is, by its header; an index of shards is what its shards are together.

    Files under 16 MB of header take milliseconds, whatever their size.
    """
    suffix = file.suffix.lower()
    sharded = bool(index_ending(file.name))
    known = {SAFETENSORS: "safetensors", GGUF: "gguf", **dict.fromkeys(PICKLES, "pickle")}
    container = "safetensors" if sharded else known.get(suffix, "")
    try:
        if not sharded and (reason := refusal_of_name(file.name)):
            with opened_file(file):
                return FileIdentity(Kind.UNKNOWN, container=container, reason=reason)
        read = read_shards if sharded else read_safetensors if container == "safetensors" else read_gguf
        header = read(file)
    except UnreadableModel as error:
        return FileIdentity(Kind.UNKNOWN, container=container, reason=str(error))
    return identify_header(header)


def refusal_of_name(name: str) -> str:
    """Why a weight file of this name is not read, the end of a sentence about it; empty if its content decides."""
    suffix = PurePath(name).suffix.lower()
    if suffix in PICKLES:
        return _PICKLED
    if suffix not in (SAFETENSORS, GGUF):
        return f"has the ending {shown(suffix, 20) or 'none'}; only .safetensors and .gguf files are read"
    return ""


def identify_header(header: TensorHeader) -> FileIdentity:
    """What a file with this header is."""
    precision = precision_of(header)
    found = _find(header)
    return replace(
        found,
        container=header.container,
        precision=precision.name,
        scaled=precision.scaled,
        metadata=MappingProxyType(shown_metadata(header.metadata)),
        reason=found.reason or precision.reason,
    )


def _find(header: TensorHeader) -> FileIdentity:
    if not header.shapes:
        return FileIdentity(Kind.UNKNOWN, reason="holds no tensors")
    # ControlNets and IP-Adapters have names of denoisers and LoRAs among theirs, so they come first.
    special = find_controlnet(header) or find_image_prompt(header)
    if special is not None:
        return special
    if (denoiser := find_denoiser(header)) is not None:
        return _with_parts(header, denoiser)
    if (lora := find_lora(header)) is not None:
        kind = Kind.CONTROL_LORA if lora.control else Kind.LORA
        return FileIdentity(
            kind, lora.families, lora.method, layout=lora.layout, parts=lora.parts, remarks=lora.remarks
        )
    part = find_text_encoder(header) or find_vae(header) or find_embedding(header) or find_upscaler(header)
    if part is not None:
        return part
    examples = ", ".join(shown(name, 60) for name in sorted(header.shapes)[:2])
    return FileIdentity(Kind.UNKNOWN, reason=f"is of no known kind; its tensors are named like {examples}")


def _with_parts(header: TensorHeader, denoiser: DenoiserFacts) -> FileIdentity:
    """The identity of a denoiser, or of a checkpoint if other parts are in the file."""
    parts = sorted({part for name, part in _PARTS.items() if name in header})
    variant, prediction, zero_snr = denoiser.variant, _prediction(header), "ztsnr" in header
    if denoiser.families == ("sdxl",) and not variant:
        variant = "playground-v2.5" if "edm_mean" in header else variant
        variant = "cosxl" if "edm_vpred.sigma_max" in header else variant
    task, remarks = denoiser.task, denoiser.remarks
    if "kontext" in header.metadata.get("modelspec.architecture", "").lower() and denoiser.families == ("flux",):
        variant, task, remarks = "kontext", ModelTask.EDIT, ()
    return FileIdentity(
        Kind.CHECKPOINT if parts else Kind.DENOISER,
        denoiser.families,
        variant,
        task,
        denoiser.layout,
        parts=("denoiser", *parts),
        in_channels=denoiser.in_channels,
        prediction=prediction,
        zero_snr=zero_snr,
        remarks=remarks,
        reason=denoiser.reason,
    )


def _prediction(header: TensorHeader) -> str:
    """The prediction type by marker tensors, or by ModelSpec metadata; empty if the file does not say."""
    if "v_pred" in header:
        return "v_prediction"
    named = header.metadata.get("modelspec.prediction_type", "").lower()
    return {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(named, "")
