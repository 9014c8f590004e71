"""Adapter files as trainers write them, in their own names, with the weights that merging them by hand gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

RANK, ALPHA = 3, 1.5
Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]


class Sample(NamedTuple):
    """The tensors of one layer by their endings, and the change of its weight that they mean."""

    tensors: Tensors
    delta: torch.Tensor


class Chance:
    """Reproducible random matrices."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, size: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * size


def _fan(shape: Shape) -> int:
    return math.prod(shape[1:])


def lora(shape: Shape, chance: Chance, down: str = "lora_down", up: str = "lora_up", alpha: bool = True) -> Sample:
    """LoRA, and LoCon for a convolution."""
    low, high = chance(RANK, *shape[1:], size=_fan(shape) ** -0.5), chance(shape[0], RANK, size=0.8)
    delta = torch.zeros(shape[0], _fan(shape))
    for rank in range(RANK):
        delta += torch.outer(high[:, rank], low[rank].flatten())
    named = {f"{down}.weight": low, f"{up}.weight": high.reshape(shape[0], RANK, *[1] * (len(shape) - 2))}
    if alpha:
        named["alpha"] = torch.tensor(ALPHA)
    return Sample(named, (delta * (ALPHA / RANK if alpha else 1)).reshape(shape))


def peft(shape: Shape, chance: Chance) -> Sample:
    """LoRA in PEFT's names."""
    return lora(shape, chance, "lora_A", "lora_B", alpha=False)


def tucker(shape: Shape, chance: Chance) -> Sample:
    """LoCon with a core: 1 × 1, the kernel, 1 × 1."""
    low, high, core = chance(RANK, shape[1], size=0.5), chance(shape[0], RANK, size=0.5), chance(RANK, RANK, 3, 3)
    delta = torch.zeros(shape)
    for first in range(RANK):
        for second in range(RANK):
            pair = torch.outer(high[:, first], low[second])
            delta += pair[:, :, None, None] * core[first, second]
    named = {"lora_down.weight": low[:, :, None, None], "lora_up.weight": high[:, :, None, None]}
    named |= {"lora_mid.weight": core, "alpha": torch.tensor(ALPHA)}
    return Sample(named, delta * ALPHA / RANK)


def loha(shape: Shape, chance: Chance) -> Sample:
    """The element-wise product of two products."""
    named: Tensors = {"alpha": torch.tensor(ALPHA)}
    delta = torch.ones(shape[0], _fan(shape))
    for number in (1, 2):
        first, second = chance(shape[0], RANK, size=1), chance(RANK, _fan(shape), size=_fan(shape) ** -0.25)
        named |= {f"hada_w{number}_a": first, f"hada_w{number}_b": second}
        delta *= torch.stack([torch.outer(first[:, rank], second[rank]) for rank in range(RANK)]).sum(0)
    return Sample(named, (delta * ALPHA / RANK).reshape(shape))


def loha_tucker(shape: Shape, chance: Chance) -> Sample:
    """LoHa of a convolution with cores."""
    named: Tensors = {"alpha": torch.tensor(ALPHA)}
    delta = torch.ones(shape)
    for number in (1, 2):
        first, second, core = chance(RANK, shape[0]), chance(RANK, shape[1], size=1), chance(RANK, RANK, 3, 3, size=1)
        named |= {f"hada_w{number}_a": first, f"hada_w{number}_b": second, f"hada_t{number}": core}
        part = torch.zeros(shape)
        for one in range(RANK):
            for other in range(RANK):
                part += torch.outer(first[one], second[other])[:, :, None, None] * core[one, other]
        delta *= part
    return Sample(named, delta * ALPHA / RANK)


