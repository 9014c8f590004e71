"""PERFORMANCE on an accelerator: the same images with other kernels and CUDA graphs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from drawing import MODELS_DIR, disc_mask, draw, draw_together, job_for, outline, psnr, scene

from stable_diffusion_server.pipelines.catalog import MODELS

pytestmark = [pytest.mark.slow, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

# The relative error of a tensor that was rounded once.
ROUNDING = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
# Rows, channels, groups, height and width: one pixel, channels that are no power of two, more than one chunk.
SHAPES = [(1, 48, 8, 1, 1), (2, 320, 32, 16, 24), (1, 2560, 32, 9, 7), (3, 128, 32, 200, 130), (1, 128, 32, 1024, 1024)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_are_normalised_as_by_pytorch(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """Equal to PyTorch's up to rounding, with and without SiLU, and the memory layout stays."""
    from stable_diffusion_server.pipelines.acceleration.group_norm import GroupNorm

    rows, channels, groups, height, width = shape
    norm = GroupNorm(groups, channels, device="cuda", dtype=dtype)
    given = 3 * torch.randn(rows, channels, height, width, device="cuda", dtype=dtype) + 2
    given = given.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        exact = torch.nn.functional.group_norm(given.double(), groups, norm.weight.double(), norm.bias.double())
        for made, wanted in ((norm(given), exact), (norm.activated(given), torch.nn.functional.silu(exact))):
            assert made.is_contiguous(memory_format=torch.channels_last)
            off = (made.double() - wanted).norm() / wanted.norm()
            assert off < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "time_channels"), [((64, 64), None), ((64, 96), 32), ((96, 64), None)], ids=str)
def test_blocks_that_take_channels_last_are_the_stock_blocks(
    channels: tuple[int, int], time_channels: int | None, dtype: torch.dtype
) -> None:
    """A residual block with and without a timestep, with the same and another number of channels, and an upsampler."""
    from stable_diffusion_server.pipelines.acceleration.channels_last import Resnet, Upsample, use_channels_last

    block = ResnetBlock2D(in_channels=channels[0], out_channels=channels[1], temb_channels=time_channels, groups=8)
    parts = torch.nn.ModuleList([block, Upsample2D(channels[1], use_conv=True)]).to("cuda", dtype)
    for parameter in parts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    given = torch.randn(2, channels[0], 9, 7, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    temb = None if time_channels is None else torch.randn(2, time_channels, device="cuda", dtype=dtype)
    exact = copy.deepcopy(parts).double()
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        wanted = exact[1](exact[0](given.double(), None if temb is None else temb.double()))
        use_channels_last(parts)
        assert [type(part) for part in parts] == [Resnet, Upsample]
        made = parts[1](parts[0](given, temb))
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert (made.double() - wanted).norm() / wanted.norm() < 4 * ROUNDING[dtype]


@pytest.fixture(scope="module", params=["safe", "layout,graphs"])
def faster(request: pytest.FixtureRequest) -> Any:
    """The embedded models on CUDA, without the compiler, which takes minutes."""
    from stable_diffusion_server.pipelines.registry import LoadOptions, load

    registry = load(MODELS_DIR, "cuda", 1, LoadOptions(performance=request.param))
    assert bool(registry._cuda_graphs) == ("graphs" in request.param)
    assert type(registry.residents["sdxl"].family.pipeline.vae.decoder.conv_norm_out).__module__.endswith("group_norm")
    return registry


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_every_task_draws_as_on_the_cpu(name: str, faster: Any, families: dict[str, Any]) -> None:
    """Twice, since the second run replays recorded passes."""
    for changes in (
        {},
        {"image": scene(), "strength": 0.6},
        {"image": scene(), "mask": disc_mask()},
        {"control": outline()},
        {"width": 192},
    ):
        job = job_for(name, **changes)
        wanted = draw(families[name], job)
        for _ in range(2):
            assert psnr(draw(faster, job), wanted) > 30, changes


@pytest.mark.parametrize("scheduler", MODELS["sdxl"].schedulers)
def test_every_scheduler_steps_as_on_the_cpu(scheduler: str, faster: Any, families: dict[str, Any]) -> None:
    """Stochastic schedulers draw their noise while the device computes."""
    job = job_for("sdxl", scheduler=scheduler, image=scene(), mask=disc_mask(), num_inference_steps=6)
    assert psnr(draw(faster, job), draw(families["sdxl"], job)) > 30


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_replayed_batches_are_those_drawn_alone(name: str, faster: Any) -> None:
    """Jobs leave early, so batches of three, two and one follow one another."""
    jobs = [replace(job_for(name, seed=seed), num_inference_steps=2 + seed) for seed in range(3)]
    alone = [draw(faster, job) for job in jobs]
    for _ in range(3):
        for made, wanted in zip(draw_together(faster, jobs), alone, strict=True):
            assert psnr(made, wanted) > 40


def test_what_was_recorded_is_given_back_and_recorded_again(faster: Any) -> None:
    """As after out-of-memory."""
    job = job_for("sdxl")
    before = draw(faster, job)
    faster.release_memory()
    for _ in range(3):
        assert psnr(draw(faster, job), before) > 40


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_products_in_float8_draw_nearly_the_same_picture(name: str, families: dict[str, Any]) -> None:
    """QUANTIZE=torchao-float8-dynamic, where the card and the packages support it."""
    pytest.importorskip("torchao")
    from stable_diffusion_server.pipelines.loading.quantization import FLOAT8_CAPABILITY
    from stable_diffusion_server.pipelines.registry import LoadOptions, load

    if torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        pytest.skip("the card multiplies no float8")
    options = LoadOptions(models={name: MODELS[name]}, quantize="torchao-float8-dynamic", performance="safe")
    ratio = psnr(draw(load(MODELS_DIR, "cuda", 1, options), job_for(name)), draw(families[name], job_for(name)))
    print(f"\n| {name} | torchao-float8-dynamic | {ratio:.1f} dB |")  # noqa: T201  # prints the table
    assert ratio > 25


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5])
def test_noise_of_a_card_is_drawn_on_the_cpu(seed: int) -> None:
    """Equal to CUDA's to rounding."""
    from stable_diffusion_server.pipelines.philox import gpu_noise

    card = torch.randn(1, 4, 64, 64, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    assert torch.allclose(card.cpu(), gpu_noise(seed, (1, 4, 64, 64)), atol=1e-5)
