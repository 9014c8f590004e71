"""A LoRA's weights by block: the lists of the models as published, and pictures equal to weights merged by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from adapter_files import TRAINED, merging
from drawing import MODELS_DIR, draw, draw_together, job_for
from lora_layouts import write

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.adapters.lora_blocks import blocks_of, weights_by_block
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
# The extension's names of the blocks in its lists.
SD15_SHORT = "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11".split()
SDXL_SHORT = "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05".split()
FILES = {
    "sdxl": ("kohya", "kohya LoCon", "OneTrainer, text encoder 2"),
    "flux": ("kohya", "ai-toolkit", "kohya, text encoders"),
}
KINDS: dict[str, Any] = {"sdxl": Sdxl, "flux": Flux}


def unet(down: tuple[str, ...], up: tuple[str, ...]) -> Any:
    """A UNet of these blocks without weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            down_block_types=down, up_block_types=up, block_out_channels=(32,) * len(down), cross_attention_dim=32,
            norm_num_groups=8, attention_head_dim=4,
        )  # fmt: skip


SD15 = unet((CROSS_DOWN,) * 3 + (DOWN,), (UP,) + (CROSS_UP,) * 3)
SDXL = unet((DOWN, CROSS_DOWN, CROSS_DOWN), (CROSS_UP, CROSS_UP, UP))


@pytest.mark.parametrize(
    ("denoiser", "short", "ins", "outs"), [(SD15, SD15_SHORT, 12, 12), (SDXL, SDXL_SHORT, 9, 9)], ids=["SD 1.5", "SDXL"]
)
def test_the_lists_of_unets_are_those_of_the_extension(denoiser: Any, short: list[str], ins: int, outs: int) -> None:
    """Of 26 and 20 blocks, and of the 17 and 12 with attention."""
    blocks = blocks_of(denoiser)
    inward, outward = [f"IN{number:02}" for number in range(ins)], [f"OUT{number:02}" for number in range(outs)]
    assert [block.name for block in blocks] == ["BASE", *inward, "M00", *outward]
    assert [block.name for block in blocks if block.attends] == short


@pytest.mark.parametrize("denoiser", [SD15, SDXL], ids=["SD 1.5", "SDXL"])
def test_every_layer_of_a_unet_is_in_one_block(denoiser: Any) -> None:
    """But those of the timestep and the last, which keep the LoRA's weight."""
    blocks = blocks_of(denoiser)
    for path, _ in denoiser.named_modules():
        owners = [block.name for block in blocks for start in block.paths if f"{path}.".startswith(f"{start}.")]
        outside = not path or path.startswith(("time_", "conv_out", "conv_norm_out", "conv_act", "add_"))
        whole = path.count(".") < 3 and not owners  # a list of layers, or a block of several
        assert len(owners) == 1 or outside or whole, path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conv_in", "IN00"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "IN02"),
        ("down_blocks.1.downsamplers.0.conv", "IN06"),
        ("down_blocks.3.resnets.1.conv1", "IN11"),
        ("mid_block.attentions.0.proj_in", "M00"),
        ("up_blocks.0.resnets.0.conv1", "OUT00"),
        ("up_blocks.0.upsamplers.0.conv", "OUT02"),
        ("up_blocks.3.attentions.2.proj_out", "OUT11"),
    ],
)
def test_a_weight_reaches_its_block(path: str, name: str) -> None:
    """A list of 26 with one weight: that block's, and no other's."""
    names = [block.name for block in blocks_of(SD15)]
    _, layers = weights_by_block(SD15, [float(one == name) for one in names])
    assert layers[path] == 1
    assert {len(layers) > 0, layers["mid_block.resnets.0.conv1"] == (name == "M00")} == {True}


def test_flux_has_61_weights_and_others_none() -> None:
    """As many as the extension counts; a model whose blocks are not known takes one for all."""
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(num_attention_heads=1, attention_head_dim=8, axes_dims_rope=(2, 2, 4))
        other = diffusers.PixArtTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8)
    assert len(blocks_of(flux)) == 61
    assert blocks_of(other) == ()
    with pytest.raises(InvalidInput, match="one weight for all blocks"):
        weights_by_block(other, [1.0, 0.0])
    assert set(weights_by_block(other, [0.5])[1].values()) == {0.5}