def _blocks(first: torch.Tensor, second: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The Kronecker product, block by block."""
    delta = torch.zeros(shape)
    high, wide = second.shape[:2]
    for row in range(first.shape[0]):
        for column in range(first.shape[1]):
            delta[row * high : (row + 1) * high, column * wide : (column + 1) * wide] = first[row, column] * second
    return delta


def lokr(shape: Shape, chance: Chance) -> Sample:
    """A whole small half, and a large one of two factors, in the kernel's form for a convolution."""
    first, kernel = chance(4, 4, size=0.8), shape[2:]
    high, wide = shape[0] // 4, shape[1] // 4
    left, right = chance(high, RANK), chance(RANK, wide * math.prod(kernel), size=0.6)
    named = {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(ALPHA)}
    return Sample(named, _blocks(first, (left @ right).reshape(high, wide, *kernel), shape) * ALPHA / RANK)


def lokr_whole(shape: Shape, chance: Chance) -> Sample:
    """Both halves whole: alpha does not act."""
    first, second = chance(4, 4, size=0.8), chance(shape[0] // 4, shape[1] // 4, *shape[2:], size=0.2)
    named = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(ALPHA)}
    return Sample(named, _blocks(first, second, shape))


def lokr_tucker(shape: Shape, chance: Chance) -> Sample:
    """Both halves of factors, the large one with a core."""
    high, wide = shape[0] // 4, shape[1] // 4
    one, other = chance(4, RANK, size=1), chance(RANK, 4, size=1)
    left, right, core = chance(RANK, high), chance(RANK, wide, size=0.6), chance(RANK, RANK, *shape[2:])
    second = torch.zeros(high, wide, *shape[2:])
    for first_rank in range(RANK):
        for second_rank in range(RANK):
            second += (
                torch.outer(left[first_rank], right[second_rank])[:, :, None, None] * core[first_rank, second_rank]
            )
    named = {"lokr_w1_a": one, "lokr_w1_b": other, "lokr_w2_a": left, "lokr_w2_b": right, "lokr_t2": core}
    return Sample(named | {"alpha": torch.tensor(ALPHA)}, _blocks(one @ other, second, shape) * ALPHA / RANK)


def whole(shape: Shape, chance: Chance) -> Sample:
    """The difference itself, as fine-tunes are extracted."""
    delta = chance(*shape, size=0.3 * _fan(shape) ** -0.5)
    return Sample({"diff": delta}, delta)


Method = Callable[[Shape, Chance], Sample]
# The trainer's layer, and ours: component and path of each, in the order of the trainer's rows.
Layers = dict[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Trained:
    """A trainer's file: how it names a tensor of a layer, the layers, the method, and what it adds to each.

    `dora` is "rows" or "columns". `swapped` layers have their halves in the other order. `beside` cannot
    be used, and a remark has `said`.
    """

    name: Callable[[str, str], str]
    layers: Layers
    method: Method = lora
    dora: str = ""
    biases: bool = False
    swapped: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    said: str = ""

    def file(self, pipeline: Any) -> tuple[Tensors, dict[tuple[str, str], Callable[[float], Tensors]]]:
        """The tensors, and for each of our layers its weight and bias at a weight of the adapter."""
        tensors: Tensors = {name: torch.ones(4) for name in self.beside}
        merged: dict[tuple[str, str], Callable[[float], Tensors]] = {}
        for number, (layer, ours) in enumerate(self.layers.items()):
            chance = Chance(number)
            modules = [getattr(pipeline, part).get_submodule(path) for part, path in ours]
            own = [module.weight.detach().float() for module in modules]
            sample = self.method(tuple(torch.cat(own).shape), chance)
            named, delta, base = dict(sample.tensors), sample.delta, torch.cat(own)
            if layer in self.swapped:  # what the file says, in the trainer's order
                base = torch.cat(base.chunk(2)[::-1])
            changed = base + delta
            if self.dora:
                rows = changed if self.dora == "rows" else changed.transpose(0, 1)
                norm = rows.flatten(1).norm(dim=1)
                wished = norm * (1 + chance(len(norm), size=0.15))
                shape = [-1, 1] if self.dora == "rows" else [1, -1]
                named["dora_scale"] = wished.reshape(*shape, *[1] * (changed.ndim - 2))
                changed = changed * (named["dora_scale"] / norm.reshape(named["dora_scale"].shape))
            bias = chance(len(base), size=0.1)
            if self.biases:
                named["diff_b"] = bias
            tensors |= {self.name(layer, ending): tensor for ending, tensor in named.items()}
            step = changed - base
            step = torch.cat(step.chunk(2)[::-1]) if layer in self.swapped else step
            ends = [0, *torch.tensor([len(weight) for weight in own]).cumsum(0).tolist()]
            for place, (target, weight) in enumerate(zip(ours, own, strict=True)):
                part = slice(ends[place], ends[place + 1])
                extra = bias[part] if self.biases else None
                merged[target] = _merging(weight, step[part], modules[place].bias, extra)
        return tensors, merged


def _merging(weight: torch.Tensor, step: torch.Tensor, bias: Any, extra: Any) -> Callable[[float], Tensors]:
    def at(strength: float) -> Tensors:
        made = {"weight": weight + strength * step}
        return made if extra is None else {**made, "bias": bias.detach() + strength * extra}

    return at


def flat(prefix: str) -> Callable[[str, str], str]:
    """Kohya's way: underscores within the name of the layer."""
    return lambda layer, ending: f"{prefix}{layer.replace('.', '_')}.{ending}"


def dotted(prefix: str) -> Callable[[str, str], str]:
    """PEFT's way."""
    return lambda layer, ending: f"{prefix}{layer}.{ending}"


def xlabs(layer: str, ending: str) -> str:
    """XLabs' way: layers of a processor."""
    return f"{layer}.{ending.removeprefix('lora_')}"


def _own(component: str, *paths: str) -> Layers:
    return {path: ((component, path),) for path in paths}


_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET: Layers = _own(
    "unet", f"{_ATTENTION}.attn1.to_q", f"{_ATTENTION}.attn2.to_out.0", f"{_ATTENTION}.ff.net.0.proj",
    "mid_block.attentions.0.proj_in", "up_blocks.0.attentions.0.proj_out", "up_blocks.1.attentions.0.proj_in",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
)  # fmt: skip
CONVOLUTIONS: Layers = _own("unet", "down_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.0.conv2")
EVERYWHERE: Layers = UNET | CONVOLUTIONS | _own(
    "unet", "conv_in", "conv_out", "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.1.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv", "time_embedding.linear_1", "add_embedding.linear_2",
    "down_blocks.0.resnets.0.time_emb_proj",
)  # fmt: skip
# The same layers in the names of Stability's implementation.
STABILITY: Layers = {
    "input_blocks.3.1.transformer_blocks.0.attn1.to_q": (("unet", f"{_ATTENTION}.attn1.to_q"),),
    "input_blocks.3.1.proj_out": (("unet", "down_blocks.1.attentions.0.proj_out"),),
    "input_blocks.3.0.in_layers.2": (("unet", "down_blocks.1.resnets.0.conv1"),),
    "input_blocks.2.0.op": (("unet", "down_blocks.0.downsamplers.0.conv"),),
    "middle_block.1.proj_in": (("unet", "mid_block.attentions.0.proj_in"),),
    "middle_block.2.emb_layers.1": (("unet", "mid_block.resnets.1.time_emb_proj"),),
    "output_blocks.0.1.proj_in": (("unet", "up_blocks.0.attentions.0.proj_in"),),
    "output_blocks.1.2.conv": (("unet", "up_blocks.0.upsamplers.0.conv"),),
    "time_embed.2": (("unet", "time_embedding.linear_2"),),
    "label_emb.0.0": (("unet", "add_embedding.linear_1"),),
    "out.2": (("unet", "conv_out"),),
}
_DOUBLE, _SINGLE = "transformer_blocks.1", "single_transformer_blocks.2"
_QKV = tuple(("transformer", f"{_DOUBLE}.attn.{name}") for name in ("to_q", "to_k", "to_v"))
_ADDED = tuple(("transformer", f"{_DOUBLE}.attn.{name}") for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
_ALONE = tuple(("transformer", f"{_SINGLE}.attn.{name}") for name in ("to_q", "to_k", "to_v"))
BFL: Layers = {
    "double_blocks.1.img_attn.qkv": _QKV,
    "double_blocks.1.txt_attn.qkv": _ADDED,
    "double_blocks.1.img_attn.proj": (("transformer", f"{_DOUBLE}.attn.to_out.0"),),
    "double_blocks.1.txt_mlp.2": (("transformer", f"{_DOUBLE}.ff_context.net.2"),),
    "double_blocks.1.img_mod.lin": (("transformer", f"{_DOUBLE}.norm1.linear"),),
    "single_blocks.2.linear1": (*_ALONE, ("transformer", f"{_SINGLE}.proj_mlp")),
    "single_blocks.2.linear2": (("transformer", f"{_SINGLE}.proj_out"),),
    "single_blocks.2.modulation.lin": (("transformer", f"{_SINGLE}.norm.linear"),),
    "img_in": (("transformer", "x_embedder"),),
    "time_in.in_layer": (("transformer", "time_text_embed.timestep_embedder.linear_1"),),
    "final_layer.linear": (("transformer", "proj_out"),),
    "final_layer.adaLN_modulation.1": (("transformer", "norm_out.linear"),),
}
_TURNED = ("final_layer.adaLN_modulation.1",)
# Without the layer that marks control LoRAs, which widen it.
PLAIN_BFL: Layers = {name: ours for name, ours in BFL.items() if name != "img_in"}
PROCESSORS: Layers = {
    "double_blocks.1.processor.qkv_lora1": _QKV,
    "double_blocks.1.processor.proj_lora2": (("transformer", f"{_DOUBLE}.attn.to_add_out"),),
    "single_blocks.2.processor.qkv_lora": _ALONE,
    "single_blocks.2.processor.proj_lora": (("transformer", f"{_SINGLE}.proj_out"),),
}
FLUX: Layers = _own(
    "transformer", f"{_DOUBLE}.attn.to_q", f"{_DOUBLE}.ff.net.0.proj", f"{_SINGLE}.proj_mlp", f"{_SINGLE}.norm.linear"
)


def _clip(component: str) -> Layers:
    prefix = "text_model." if component == "text_encoder_2" else ""
    names = [f"encoder.layers.{at}.{name}" for at in (0, 1) for name in ("self_attn.v_proj", "mlp.fc1", "mlp.fc2")]
    return {f"text_model.{name}": ((component, prefix + name),) for name in names}


def _t5(pipeline_names: str = "encoder.block.0.layer.") -> Layers:
    return _own("text_encoder_2", f"{pipeline_names}0.SelfAttention.q", f"{pipeline_names}0.SelfAttention.o")


_NORM = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_norm1.diff"
_EMBEDDING = "bundle_emb.style.clip_l"
_CLIP_G = "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight"
# Trainer and format, by family. What is in `beside` cannot be used and is reported.
TRAINED: dict[str, dict[str, Trained]] = {
    "sdxl": {
        "kohya": Trained(flat("lora_unet_"), UNET),
        "kohya, Stability's names": Trained(flat("lora_unet_"), STABILITY),
        "kohya LoCon": Trained(flat("lora_unet_"), EVERYWHERE),
        "kohya LoCon with a core": Trained(flat("lora_unet_"), CONVOLUTIONS, tucker),
        "kohya, text encoder 1": Trained(flat("lora_te1_"), _clip("text_encoder")),
        "OneTrainer, text encoder 2": Trained(
            flat("lora_te2_"), _clip("text_encoder_2") | _own("text_encoder_2", "text_projection")
        ),
        "diffusers": Trained(dotted("unet."), UNET, peft),
        "ComfyUI": Trained(dotted("diffusion_model."), STABILITY),
        "LoHa": Trained(flat("lora_unet_"), UNET | CONVOLUTIONS, loha),
        "LoHa with cores": Trained(flat("lora_unet_"), CONVOLUTIONS, loha_tucker),
        "LoKr": Trained(flat("lora_unet_"), UNET | CONVOLUTIONS, lokr),
        "LoKr, both halves whole": Trained(flat("lycoris_"), UNET | CONVOLUTIONS, lokr_whole),
        "LoKr with a core": Trained(flat("lora_unet_"), CONVOLUTIONS, lokr_tucker),
        "DoRA by rows": Trained(flat("lora_unet_"), UNET | CONVOLUTIONS, dora="rows"),
        "DoRA by columns": Trained(flat("lora_unet_"), UNET | CONVOLUTIONS, dora="columns"),
        "DoRA of a LoHa": Trained(flat("lora_unet_"), UNET | CONVOLUTIONS, loha, dora="rows"),
        "whole differences with biases": Trained(
            flat("lora_unet_"), _own("unet", "conv_in", f"{_ATTENTION}.ff.net.2"), whole, biases=True
        ),
        "kohya with an embedding": Trained(flat("lora_unet_"), UNET, beside=(_EMBEDDING,), said="bundle_emb"),
        "kohya with a norm": Trained(flat("lora_unet_"), UNET, beside=(_NORM,), said="norm1"),
    },
    "flux": {
        "kohya": Trained(flat("lora_unet_"), PLAIN_BFL, swapped=_TURNED),
        "kohya, text encoders": Trained(flat("lora_te1_"), _clip("text_encoder")),
        "kohya, T5": Trained(flat("lora_te2_"), _t5()),
        "ai-toolkit": Trained(dotted("transformer."), FLUX, peft),
        "OneTrainer": Trained(flat("lora_transformer_"), FLUX),
        "ComfyUI": Trained(dotted("diffusion_model."), PLAIN_BFL, peft, swapped=_TURNED),
        "ComfyUI, text encoders": Trained(
            dotted("text_encoders.t5xxl.transformer."), _t5(), beside=(_CLIP_G,), said="mlp_fc1"
        ),
        "BFL": Trained(dotted(""), PLAIN_BFL, peft, swapped=_TURNED),
        "fal": Trained(dotted("base_model.model."), PLAIN_BFL, peft, swapped=_TURNED),
        "XLabs": Trained(xlabs, PROCESSORS, lambda shape, chance: lora(shape, chance, alpha=False)),
        "LoHa": Trained(flat("lora_unet_"), PLAIN_BFL, loha, swapped=_TURNED),
        "LoKr": Trained(flat("lycoris_"), PLAIN_BFL, lokr, swapped=_TURNED),
        "DoRA": Trained(flat("lora_unet_"), PLAIN_BFL, dora="rows", swapped=_TURNED),
    },
}  # fmt: skip


@contextmanager
def merging(pipeline: Any, layers: dict[Any, Any], weight_of: Callable[[str, str], float]) -> Iterator[None]:
    """Add a file's changes to a pipeline's weights, each with the weight of its part and path; then take them out."""
    before = []
    try:
        for (part, path), at in layers.items():
            module = getattr(pipeline, part).get_submodule(path)
            for name, value in at(weight_of(part, path)).items():
                parameter = getattr(module, name)
                before.append((parameter, parameter.detach().clone()))
                parameter.data.copy_(value)
        yield
    finally:
        for parameter, value in reversed(before):
            parameter.data.copy_(value)
