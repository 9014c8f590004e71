"""Recognises LoRAs and their relatives: method, layout and the model family they were trained for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from stable_diffusion_server.pipelines.library.file_headers import TensorHeader

# Last parts of tensor names, and the method that writes them; the first match counts.
_METHODS = (
    (("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), "lokr"),
    (("hada_w1_a", "hada_w2_a"), "loha"),
    (("oft_blocks", "oft_diag", "oft_R"), "oft"),
    (("on_input",), "ia3"),
    (("a1", "a1.weight", "b1.weight"), "glora"),
)
_DORA = ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight")
_HALVES = ("down.weight", "up.weight")
_KOHYA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
_PEFT = ("lora_A.weight", "lora_B.weight", "default.weight", "lora_A", "lora_B")
# Beginnings of the base model in metadata (kohya's ss_base_model_version, modelspec.architecture), in small letters.
_BASES = (
    ("sdxl", "sdxl"), ("stable-diffusion-xl", "sdxl"), ("sd_xl", "sdxl"), ("pony", "sdxl"), ("illustrious", "sdxl"),
    ("sd_v1", "sd15"), ("sd_1", "sd15"), ("stable-diffusion-v1", "sd15"), ("sd1", "sd15"),
    ("sd_v2", "sd2"), ("stable-diffusion-v2", "sd2"), ("sd3", "sd3"), ("stable-diffusion-3", "sd3"),
    ("flux2", "flux2"), ("flux-2", "flux2"), ("flux.2", "flux2"), ("flux1", "flux"), ("flux-1", "flux"),
    ("flux.1", "flux"),
    ("qwen", "qwen-image"), ("z-image", "z-image"), ("zimage", "z-image"), ("lumina", "lumina2"), ("chroma", "chroma"),
    ("wan", "wan"), ("hunyuan_video", "hunyuan-video"), ("hidream", "hidream"), ("krea2", "krea2"),
)  # fmt: skip
_INPUT = ("x_embedder.lora_A.weight", "img_in.lora_A.weight")
# Parts of names that occur in LoRAs for some families only; the first match counts.
_MARKS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("double_stream_blocks",), ("hidream",)),
    (("joint_blocks",), ("sd3",)),
    (("to_qkv_mlp_proj", "double_stream_modulation", "single_stream_modulation"), ("flux2",)),
    (("distilled_guidance_layer",), ("chroma",)),
    (("img_mod_lin", "txt_mod_lin", "modulation_lin"), ("flux", "hunyuan-video")),
    (("single_transformer_blocks", "double_blocks", "single_blocks"), ("flux", "flux2", "chroma")),
    (("img_mlp_net", "img_mod_1"), ("qwen-image",)),
    (("txtfusion", "text_fusion"), ("krea2",)),
    (("feed_forward_w1", "attention_to_q", "attention_qkv"), ("z-image", "lumina2")),
    (("llm_adapter",), ("anima",)),
    (("ffn_0", "ffn_2", "cross_attn_k_img"), ("wan",)),
    (("input_blocks_", "output_blocks_", "middle_block_", "down_blocks_", "up_blocks_", "mid_block_"), ("unet",)),
    (("transformer_blocks",), ("flux", "sd3", "qwen-image", "chroma")),
)
_FIRST_LEVEL = (
    "down_blocks_0_attentions", "up_blocks_3_attentions", "input_blocks_1_1_", "input_blocks_2_1_",
    "output_blocks_9_1_", "output_blocks_10_1_", "output_blocks_11_1_",
)  # fmt: skip
_DEEPER = tuple(f"transformer_blocks_{depth}_" for depth in range(1, 10))


class LoraFacts(NamedTuple):
    """Method (`lora`, `locon`, `dora`, `loha`, `lokr`, …), layout, families and parts of a LoRA."""

    method: str
    layout: str
    families: tuple[str, ...]
    parts: tuple[str, ...]
    control: bool = False
    remarks: tuple[str, ...] = ()


def find_lora(header: TensorHeader) -> LoraFacts | None:
    """The LoRA in these tensors; `None` if they are none."""
    method, layout = _method_of(header), _layout_of(header)
    if not method and not layout:
        return None
    families = _narrow(_families_of(header), header.metadata)
    control = families != ("flux2",) and _widens_input(header)
    if control or layout == "xlabs":  # both exist for Flux.1 only
        families = ("flux",)
    remarks: tuple[str, ...] = ()
    if len(families) != 1:
        known = ", ".join(families) or "a model that its tensors do not name"
        remarks = (f"Its tensors fit {known}; the header does not say which.",)
    layout = layout or ("kohya" if any(name.startswith(("lora_", "lycoris_")) for name in header.shapes) else "lycoris")
    return LoraFacts(method or "lora", layout, families, _parts_of(header), control, remarks)


def _method_of(header: TensorHeader) -> str:
    tails = header.tails
    for marks, method in _METHODS:
        if tails.intersection(marks):
            return method
    if not (tails.intersection(_KOHYA) or tails.intersection(_PEFT) or _is_old(header)):
        return ""
    if tails.intersection(_DORA):
        return "dora"
    convolutions = any(
        len(shape) == 4 and shape[-1] > 1 for name, shape in header.shapes.items() if "lora_down" in name
    )
    return "locon" if convolutions or "lora_mid.weight" in tails else "lora"


def _is_old(header: TensorHeader) -> bool:
    """Whether names end as diffusers' attention processors of 2023 or XLabs' processors do."""
    if header.tails.isdisjoint(_HALVES):
        return False
    return any(
        name.endswith((".down.weight", ".up.weight")) and ("_lora" in name or ".processor." in name or ".lora." in name)
        for name in header.shapes
    )


def _layout_of(header: TensorHeader) -> str:
    tails = header.tails
    if tails.intersection(_KOHYA):
        if any(name.startswith(("lora_", "lycoris_")) for name in header.shapes):
            return "kohya"
        return "diffusers" if header.heads & {"unet", "text_encoder", "transformer"} else "original"
    if tails.intersection(_PEFT):
        if "diffusion_model" in header.heads:
            return "comfyui"
        if "base_model" in header.heads:
            return "peft"
        return "diffusers" if header.heads & {"unet", "transformer", "text_encoder"} else "original"
    if _is_old(header):
        xlabs = any("double_blocks." in name or "single_blocks." in name for name in header.shapes)
        return "xlabs" if xlabs else "diffusers"
    return ""


def _families_of(header: TensorHeader) -> tuple[str, ...]:
    """Candidate families by names, then by widths."""
    text = _first_names(header.shapes)
    for marks, families in _MARKS:
        if any(mark in name for name in text for mark in marks):
            return _by_width(families, header)
    encoders = {name[:9] for name in text if name.startswith("lora_te")}
    if encoders:  # text encoders alone
        return ("sd15", "sd2") if "lora_te_t" in encoders else ("sdxl", "flux", "sd3")
    return ()


def _first_names(names: Iterable[str]) -> list[str]:
    """Names with dots as underscores, so that one list of marks serves both ways of writing."""
    return [name.replace(".", "_") for name in names]


def _by_width(families: tuple[str, ...], header: TensorHeader) -> tuple[str, ...]:
    if families == ("unet",):
        return _unet_families(header)
    if families == ("z-image", "lumina2"):
        widths = {side for shape in header.shapes.values() for side in shape}
        return ("z-image",) if 3840 in widths else ("lumina2",) if 2304 in widths else families
    if families == ("flux", "flux2", "chroma"):
        return _flux_families(header) or families
    return families


def _unet_families(header: TensorHeader) -> tuple[str, ...]:
    """SD attends at its first level and SDXL does not; SDXL has several transformer blocks in a row and SD one."""
    names = [name.replace(".", "_") for name in header.shapes]
    unet = [name for name in names if "text_" not in name]
    if any(mark in name for name in unet for mark in _FIRST_LEVEL):
        return {768: ("sd15",), 1024: ("sd2",)}.get(_context_width(header), ("sd15", "sd2"))
    deep = any(mark in name for name in unet for mark in _DEEPER)
    if deep or any(name.startswith(("lora_te1_", "lora_te2_", "text_encoder_2_")) for name in names):
        return ("sdxl",)
    by_width = {768: ("sd15",), 1024: ("sd2",), 2048: ("sdxl",)}
    return by_width.get(_context_width(header), ("sd15", "sd2", "sdxl"))


def _context_width(header: TensorHeader) -> int:
    """Width of the text embeddings: input side of a layer that projects them to keys; 0 without one."""
    for name, shape in header.shapes.items():
        keys = "attn2" in name and ("to_k" in name or "to_v" in name)
        if keys and ("lora_down" in name or "lora_A" in name or ".down." in name) and len(shape) >= 2:
            return shape[1]
    return 0


def _flux_families(header: TensorHeader) -> tuple[str, ...]:
    """Single blocks widen seven-fold in Flux.1 and nine-fold in Flux.2, feed-forward layers four- and six-fold."""
    for part, flux, flux2 in (("linear1", 7, 9), ("img_mlp_0", 4, 6), ("img_mlp.0", 4, 6)):
        for name, shape in header.shapes.items():
            if part in name and ("lora_up" in name or "lora_B" in name) and shape:
                other = name.replace("lora_up", "lora_down").replace("lora_B", "lora_A")
                ratio = shape[0] / (header.side(other, 1) or 1)
                if ratio in (flux, flux2):
                    return ("flux", "chroma") if ratio == flux else ("flux2",)
    if any("linear_in" in name or "linear_out" in name for name in header.shapes):
        return ("flux2",)
    split = any("proj_mlp" in name or "ff_context" in name or "norm.linear" in name for name in header.shapes)
    return ("flux", "chroma") if split else ()


def _narrow(families: tuple[str, ...], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The one of several candidates that the trainer's metadata names. Flux LoRAs fit Chroma by their names too."""
    if len(families) < 2:
        return families
    for key in ("modelspec.architecture", "ss_base_model_version"):
        named = metadata.get(key, "").lower()
        for start, family in _BASES:
            if named.startswith(start) and family in families:
                return (family,)
    return ("flux",) if families == ("flux", "chroma") else families


def _parts_of(header: TensorHeader) -> tuple[str, ...]:
    """The parts of a model that a LoRA changes."""
    parts: set[str] = set()
    for name in header.shapes:
        if name.startswith(("lora_te", "text_encoder")):
            second = name.startswith(("lora_te2_", "text_encoder_2"))
            third = name.startswith(("lora_te3_", "text_encoder_3"))
            parts.add("text_encoder_3" if third else "text_encoder_2" if second else "text_encoder")
        else:
            parts.add("denoiser")
    return tuple(sorted(parts))


def _widens_input(header: TensorHeader) -> bool:
    """Whether it is a control LoRA of Black Forest Labs, which takes a control image as further input channels."""
    return any(
        name.endswith("norm.query_norm.scale") or (name.endswith(_INPUT) and shape[-1:] == (128,))
        for name, shape in header.shapes.items()
    )
