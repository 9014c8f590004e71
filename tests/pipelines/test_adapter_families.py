"""LoRAs of SD 1.5, SD 3, FLUX.2 klein and Z-Image, and on quantized weights: drawn as weights merged by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from adapter_files import Layers, Trained, dotted, flat, loha, merging, peft
from drawing import draw, draw_together, largest_difference
from lora_layouts import write
from tiny_drawing import tiny_request, tiny_row

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.adapters.lora_deltas import base_weight
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.families.flux2_klein import Flux2Klein
from stable_diffusion_server.pipelines.families.sd3 import StableDiffusion3
from stable_diffusion_server.pipelines.families.sd15 import Sd15
from stable_diffusion_server.pipelines.families.z_image import ZImage
from stable_diffusion_server.pipelines.loading.placement import Quantization
from stable_diffusion_server.pipelines.loading.quantization import quantize_parts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

KINDS: dict[str, tuple[type[Any], tuple[str, str], str]] = {
    "sd15": (Sd15, ("sd15", ""), "sd15"),
    "sd3": (StableDiffusion3, ("sd3", ""), "sd3"),
    "klein": (Flux2Klein, ("flux2", "klein"), "flux2-klein"),
    "z-image": (ZImage, ("z-image", "turbo"), "z-image-turbo"),
}


def _ours(start: str, *names: str) -> tuple[tuple[str, str], ...]:
    return tuple(("transformer", f"{start}.{name}") for name in names)


def _same(component: str, *paths: str) -> Layers:
    return {path: ((component, path),) for path in paths}


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_FIRST, _ALONE = "transformer_blocks.0", "single_transformer_blocks.1"
KLEIN: Layers = {
    "double_blocks.0.img_attn.qkv": _ours(_FIRST, *_QKV),
    "double_blocks.0.txt_attn.qkv": _ours(_FIRST, *_ADDED),
    "double_blocks.0.img_attn.proj": _ours(_FIRST, "attn.to_out.0"),
    "double_blocks.0.txt_attn.proj": _ours(_FIRST, "attn.to_add_out"),
    "double_blocks.0.img_mlp.0": _ours(_FIRST, "ff.linear_in"),
    "double_blocks.0.txt_mlp.2": _ours(_FIRST, "ff_context.linear_out"),
    "single_blocks.1.linear1": _ours(_ALONE, "attn.to_qkv_mlp_proj"),
    "single_blocks.1.linear2": _ours(_ALONE, "attn.to_out"),
    "double_stream_modulation_img.lin": (("transformer", "double_stream_modulation_img.linear"),),
}
SD3: Layers = {
    "joint_blocks.0.x_block.attn.qkv": _ours(_FIRST, *_QKV),
    "joint_blocks.0.context_block.attn.qkv": _ours(_FIRST, *_ADDED),
    "joint_blocks.0.x_block.attn.proj": _ours(_FIRST, "attn.to_out.0"),
    "joint_blocks.0.context_block.mlp.fc1": _ours(_FIRST, "ff_context.net.0.proj"),
    "joint_blocks.1.x_block.mlp.fc2": _ours("transformer_blocks.1", "ff.net.2"),
    "joint_blocks.1.x_block.adaLN_modulation.1": _ours("transformer_blocks.1", "norm1.linear"),
}
Z_IMAGE: Layers = {
    "layers.1.attention.qkv": _ours("layers.1", *(f"attention.to_{name}" for name in "qkv")),
    "layers.1.attention.out": _ours("layers.1", "attention.to_out.0"),
    "noise_refiner.0.attention.qkv": _ours("noise_refiner.0", *(f"attention.to_{name}" for name in "qkv")),
    "context_refiner.0.attention.out": _ours("context_refiner.0", "attention.to_out.0"),
    "layers.0.feed_forward.w2": _ours("layers.0", "feed_forward.w2"),
}
_CROSS = "down_blocks.0.attentions.0.transformer_blocks.0"
SD15: Layers = _same(
    "unet", f"{_CROSS}.attn1.to_q", f"{_CROSS}.attn2.to_k", f"{_CROSS}.ff.net.0.proj", "down_blocks.1.resnets.0.conv1",
    "mid_block.attentions.0.proj_in", "up_blocks.1.attentions.0.proj_out",
)  # fmt: skip
_DIFFUSERS = {
    "sd3": (f"{_FIRST}.attn.to_q", f"{_FIRST}.attn.to_add_out", "transformer_blocks.1.ff.net.0.proj"),
    "klein": (f"{_FIRST}.attn.to_q", f"{_FIRST}.ff.linear_out", f"{_ALONE}.attn.to_out"),
    "z-image": ("layers.0.attention.to_q", "layers.1.feed_forward.w1", "noise_refiner.0.attention.to_v"),
}
TRAINED: dict[str, dict[str, Trained]] = {
    "sd15": {
        "kohya LoCon": Trained(flat("lora_unet_"), SD15),
        "LoHa": Trained(flat("lora_unet_"), SD15, loha),
        "DoRA": Trained(flat("lora_unet_"), SD15, dora="rows"),
    },
    **{
        family: {
            "original names": Trained(dotted("diffusion_model."), layers, peft),
            "kohya": Trained(flat("lora_unet_"), layers),
            "diffusers": Trained(dotted("transformer."), _same("transformer", *_DIFFUSERS[family]), peft),
            "LoHa": Trained(flat("lora_unet_"), layers, loha),
            "DoRA": Trained(flat("lora_unet_"), layers, dora="rows"),
        }
        for family, layers in (("sd3", SD3), ("klein", KLEIN), ("z-image", Z_IMAGE))
    },
}


@dataclass(frozen=True)
class Pair:
    """A family with a LoRA folder, and one with the same weights to merge into."""

    ours: Any
    merged: Any
    folder: Path


def made(name: str, folder: Path) -> Pair:
    kind, row, builder = KINDS[name]
    own, other = tiny_families.build(builder), tiny_families.build(builder)
    # Merging is invisible to the prompt cache.
    merged = kind(other, tiny_row(*row), prompt_cache=PromptCache(0))
    return Pair(kind(own, tiny_row(*row), loras=LoraManager(own, folder)), merged, folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Each family."""
    return {name: made(name, tmp_path_factory.mktemp(name)) for name in KINDS}


