"""Placement is a pure function: free memory and settings in, a decision out."""

from __future__ import annotations

import pytest

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.placement import Footprint, Offload, Quantize, Residency, place

GB = 1_000_000_000
# About FLUX.1-schnell in bfloat16, in round figures.
FLUX = Footprint(
    {"transformer": 24 * GB, "text_encoder_2": 10 * GB, "text_encoder": GB // 4, "vae": GB // 6},
    quantized=("transformer", "text_encoder_2"),
    layer=GB // 2,
    weight_bytes=2,
    working=2 * GB,
)


@pytest.mark.parametrize(
    ("free", "offload", "quantize", "expected"),
    [
        (80, "auto", "auto", "resident none"),
        (41, "auto", "auto", "resident none"),
        (40, "auto", "auto", "model none"),
        (29, "auto", "auto", "model none"),
        (28, "auto", "auto", "resident int8"),
        (22, "auto", "auto", "resident int8"),
        (20, "auto", "auto", "model int8"),
        (16, "auto", "auto", "model int8"),
        (15, "auto", "auto", "group none"),
        (4, "auto", "auto", "group none"),
        (3, "auto", "auto", "sequential none"),
        (80, "model", "auto", "model none"),
        (20, "model", "auto", "model int8"),
        (80, "group", "none", "group none"),
        (80, "sequential", "auto", "sequential none"),
        (80, "auto", "int8", "resident int8"),
        (80, "auto", "float8", "resident float8"),
        (20, "auto", "float8", "model float8"),
        (8, "auto", "none", "group none"),
        (28, "none", "auto", "resident int8"),
        (1, "none", "none", "resident none"),  # both explicit: obeyed, and loading will fail on the device
    ],
)
@pytest.mark.fault(52)
def test_on_an_accelerator_the_fastest_that_fits_is_taken(
    free: int, offload: Offload, quantize: Quantize, expected: str
) -> None:
    """Resident, model offload, quantized, layer offload: each where the one before does not fit or is not allowed."""
    placement = place(free * GB, FLUX, accelerated=True, offload=offload, quantize=quantize)
    assert f"{placement.residency} {placement.quantization}" == expected


@pytest.mark.parametrize(
    ("free", "quantize", "expected"),
    [(64, "auto", "resident none"), (30, "auto", "resident int8"), (64, "float8", "resident float8")],
)
def test_on_the_cpu_weights_have_nowhere_to_go(free: int, quantize: Quantize, expected: str) -> None:
    """Only quantization helps where device memory is system memory."""
    placement = place(free * GB, FLUX, accelerated=False, quantize=quantize)
    assert f"{placement.residency} {placement.quantization}" == expected


def test_more_memory_never_means_a_slower_placement() -> None:
    """The decision is monotone: resident unquantized at the top, one layer at a time at the bottom."""
    order = ["sequential none", "group none", "model int8", "resident int8", "model none", "resident none"]
    placements = [place(free * GB, FLUX, accelerated=True) for free in range(3, 100)]
    ranks = [order.index(f"{p.residency} {p.quantization}") for p in placements]
    assert ranks == sorted(ranks)
    assert set(ranks) == set(range(6))


def test_what_is_chosen_by_itself_fits() -> None:
    """A tenth of the free memory stays free."""
    for free in range(3, 100):
        assert place(free * GB, FLUX, accelerated=True).needed <= 0.9 * free * GB


@pytest.mark.parametrize("offload", ["model", "group", "sequential"])
def test_offloading_from_the_cpu_is_refused_in_a_sentence(offload: Offload) -> None:
    """The sentence names the setting, instead of diffusers' error about missing accelerators."""
    with pytest.raises(ModelLoadError, match=f"OFFLOAD={offload} needs an accelerator"):
        place(99 * GB, FLUX, accelerated=False, offload=offload)


@pytest.mark.fault(52)
def test_a_machine_that_is_too_small_is_reported_by_how_much() -> None:
    """The sentence has both sizes."""
    with pytest.raises(ModelLoadError, match=r"needs 19\.4 GB of memory, and 16\.0 GB are free"):
        place(16 * GB, FLUX, accelerated=False)


def test_finer_weights_take_one_byte_each() -> None:
    """Only the quantized components shrink, by the size of a weight as loaded."""
    shrunk = FLUX.shrunk()
    assert shrunk.parts["transformer"] == 12 * GB
    assert shrunk.parts["vae"] == FLUX.parts["vae"]
    assert shrunk.needed(Residency.RESIDENT) < FLUX.needed(Residency.RESIDENT)
