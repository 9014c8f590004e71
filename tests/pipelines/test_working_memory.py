"""What a request needs beside the weights is counted, the count is that of real allocations, and the table is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from drawing import MODELS_DIR, draw, job_for

from benchmarks.full_size import VAE
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.loading.components import empty_pipeline
from stable_diffusion_server.pipelines.loading.footprint import Workload, architecture_of, vae_bytes, working_bytes
from stable_diffusion_server.pipelines.loading.live_bytes import peak_bytes
from stable_diffusion_server.pipelines.loading.working_memory import TABLE, Architecture, WorkingBytes
from stable_diffusion_server.pipelines.vae_tiles import VaeTiling

pytestmark = pytest.mark.slow

META = torch.device("meta")


@pytest.fixture(scope="module")
def embedded() -> dict[str, Architecture]:
    """The embedded models in fp32."""
    return {
        name: architecture_of(spec, empty_pipeline(spec, MODELS_DIR), torch.float32) for name, spec in MODELS.items()
    }


def allocated(compute: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator gave out at a time, by its own profiler."""
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        result = compute()
    del result
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_the_count_is_what_a_real_decoder_of_full_size_allocates(full_size_vae: Any, one_thread: None) -> None:
    """SDXL's VAE at its published size, 64²: the count, and up to half of it for oneDNN's copies.

    These are 44 % at 64², where weights are as large as activations, 30 % at 128² and 26 % at 256².
    """
    real, empty = full_size_vae
    counted = peak_bytes(lambda: empty.decode(torch.empty(1, 4, 8, 8, device=META), return_dict=False))
    taken = allocated(lambda: real.decode(torch.zeros(1, 4, 8, 8), return_dict=False))
    assert counted <= taken <= 1.5 * counted


@pytest.fixture(scope="module")
def full_size_vae() -> tuple[Any, Any]:
    """SDXL's VAE with weights of 0.01, and on the meta device."""
    with META:
        empty = AutoencoderKL.from_config(VAE)
        real = AutoencoderKL.from_config(VAE)
    real = real.to_empty(device="cpu").requires_grad_(False)
    for parameter in real.parameters():
        parameter.fill_(0.01)
    return real.eval(), empty


@pytest.mark.parametrize(("name", "part", "most"), [("sdxl", "unet", 1.6), ("flux", "transformer", 1.15)])
def test_the_count_is_what_a_real_denoiser_allocates(
    name: str, part: str, most: float, embedded: dict[str, Architecture], families: dict[str, Any], one_thread: None
) -> None:
    """One step of the embedded models without weights and with; oneDNN's copies are for the UNet's convolutions."""
    network = getattr(families[name].pipeline, part)
    inputs: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.update(kwargs)

    hook = network.register_forward_pre_hook(keep, with_kwargs=True)
    draw(families[name], job_for(name, width=256, height=256, num_inference_steps=1))
    hook.remove()
    empty = embedded[name].plain(part)
    on_meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(META), inputs)
    counted = peak_bytes(lambda: empty(**on_meta))
    assert 0.97 * counted <= allocated(lambda: network(**inputs)) <= most * counted


def test_views_and_results_written_in_place_take_no_memory() -> None:
    """Only new storages count, each once, and no longer than they live."""
    start = torch.empty(1000, device=META)
    assert peak_bytes(lambda: start.view(10, 100).t()[1:]) == 0
    assert peak_bytes(lambda: start.add_(1)) == 0
    assert peak_bytes(lambda: start + 1) == 4000
    assert peak_bytes(lambda: ((start + 1) + 1) + 1) == 8000  # a sum and the one before it


def test_attention_counts_as_one_fused_kernel() -> None:
    """The scores of 16384 tokens would take a gigabyte; the kernels of CUDA and the CPU hold a few rows of them."""
    one = torch.empty(1, 1, 16384, 512, device=META)
    counted = peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(one, one, one))
    assert counted == one.nbytes


def test_the_table_holds_what_is_counted_now(embedded: dict[str, Architecture]) -> None:
    """Of the embedded models; tests/pipelines/test_full_size.py compares those at full size."""
    for model in embedded.values():
        for part, stored in model.working_bytes.items():
            assert model.key(part) in TABLE.read_text()
            assert stored == model.count(part), part


def test_an_architecture_that_is_not_in_the_table_is_counted_once(
    embedded: dict[str, Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second checkpoint takes the figures of the first."""
    other = Architecture(embedded["sdxl"].parts, embedded["sdxl"].dtypes, text_tokens=33)
    assert other.key("unet") not in TABLE.read_text()
    first = other.working_bytes["unet"]
    monkeypatch.setattr(Architecture, "count", lambda *arguments: pytest.fail("counted twice"))
    again = Architecture(embedded["sdxl"].parts, embedded["sdxl"].dtypes, text_tokens=33)
    assert again.working_bytes["unet"] == first
    assert first.per_pixel == pytest.approx(embedded["sdxl"].working_bytes["unet"].per_pixel, rel=0.05)


def test_larger_images_batches_and_guidance_need_more(embedded: dict[str, Architecture]) -> None:
    """The largest image decides for the VAE; for the denoiser the batch, with two rows for each guided image."""

    def needed(work: Workload, name: str = "sdxl") -> dict[str, int]:
        return working_bytes(MODELS[name], embedded[name], work, VaeTiling())

    small, large = needed(Workload(1024**2)), needed(Workload(2048**2))
    assert large["vae"] == pytest.approx(4 * small["vae"], rel=0.01)
    assert needed(Workload(1024**2, 8))["unet"] == pytest.approx(8 * small["unet"], rel=0.01)
    assert needed(Workload(2048**2, 4))["unet"] == pytest.approx(large["unet"], rel=0.01)
    assert needed(Workload(1024**2, 8))["text_encoder"] == small["text_encoder"]
    without = Architecture(
        {name: part for name, part in embedded["sdxl"].parts.items() if name != "control"},
        embedded["sdxl"].dtypes,
        MODELS["sdxl"].text_tokens,
    )
    assert without.working_bytes["unet"].per_pixel < embedded["sdxl"].working_bytes["unet"].per_pixel


def test_a_decoding_in_tiles_takes_what_is_planned_for_it(full_size_vae: Any) -> None:
    """768² in four tiles of 512²: not more than planned, and not less than two thirds of it; half of the whole."""
    _, vae = full_size_vae
    need, tiling, pixels = WorkingBytes(0, 3072.25), VaeTiling(512**2, 512), 768**2

    def decode() -> object:
        with tiling.applied(vae, pixels):
            return vae.decode(torch.empty(1, 4, 96, 96, device=META), return_dict=False)

    planned = vae_bytes(need, tiling, pixels, 4)
    assert planned / 1.5 < peak_bytes(decode) <= planned < need.of(pixels) / 2
    image = torch.empty(1, 3, 768, 768, device=META)
    with tiling.applied(vae, pixels):
        assert peak_bytes(lambda: vae.encode(image)) <= planned
    assert not vae.use_tiling
