"""What a model file is: kind, model family, task, layout and precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class Kind(StrEnum):
    """The part that a file or folder plays."""

    PIPELINE = "pipeline"  # a folder with model_index.json
    CHECKPOINT = "checkpoint"  # denoiser with VAE, text encoders or both, in one file
    DENOISER = "denoiser"  # UNet or transformer alone
    VAE = "vae"
    TINY_VAE = "tiny-vae"  # TAESD
    TEXT_ENCODER = "text-encoder"
    IMAGE_ENCODER = "image-encoder"
    LORA = "lora"
    EMBEDDING = "embedding"  # textual inversion
    CONTROLNET = "controlnet"
    CONTROL_LORA = "control-lora"
    IMAGE_PROMPT = "image-prompt"  # IP-Adapter, Redux
    UPSCALER = "upscaler"
    UNKNOWN = "unknown"


class ModelTask(StrEnum):
    """What the denoiser of a model was trained for, beside text to image."""

    NORMAL = "normal"
    INPAINT = "inpaint"  # further input channels for mask and masked image
    REFINER = "refiner"
    FILL = "fill"
    EDIT = "edit"  # Kontext, InstructPix2Pix, Qwen-Image-Edit
    CONTROL = "control"  # the control image's latents are input channels: Flux Canny and Depth
    DEPTH = "depth"
    UPSCALE = "upscale"
    VIDEO = "video"


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a file or folder is, as its header or configuration says. Nothing is guessed.

    Attributes:
        kind: `Kind.UNKNOWN` when the header does not tell; `reason` says why.
        families: Model families, such as `sdxl`. Several where the header cannot tell them apart, none if unknown.
        variant: Model within the family (`schnell`, `dev`, `klein-4b`), or type of the part (`clip-l`, `dora`, `rrdb`).
        task: What the denoiser was trained for.
        layout: Naming scheme of the tensors: `original`, `diffusers`, `kohya`, `peft`, `comfyui`, `xlabs`, …
        precision: `fp32`, `fp16`, `bf16`, `fp8_e4m3`, `fp8_e5m2`, `int8`, `nf4`, … or a GGUF type such as `q4_k`.
        scaled: Whether fp8 weights have scale tensors ("scaled fp8"), which the loader must multiply in.
        container: `safetensors`, `gguf`, `folder`, `pickle`, or empty if unknown.
        parts: Parts of a checkpoint or pipeline: `denoiser`, `vae`, `clip_l`, `clip_g`, `t5`, …
        in_channels: Input channels of the denoiser or ControlNet, latent channels of a VAE, 0 if unknown.
        prediction: `epsilon`, `v_prediction`, or empty if the file does not say.
        zero_snr: Whether the file asks for zero terminal signal-to-noise ratio.
        pipeline_class: The class that the index of a pipeline's folder names, as it may be printed.
        metadata: ModelSpec and trainer metadata, bounded in number and length.
        remarks: What the header cannot tell, as sentences.
        reason: Why the file cannot be used, as a sentence; empty if it can.
    """

    kind: Kind
    families: tuple[str, ...] = ()
    variant: str = ""
    task: ModelTask = ModelTask.NORMAL
    layout: str = ""
    precision: str = ""
    scaled: bool = False
    container: str = ""
    parts: tuple[str, ...] = ()
    in_channels: int = 0
    prediction: str = ""
    zero_snr: bool = False
    pipeline_class: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    remarks: tuple[str, ...] = ()
    reason: str = ""

    @property
    def family(self) -> str:
        """The family if there is exactly one candidate, otherwise empty."""
        return self.families[0] if len(self.families) == 1 else ""


# Kinds that a request may name as its model.
DRAWING = (Kind.PIPELINE, Kind.CHECKPOINT, Kind.DENOISER)


class UnreadableModel(Exception):
    """A file's header cannot be read. The message is the reason, the end of a sentence about the file."""
