"""Weights in fewer bits on the CPU: mapped 16-bit weights change nothing, int8 changes little, and both are smaller."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_stand_ins import sdxl_pipeline, write
from drawing import draw, job_for, largest_difference, psnr
from original_names import sdxl_tensors
from single_file_specs import sdxl_spec

from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.family import LoadedFamily
from stable_diffusion_server.pipelines.loading.checkpoint_tensors import forget_pages
from stable_diffusion_server.pipelines.loading.footprint import bytes_of
from stable_diffusion_server.pipelines.loading.loader import LoadOptions, measure_model
from stable_diffusion_server.pipelines.loading.packed_weights import (
    PackedConv2d,
    PackedLinear,
    keep_half,
    pack_layers,
    to_int8,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


Load = Callable[..., LoadedFamily]


@pytest.fixture(scope="module")
def source() -> Any:
    """A small SDXL."""
    return sdxl_pipeline(3)


@pytest.fixture(scope="module")
def folder(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint in fp16."""
    place = tmp_path_factory.mktemp("models")
    write(place / "model.safetensors", sdxl_tensors(source), torch.float16)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Load:
    """Load the checkpoint as the server does, once for each set of options."""

    @functools.cache
    def load(**options: Any) -> LoadedFamily:
        spec = sdxl_spec(("denoiser", "model.safetensors"))
        return Sdxl.load(spec, folder, CPU, LoadOptions(performance="safe", **options))

    return load


def drawn(family: LoadedFamily) -> Any:
    """A picture of two steps."""
    return draw(family.family, job_for("sdxl", guidance_scale=5.0, num_inference_steps=2))


def layers(family: LoadedFamily, kind: type[torch.nn.Module], part: str = "unet") -> int:
    """How many layers of a kind a component has."""
    return sum(isinstance(layer, kind) for layer in family.networks[part].modules())


def test_mapped_halves_take_half_the_memory_and_change_nothing(loaded: Load) -> None:
    """Linear layers and convolutions keep 16 bits and compute in fp32: the same revision, the same picture."""
    plain, mapped = loaded(), loaded(mapped=True)
    assert layers(mapped, PackedLinear) > 20
    assert layers(mapped, PackedConv2d) > 10
    assert mapped.spec.revision == plain.spec.revision
    assert layers(mapped, PackedLinear, "text_encoder_2") > 20
    assert bytes_of(mapped.networks["unet"]) < 0.6 * bytes_of(plain.networks["unet"])
    assert largest_difference(drawn(mapped), drawn(plain)) <= 1


def test_int8_needs_no_package_on_the_cpu(loaded: Load) -> None:
    """A quarter of the denoiser, another revision, and nearly the same picture."""
    plain, small = loaded(), loaded(quantize="int8")
    assert bytes_of(small.networks["unet"]) < 0.4 * bytes_of(plain.networks["unet"])
    pictures = drawn(small), drawn(plain)
    assert psnr(*pictures) > 30
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("options", [{}, {"mapped": True}, {"quantize": "int8"}, {"mapped": True, "quantize": "int8"}])
def test_memory_is_known_before_a_load(options: dict[str, Any], folder: Path, loaded: Load) -> None:
    """From headers alone, for every way to store weights."""
    family = loaded(**options)
    spec = sdxl_spec(("denoiser", "model.safetensors"))
    foretold = sum(measure_model(spec, folder, CPU, LoadOptions(**options)).model.bytes.values())
    assert foretold == pytest.approx(bytes_of(*family.networks.values()), rel=0.02)


def test_folders_are_quantized_alike(source: Any, loaded: Load) -> None:
    """A network that is loaded whole gives the same integers as one that is packed while it is read."""
    plain, small = loaded(), loaded(quantize="int8")
    network = source.unet.half().float()  # the numbers that the file holds
    pack_layers(network, to_int8)
    assert plain.networks["unet"].dtype == small.networks["unet"].dtype == torch.float32
    read = dict(small.networks["unet"].named_parameters())
    assert all(torch.equal(read[name], weight) for name, weight in network.named_parameters() if "weight" in name)


def test_int8_is_off_by_half_a_level_at_most() -> None:
    """Rows of zeros, of one number, and of large and small ones keep their own scale."""
    rows = torch.stack(
        [torch.zeros(8), torch.full((8,), 3.0), torch.linspace(-1e4, 1e4, 8), torch.linspace(0, 1e-3, 8)]
    )
    unpacked = to_int8(rows).unpack(torch.float32)
    step = rows.abs().amax(1, keepdim=True) / 127
    assert torch.all((unpacked - rows).abs() <= 0.5001 * step)
    assert torch.equal(unpacked[0], rows[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_kept_without_a_copy(dtype: torch.dtype) -> None:
    """Bit by bit, in the file's own memory; fp32 is not taken."""
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = keep_half(weight)
    assert packed is not None
    assert packed.raw.data_ptr() == weight.data_ptr()
    assert torch.equal(packed.unpack(torch.float32), weight.flatten(1).float())
    assert keep_half(weight.float()) is None


def test_pages_of_a_mapped_file_are_read_again_when_needed(tmp_path: Path) -> None:
    """Dropping them loses nothing, also while another file is mapped."""
    from safetensors.torch import load_file, save_file

    written = {"a": torch.arange(100_000, dtype=torch.float32)}
    for name in ("one", "two"):
        save_file(written, tmp_path / name)
    one, two = (load_file(tmp_path / name)["a"] for name in ("one", "two"))
    forget_pages(tmp_path / "one")
    assert torch.equal(one, written["a"])
    assert torch.equal(two, written["a"])
