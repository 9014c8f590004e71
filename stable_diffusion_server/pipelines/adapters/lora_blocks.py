"""The blocks of a denoiser, by which a LoRA may have weights: those of sd-webui-lora-block-weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stable_diffusion_server.errors import InvalidInput

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_FLUX, _Z_IMAGE = "FluxTransformer2DModel", "ZImageTransformer2DModel"
_FLUX_IN = ("x_embedder", "context_embedder", "time_text_embed")
_FLUX_OUT = ("norm_out", "proj_out")
_INWARD, _OUTWARD = (tuple(f"{way}{number:02}" for number in range(12)) for way in ("IN", "OUT"))
# The lists for UNets by their length: SDXL's blocks with attention, SD 1.5's, all of SDXL's, all of SD 1.5's.
_LISTS: Mapping[int, tuple[str, ...]] = {
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *_OUTWARD[:6]),
    17: ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_OUTWARD[3:]),
    20: ("BASE", *_INWARD[:9], "M00", *_OUTWARD[:9]),
    26: ("BASE", *_INWARD, "M00", *_OUTWARD),
}


@dataclass(frozen=True, slots=True)
class Block:
    """A block: the beginnings of the paths of its layers, or the text encoders that it stands for.

    `attends`: it has attention to the prompt, and so a place in the short list.
    """

    name: str
    paths: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()
    attends: bool = True


def blocks_of(denoiser: Any) -> tuple[Block, ...]:
    """The blocks of a UNet, of FLUX.1 or of Z-Image, in the order of their weights; empty for other models."""
    if hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks"):
        return (Block("BASE", encoders=_ENCODERS), *_unet_blocks(denoiser))
    if type(denoiser).__name__ == _FLUX:
        double, single = len(denoiser.transformer_blocks), len(denoiser.single_transformer_blocks)
        return (
            Block("CLIP", encoders=_ENCODERS[:1]),
            Block("T5", encoders=_ENCODERS[1:2]),
            Block("IN", _FLUX_IN),
            *(Block(f"D{number:02}", (f"transformer_blocks.{number}",)) for number in range(double)),
            *(Block(f"S{number:02}", (f"single_transformer_blocks.{number}",)) for number in range(single)),
            Block("OUT", _FLUX_OUT),
        )
    if type(denoiser).__name__ == _Z_IMAGE:
        return tuple(Block(f"J{number:02}", (f"layers.{number}",)) for number in range(len(denoiser.layers)))
    return ()


def _unet_blocks(unet: Any) -> Iterator[Block]:
    """IN00 …, M00, OUT00 … as the original UNet counts them: one for each residual block and each downsampler."""
    yield Block("IN00", ("conv_in",), attends=False)
    count = 1
    for number, block in enumerate(unet.down_blocks):
        for place in range(len(block.resnets)):
            yield _with_attention(f"IN{count:02}", f"down_blocks.{number}", block, place)
            count += 1
        if getattr(block, "downsamplers", None):
            yield Block(f"IN{count:02}", (f"down_blocks.{number}.downsamplers",), attends=False)
            count += 1
    yield Block("M00", ("mid_block",))
    count = 0
    for number, block in enumerate(unet.up_blocks):
        for place in range(len(block.resnets)):
            found = _with_attention(f"OUT{count:02}", f"up_blocks.{number}", block, place)
            last = place == len(block.resnets) - 1  # the original has the upsampler in the last one
            paths = (*found.paths, f"up_blocks.{number}.upsamplers") if last else found.paths
            yield Block(found.name, paths, attends=found.attends)
            count += 1


def _with_attention(name: str, path: str, block: Any, place: int) -> Block:
    attends = bool(getattr(block, "attentions", None))
    paths = (f"{path}.resnets.{place}", *([f"{path}.attentions.{place}"] if attends else []))
    return Block(name, paths, attends=attends)


def weights_by_block(denoiser: Any, weights: Sequence[float]) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """What multiplies a LoRA's weight in each text encoder, and in each layer of the denoiser by its path.

    `weights` are one for all blocks, one for each, one for each with attention, or for a UNet 12, 17, 20 or 26 by the
    names of the extension's lists. Blocks that a list leaves out have none (0); layers that are in no block keep the
    LoRA's weight. Raises `InvalidInput` for another number of them.
    """
    blocks = blocks_of(denoiser)
    names = [block.name for block in blocks]
    lists = {
        **(_LISTS if "M00" in names else {}),
        sum(block.attends for block in blocks): [block.name for block in blocks if block.attends],
        len(blocks): names,
    }
    counts = sorted({*lists} - {0})
    if len(weights) == 1:
        by_name = dict.fromkeys(names, weights[0])
    elif len(weights) in counts:
        by_name = dict(zip(lists[len(weights)], weights, strict=True))
    elif not counts:
        raise InvalidInput("This model's LoRAs take one weight for all blocks.", field="lora")
    else:
        wanted = " or ".join(filter(None, (", ".join(map(str, counts[:-1])), str(counts[-1]))))
        raise InvalidInput(f"LoRAs of this model take {wanted} weights by block, not {len(weights)}.", field="lora")
    encoders = {name: by_name.get(block.name, 0.0) for block in blocks for name in block.encoders}
    starts = {path: by_name.get(block.name, 0.0) for block in blocks for path in block.paths}
    if not blocks:  # one weight for all of a model whose blocks are not known
        return dict.fromkeys(_ENCODERS, weights[0]), {path: weights[0] for path, _ in denoiser.named_modules()}
    layers = {}
    for path, _ in denoiser.named_modules():
        if (factor := _factor(path, starts)) is not None:
            layers[path] = factor
    return encoders, layers


def _factor(path: str, starts: Mapping[str, float]) -> float | None:
    names = path.split(".")
    beginnings = (".".join(names[:count]) for count in range(1, min(len(names), 4) + 1))
    return next((starts[one] for one in beginnings if one in starts), None)
