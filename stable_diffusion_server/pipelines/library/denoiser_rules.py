"""Recognises denoisers (UNets and transformers) by the names and shapes of their tensors.

Names are those of each model's authors (`original`, as ComfyUI and Civitai have them) or of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from stable_diffusion_server.pipelines.library.file_headers import TensorHeader
from stable_diffusion_server.pipelines.library.identity import ModelTask

# Prefixes of a denoiser's tensors: in checkpoints, in ComfyUI's files, in NVIDIA's; none in the authors' own.
PREFIXES = ("model.diffusion_model.", "", "diffusion_model.", "net.", "model.", "transformer.", "unet.")
_VIDEO = ModelTask.VIDEO


@dataclass(frozen=True, slots=True)
class DenoiserFacts:
    """A recognised denoiser. `reason` says why it is of no known model although its architecture is known."""

    families: tuple[str, ...]
    layout: str
    variant: str = ""
    task: ModelTask = ModelTask.NORMAL
    in_channels: int = 0
    remarks: tuple[str, ...] = ()
    reason: str = ""


class _Named(NamedTuple):
    """A header whose tensor names begin with a prefix."""

    header: TensorHeader
    prefix: str

    def has(self, *names: str) -> bool:
        return all(self.prefix + name in self.header.shapes for name in names)

    def side(self, name: str, axis: int) -> int:
        return self.header.side(self.prefix + name, axis)


def find_denoiser(header: TensorHeader) -> DenoiserFacts | None:
    """The denoiser among these tensors; `None` without one."""
    for prefix in PREFIXES:
        named = _Named(header, prefix)
        for mark, build in _ORIGINAL + _DIFFUSERS:
            if named.has(*mark):
                return build(named)
    return None


def _simple(family: str, variant: str = "", task: ModelTask = ModelTask.NORMAL, layout: str = "original") -> _Builder:
    return lambda named: DenoiserFacts((family,), layout, variant, task)


def _flux2(named: _Named) -> DenoiserFacts:
    diffusers = named.has("x_embedder.weight")
    width = named.side("x_embedder.weight" if diffusers else "img_in.weight", 0)
    in_channels = named.side("x_embedder.weight" if diffusers else "img_in.weight", 1)
    layout = "diffusers" if diffusers else "original"
    guided = "time_guidance_embed.guidance_embedder.linear_1.weight" if diffusers else "guidance_in.in_layer.weight"
    if named.has(guided):
        return DenoiserFacts(("flux2",), layout, "dev", in_channels=in_channels)
    variant = {3072: "klein-4b", 4096: "klein-9b"}.get(width, "klein")
    remark = "The base and the distilled klein have the same tensors; a spec beside the file says which."
    return DenoiserFacts(("flux2",), layout, variant, in_channels=in_channels, remarks=(remark,))


def _flux(named: _Named) -> DenoiserFacts:
    return _flux_by(
        named.side("img_in.weight", 1),
        "original",
        guided=named.has("guidance_in.in_layer.weight") or named.has("guidance_in.in_layer.bias"),
    )


def _flux_diffusers(named: _Named) -> DenoiserFacts:
    guided = named.has("time_text_embed.guidance_embedder.linear_1.weight")
    return _flux_by(named.side("x_embedder.weight", 1), "diffusers", guided=guided)


def _flux_by(in_channels: int, layout: str, *, guided: bool) -> DenoiserFacts:
    """Input channels are latent channels times four: 64 for an image, more with a mask or a control image."""
    if in_channels == 384:
        return DenoiserFacts(("flux",), layout, "fill", ModelTask.FILL, in_channels)
    if in_channels == 128:
        remark = "Canny and Depth have the same tensors; a spec beside the file says which."
        return DenoiserFacts(("flux",), layout, "control", ModelTask.CONTROL, in_channels, (remark,))
    if in_channels != 64:
        reason = f"is a Flux with {in_channels} input channels, and 64, 128 and 384 are known"
        return DenoiserFacts(("flux",), layout, in_channels=in_channels, reason=reason)
    if not guided:
        return DenoiserFacts(("flux",), layout, "schnell", in_channels=in_channels)
    remark = "dev, Krea and Kontext have the same tensors; a spec beside the file says which."
    return DenoiserFacts(("flux",), layout, "dev", in_channels=in_channels, remarks=(remark,))


def _sd3(named: _Named) -> DenoiserFacts:
    if named.has("joint_blocks.37.x_block.mlp.fc1.weight"):
        return DenoiserFacts(("sd3",), "original", "3.5-large", in_channels=named.side("x_embedder.proj.weight", 1))
    medium = "3.5-medium" if named.has("joint_blocks.0.x_block.attn2.qkv.weight") else "3-medium"
    return DenoiserFacts(("sd3",), "original", medium, in_channels=named.side("x_embedder.proj.weight", 1))


def _wan(named: _Named) -> DenoiserFacts:
    in_channels = named.side("patch_embedding.weight", 1)
    variant = {16: "t2v", 36: "i2v", 48: "ti2v"}.get(in_channels, "")
    variant = "vace" if named.has("vace_blocks.0.after_proj.bias") else variant
    return DenoiserFacts(("wan",), "original", variant, ModelTask.VIDEO, in_channels)


def _cosmos(named: _Named) -> DenoiserFacts:
    anima = any(name.startswith(f"{named.prefix}llm_adapter.") for name in named.header.shapes)
    return DenoiserFacts(
        ("anima",) if anima else ("cosmos",), "original", in_channels=named.side("x_embedder.proj.1.weight", 1)
    )


def _cross_attention(named: _Named) -> DenoiserFacts:
    """PixArt, Sana and HunyuanDiT share these names."""
    if named.has("mlp_t5.0.weight"):
        return DenoiserFacts(("hunyuan-dit",), "original")
    if named.has("blocks.0.mlp.inverted_conv.conv.weight"):
        return DenoiserFacts(("sana",), "original")
    if named.has("blocks.0.mlp.fc1.weight"):
        return DenoiserFacts(("pixart",), "original", "alpha" if named.has("csize_embedder.mlp.0.weight") else "sigma")
    return DenoiserFacts((), "original", reason="has cross attention as PixArt and Sana have, and is neither")


def _unet(named: _Named) -> DenoiserFacts:
    """A latent diffusion UNet: levels with attention tell SDXL from SD, the width of its texts SD 1 from SD 2."""
    in_channels = named.side("input_blocks.0.0.weight", 1)
    width = named.side("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", -1)
    first_level = named.has("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    refiner = named.has("input_blocks.9.0.op.weight") or named.has("input_blocks.9.0.in_layers.0.weight")
    second_level = named.has("input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight")
    shape = _Unet(in_channels, width, first_level, named.has("label_emb.0.0.weight"), second_level, refiner)
    return _unet_by(shape, "original")


def _unet_diffusers(named: _Named) -> DenoiserFacts:
    in_channels = named.side("conv_in.weight", 1)
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    second = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    added = named.has("add_embedding.linear_1.weight")
    refiner = named.has("down_blocks.3.resnets.0.conv1.weight")
    shape = _Unet(in_channels, named.side(first, -1), named.has(first), added, named.has(second), refiner)
    if named.has("encoder_hid_proj.weight"):
        return DenoiserFacts(("kolors",), "diffusers", in_channels=in_channels)
    found = _unet_by(shape, "diffusers")
    if found.families == ("sdxl",) and named.has("time_embedding.cond_proj.weight"):
        return DenoiserFacts(("sdxl",), "diffusers", "lcm", found.task, in_channels)
    return found


class _Unet(NamedTuple):
    in_channels: int
    text_width: int
    attends_at_first_level: bool
    has_added_embedding: bool
    attends_at_second_level: bool
    has_fourth_level: bool


def _unet_by(unet: _Unet, layout: str) -> DenoiserFacts:
    task = {4: ModelTask.NORMAL, 9: ModelTask.INPAINT, 8: ModelTask.EDIT, 5: ModelTask.DEPTH, 7: ModelTask.UPSCALE}
    if unet.in_channels not in task:
        reason = f"has a UNet with {unet.in_channels} input channels, and 4, 5, 7, 8 and 9 are known"
        return DenoiserFacts((), layout, in_channels=unet.in_channels, reason=reason)
    purpose = task[unet.in_channels]
    if unet.has_added_embedding and not unet.attends_at_first_level:
        if unet.has_fourth_level:
            return DenoiserFacts(("sdxl",), layout, "refiner", ModelTask.REFINER, unet.in_channels)
        if unet.attends_at_second_level:
            return DenoiserFacts(("sdxl",), layout, "", purpose, unet.in_channels)
    if unet.attends_at_first_level and unet.text_width == 768 and not unet.has_added_embedding:
        return DenoiserFacts(("sd15",), layout, "", purpose, unet.in_channels)
    if unet.attends_at_first_level and unet.text_width == 1024:
        variant = "unclip" if unet.has_added_embedding else ""
        return DenoiserFacts(("sd2",), layout, variant, purpose, unet.in_channels)
    if purpose is ModelTask.UPSCALE:
        return DenoiserFacts(("sd2",), layout, "x4-upscaler", purpose, unet.in_channels)
    return DenoiserFacts((), layout, in_channels=unet.in_channels, reason="has a UNet of no known Stable Diffusion")


def _sd3_diffusers(named: _Named) -> DenoiserFacts:
    variant = "3.5-large" if named.has("transformer_blocks.37.attn.to_q.weight") else "medium"
    return DenoiserFacts(("sd3",), "diffusers", variant, in_channels=named.side("pos_embed.proj.weight", 1))


_Builder = Callable[[_Named], DenoiserFacts]
# Names that a denoiser has, and what builds its description. The first match counts, so narrower ones come first.
_ORIGINAL: tuple[tuple[tuple[str, ...], _Builder], ...] = (
    (("early_stream_modulations.image.lin.weight", "ref_time_in.in_layer.weight"), _simple("flux3", "distilled")),
    (("early_stream_modulations.image.lin.weight",), _simple("flux3")),
    (("single_stream_modulation.lin.weight",), _flux2),
    (("distilled_guidance_layer.in_proj.bias",), _simple("chroma")),
    (("distilled_guidance_layer.in_proj.weight",), _simple("chroma")),
    (("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",), _simple("hunyuan-video", task=_VIDEO)),
    (("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"), _flux),
    (("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"), _flux),
    (("joint_blocks.0.context_block.adaLN_modulation.1.bias",), _sd3),
    (("joint_blocks.0.context_block.adaLN_modulation.1.weight",), _sd3),
    (("double_layers.0.attn.w1q.weight",), _simple("auraflow")),
    (("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight"), _simple("z-image")),
    (("layers.0.adaLN_modulation.1.weight", "cap_embedder.0.weight"), _simple("lumina2")),
    (("txtfusion.projector.weight",), _simple("krea2")),
    (("txt_in.text_norm.weight",), _simple("qwen-image", "2.1")),
    (("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"), _simple("qwen-image", layout="diffusers")),
    (("double_stream_blocks.0.block.adaLN_modulation.1.bias",), _simple("hidream")),
    (("head.modulation", "patch_embedding.weight"), _wan),
    (("blocks.0.attn.qkv_x.weight",), _simple("mochi", task=_VIDEO)),
    (("av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1.weight",), _simple("ltx2", task=_VIDEO)),
    (("patchify_proj.weight", "scale_shift_table"), _simple("ltx-video", task=_VIDEO)),
    (("x_embedder.proj.1.weight",), _cosmos),
    (("blocks.0.cross_attn.q_linear.weight",), _cross_attention),
    (("mlp_t5.0.weight", "x_embedder.proj.weight"), _cross_attention),
    (("clip_txt_mapper.weight",), _simple("stable-cascade", "prior")),
    (("down_blocks.1.0.channelwise.0.weight",), _simple("stable-cascade", "decoder")),
    (("input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight", "out.2.weight"), _unet),
)
_DIFFUSERS: tuple[tuple[tuple[str, ...], _Builder], ...] = (
    (("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight", "x_embedder.weight"), _flux2),
    (("distilled_guidance_layer.in_proj.weight",), _simple("chroma", layout="diffusers")),
    (("all_x_embedder.2-1.weight",), _simple("z-image", layout="diffusers")),
    (
        ("time_text_embed.timestep_embedder.linear_1.weight", "x_embedder.weight", "context_embedder.weight"),
        _flux_diffusers,
    ),
    (
        ("pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight"),
        _sd3_diffusers,
    ),
    (("adaln_single.linear.weight", "pos_embed.proj.weight", "proj_out.weight"), _simple("pixart", layout="diffusers")),
    (
        ("condition_embedder.time_embedder.linear_1.weight", "patch_embedding.weight"),
        _simple("wan", task=_VIDEO, layout="diffusers"),
    ),
    (("conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"), _unet_diffusers),
)