def test_a_list_for_another_unet_is_read_by_its_names() -> None:
    """SD 1.5's 17 on SDXL: what it does not name has no weight, and a block that is not there is no matter."""
    _, layers = weights_by_block(SDXL, [float(number) for number in range(17)])
    assert layers["down_blocks.1.attentions.0.proj_in"] == 3
    assert layers["mid_block.resnets.0.conv1"] == 7
    assert layers["up_blocks.1.attentions.0.proj_in"] == 8
    assert layers["up_blocks.0.attentions.0.proj_in"] == layers["conv_in"] == 0


@pytest.mark.parametrize("count", [2, 16, 18, 25, 27, 100])
def test_another_number_of_weights_is_refused(count: int) -> None:
    """The sentence has the numbers that fit."""
    with pytest.raises(InvalidInput, match=f"take 12, 17, 20 or 26 weights by block, not {count}"):
        weights_by_block(SD15, [1.0] * count)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A family with files in a folder, one to merge weights into, and what the files change."""
    name, folder = request.param, tmp_path_factory.mktemp("adapters")
    pipelines = [load_pipeline(MODELS[name], MODELS_DIR, torch.device("cpu")) for _ in range(2)]
    changed = {}
    for number, trainer in enumerate(FILES[name]):
        tensors, layers = TRAINED[name][trainer].file(pipelines[1])
        write(folder / f"style{number}.safetensors", tensors)
        changed[f"style{number}"] = layers
    ours = KINDS[name](pipelines[0], MODELS[name], loras=LoraManager(pipelines[0], folder))
    # Merging is invisible to the prompt cache.
    return ours, KINDS[name](pipelines[1], MODELS[name], prompt_cache=PromptCache(0)), changed


def request_of(family: Any, **changes: Any) -> Any:
    quick = {"width": 64, "height": 64, "num_inference_steps": 2}
    return job_for(family.spec.name, **quick, **changes)


def test_parts_have_their_weights(pair: tuple[Any, Any, Any]) -> None:
    """In the encoders and by block: within one step of 255 of weights merged by hand, also in a batch."""
    ours, theirs, changed = pair
    denoiser = "unet" if ours.spec.name == "sdxl" else "transformer"
    network = getattr(ours.pipeline, denoiser)
    count = len(blocks_of(network))
    weights = [0.25 * (number % 5) for number in range(count)]
    encoders, layers = weights_by_block(network, weights)
    scale = 8.0 if ours.spec.name == "sdxl" else 1.0
    jobs, pictures, effects = [], [], []
    for style, changes in changed.items():
        text = f"te={-0.5 * scale:g}:lbw=" + ",".join(f"{weight:g}" for weight in weights)
        for parts, factors in ((text, (encoders, layers)), (f"te={-0.5 * scale:g}", ({}, {}))):

            def weight_of(part: str, path: str, factors: Any = factors) -> float:
                if part == denoiser:
                    return float(scale * factors[1].get(path, 1.0))
                return float(-0.5 * scale * factors[0].get(part, 1.0))

            job = request_of(ours, loras=((style, scale),), lora_parts=((style, parts),))
            drawn = draw(ours, job).astype(int)
            with merging(theirs.pipeline, changes, weight_of):
                expected = draw(theirs, request_of(theirs)).astype(int)
            assert abs(drawn - expected).max() <= 1, (style, parts)
            whole = draw(ours, request_of(ours, loras=((style, scale),))).astype(int)
            jobs, pictures = [*jobs, job], [*pictures, drawn]
            effects.append(abs(drawn - whole).max())
    assert max(effects) >= 2
    for together, alone in zip(draw_together(ours, jobs), pictures, strict=True):
        assert abs(together.astype(int) - alone).max() <= 1


def test_a_wrong_number_of_blocks_spoils_nothing(pair: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """Refused with the numbers that fit; the next request is drawn."""
    ours, *_ = pair
    with pytest.raises(InvalidInput, match="weights by block, not 3") as refused:
        ours.prepare(request_of(ours, loras=(("style0", 1.0),), lora_parts=(("style0", "lbw=1,0,1"),)))
    assert refused.value.field == "lora"
    assert draw(ours, request_of(ours, loras=(("style0", 1.0),))).std() > 0
