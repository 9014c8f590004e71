"""Full-size models by their headers alone: files of many gigabytes, and names and shapes that are the networks' own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from model_files import FILES, write_safetensors
from single_file_specs import sdxl_spec

from stable_diffusion_server.pipelines.library import identify
from stable_diffusion_server.pipelines.loading.single_file import empty_checkpoint

pytestmark = pytest.mark.slow

FULL_SIZE = {"sdxl": 6.9e9, "flux-dev": 23.7e9, "klein-4b": 7.7e9, "z-image": 12.3e9}
FAMILY = {"sdxl": "sdxl", "flux-dev": "flux", "klein-4b": "flux2", "z-image": "z-image"}


def bytes_read(work: Callable[[], object]) -> int:
    """The bytes that this thread reads from files and pipes, cached or not."""

    def so_far() -> int:
        lines = Path("/proc/thread-self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    before = so_far()
    work()
    after = so_far()
    return after - before - (so_far() - after)  # the reading of the counter itself


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes in /proc")
@pytest.mark.parametrize("name", FULL_SIZE)
def test_only_the_header_of_a_file_of_many_gigabytes_is_read(name: str, tmp_path: Path) -> None:
    """As long as the real file, and all but the header is a hole; its weights are not touched."""
    file = write_safetensors(tmp_path / "model.safetensors", FILES[name], "BF16")
    facts = os.stat(file)
    assert facts.st_size > FULL_SIZE[name]
    assert facts.st_blocks * 512 < 1e6
    with file.open("rb") as source:
        header = 8 + int.from_bytes(source.read(8), "little")
    found = []
    amount = bytes_read(lambda: found.append(identify(file)))
    assert found[0].family == FAMILY[name]
    assert found[0].precision == "bf16"
    assert amount <= header + 2 * 131_072, "a buffer beyond each end of the header"


def on_meta(network_class: Any, **config: Any) -> dict[str, torch.Size]:
    """Names and shapes of a network that is never in memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in network_class(**config).state_dict().items()}


@pytest.mark.parametrize(
    ("name", "convert", "network"),
    [
        (
            "klein-4b",
            converters.convert_flux2_transformer_checkpoint_to_diffusers,
            lambda: on_meta(
                diffusers.Flux2Transformer2DModel,
                num_layers=5,
                num_single_layers=20,
                num_attention_heads=24,
                joint_attention_dim=7680,
                guidance_embeds=False,
            ),
        ),
        (
            "z-image",
            converters.convert_z_image_transformer_checkpoint_to_diffusers,
            lambda: on_meta(diffusers.ZImageTransformer2DModel),
        ),
        (
            "flux-dev",
            converters.convert_flux_transformer_checkpoint_to_diffusers,
            lambda: on_meta(diffusers.FluxTransformer2DModel, guidance_embeds=True),
        ),
    ],
)
def test_the_files_of_these_tests_have_the_names_and_shapes_of_the_networks(
    name: str, convert: Callable[..., Any], network: Callable[[], dict[str, torch.Size]]
) -> None:
    """By diffusers' own table, on tensors without numbers: none is missing, none is left over."""
    tensors = {key: torch.empty(shape, device="meta") for key, shape in FILES[name].items()}
    assert {key: tensor.shape for key, tensor in convert(tensors).items()} == network()


def test_a_full_size_sdxl_checkpoint_is_measured_by_its_header(tmp_path: Path) -> None:
    """UNet, VAE, both text encoders: every name and shape fits; the numbers of weights are the published ones."""
    file = write_safetensors(tmp_path / "model.safetensors", FILES["sdxl"])
    parts = empty_checkpoint(sdxl_spec(("denoiser", file.name)), tmp_path)
    numbers = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert numbers == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