@pytest.mark.parametrize(("family", "trainer"), [(family, name) for family in TRAINED for name in TRAINED[family]])
def test_a_trainers_file_is_drawn_as_its_weights_merged_by_hand(
    family: str, trainer: str, pairs: dict[str, Pair]
) -> None:
    """At a positive and a negative weight, within one step of 255, and it shows."""
    pair = pairs[family]
    tensors, layers = TRAINED[family][trainer].file(pair.merged.pipeline)
    write(pair.folder / "style.safetensors", tensors)
    plain = draw(pair.merged, tiny_request(pair.merged.spec))
    effects = []
    for weight in (2.0, -1.5):
        with merging(pair.merged.pipeline, layers, lambda *_, weight=weight: weight):
            expected = draw(pair.merged, tiny_request(pair.merged.spec))
        drawn = draw(pair.ours, tiny_request(pair.ours.spec, loras=(("style", weight),)))
        assert largest_difference(drawn, expected) <= 1
        effects.append(largest_difference(drawn, plain))
    assert max(effects) >= 4


@pytest.mark.parametrize("family", KINDS)
def test_requests_with_other_loras_and_without_share_a_batch(family: str, pairs: dict[str, Pair]) -> None:
    """Each within one step of 255 of its picture alone, also two LoRAs in one request."""
    pair = pairs[family]
    for name in ("LoHa", "kohya LoCon" if family == "sd15" else "kohya"):
        tensors, _ = TRAINED[family][name].file(pair.merged.pipeline)
        write(pair.folder / f"{name.split()[0].lower()}.safetensors", tensors)
    sets = [(("kohya", 2.0),), (), (("loha", 1.0),), (("kohya", -1.0), ("loha", 0.5)), (("kohya", 2.0),)]
    jobs = [tiny_request(pair.ours.spec, loras=loras, seed=seed) for seed, loras in enumerate(sets)]
    alone = [draw(pair.ours, job) for job in jobs]
    for mixed, own in zip(draw_together(pair.ours, jobs), alone, strict=True):
        assert largest_difference(mixed, own) <= 1


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.FLOAT8])
@pytest.mark.parametrize("trainer", ["original names", "LoHa", "DoRA"])
def test_a_lora_on_quantized_weights_is_drawn_as_merged_into_what_they_stand_for(
    trainer: str, quantization: Quantization, tmp_path: Path
) -> None:
    """Packed int8 and quanto's float8, on the CPU: within 4 steps of 255 of unpacked weights plus the difference."""
    pair = made("klein", tmp_path)
    quantize_parts([pair.ours.pipeline.transformer], quantization, torch.device("cpu"))
    unpacked = dict(pair.merged.pipeline.transformer.named_modules())
    for path, layer in pair.ours.pipeline.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            unpacked[path].weight.data.copy_(base_weight(layer))
    plain = draw(pair.ours, tiny_request(pair.ours.spec))
    assert largest_difference(plain, draw(pair.merged, tiny_request(pair.merged.spec))) <= 4
    tensors, layers = TRAINED["klein"][trainer].file(pair.merged.pipeline)
    write(pair.folder / "style.safetensors", tensors)
    with merging(pair.merged.pipeline, layers, lambda *_: 2.0):
        expected = draw(pair.merged, tiny_request(pair.merged.spec))
    drawn = draw(pair.ours, tiny_request(pair.ours.spec, loras=(("style", 2.0),)))
    assert largest_difference(drawn, expected) <= 4
    assert largest_difference(drawn, plain) >= 8


@pytest.mark.parametrize("family", KINDS)
def test_a_file_of_another_family_is_refused(family: str, pairs: dict[str, Pair]) -> None:
    """By the field, with a sentence."""
    pair = pairs[family]
    other = next(name for name in KINDS if name != family)
    tensors, _ = TRAINED[other]["kohya LoCon" if other == "sd15" else "kohya"].file(pairs[other].merged.pipeline)
    write(pair.folder / "foreign.safetensors", tensors)
    with pytest.raises(InvalidInput, match=r"^foreign\.safetensors ") as refused:
        pair.ours.prepare(tiny_request(pair.ours.spec, loras=(("foreign", 1.0),)))
    assert refused.value.field == "lora"
