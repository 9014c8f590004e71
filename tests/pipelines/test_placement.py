"""Placement is a pure function: free memory and settings in, a decision out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from stable_diffusion_server.errors import ModelLoadError, ModelTooLarge
from stable_diffusion_server.pipelines.loading.placement import Footprint, Offload, Quantize, Residency, place

GB = 1_000_000_000
# About FLUX.1-schnell in bfloat16, in round figures.
FLUX = Footprint(
    {"transformer": 24 * GB, "text_encoder_2": 10 * GB, "text_encoder": GB // 4, "vae": GB // 6},
    quantized=("transformer", "text_encoder_2"),
    layer=GB // 2,
    weight_bytes=2,
    working=dict.fromkeys(("transformer", "text_encoder_2", "text_encoder", "vae"), 2 * GB),
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


def fits(placement: str, free: int, **more: Any) -> bool:
    """Whether Flux gets this placement, such as `model int8`, in so many bytes."""
    try:
        chosen = place(free, FLUX, accelerated=True, **more)
    except ModelTooLarge:
        return False
    return f"{chosen.residency} {chosen.quantization}" == placement


@pytest.mark.parametrize(
    ("offload", "quantize", "needed"),
    [
        ("none", "none", 34 * GB + GB // 4 + GB // 6 + 2 * GB),
        ("none", "int8", 17 * GB + GB // 4 + GB // 6 + 2 * GB),
        ("model", "none", 26 * GB),
        ("model", "int8", 14 * GB),
        ("group", "none", 3 * GB),
        ("sequential", "none", GB // 2 + 2 * GB),
    ],
)
def test_each_placement_fits_exactly_where_nine_tenths_hold_it(offload: Any, quantize: Any, needed: int) -> None:
    """At its edge on the device it is taken, a thousand bytes below it is not."""
    residency = "resident" if offload == "none" else offload
    edge = math.ceil(needed / 0.9)
    assert fits(f"{residency} {quantize}", edge, offload=offload)
    assert not fits(f"{residency} {quantize}", edge - 1000, offload=offload)


@pytest.mark.parametrize(
    ("offload", "quantize", "needed"),
    [("group", "none", 34 * GB + GB // 4 + GB // 6), ("model", "int8", 17 * GB + GB // 4 + GB // 6)],
)
def test_what_waits_in_the_machines_memory_has_to_fit_there(offload: Any, quantize: Any, needed: int) -> None:
    """Both settings explicit, and 80 GB on the device: the kernel would end the process, so a sentence says it."""
    edge = math.ceil(needed / 0.9)
    settings = {"accelerated": True, "offload": offload, "quantize": quantize}
    assert place(80 * GB, FLUX, host=edge, **settings).residency == offload
    with pytest.raises(ModelTooLarge, match=rf"needs {needed / GB:.1f} GB of the machine's memory \(RAM\).* are free"):
        place(80 * GB, FLUX, host=edge - 1000, **settings)


def test_files_of_the_right_dtype_are_mapped_and_need_no_ram_on_the_way() -> None:
    """Resident weights go from the file to the device; converted ones are in RAM first, int8 by half."""
    plain, converted = FLUX, replace(FLUX, converted=34 * GB)
    assert place(80 * GB, plain, accelerated=True, host=GB).residency == "resident"
    with pytest.raises(ModelTooLarge, match="RAM"):
        place(80 * GB, converted, accelerated=True, host=30 * GB)
    assert place(80 * GB, plain, accelerated=True, host=20 * GB, quantize="int8").residency == "resident"
    with pytest.raises(ModelTooLarge, match=r"needs 17\.0 GB of the machine's memory"):
        place(80 * GB, plain, accelerated=True, host=18 * GB, offload="none", quantize="int8")


def test_little_ram_leads_to_another_placement() -> None:
    """32 GB of RAM and a card of 15 GB: group offload would need 34 GB there, and the kernel would end the process."""
    assert fits("group none", 15 * GB, host=64 * GB)
    assert not fits("group none", 15 * GB, host=32 * GB)


def test_adapters_that_stay_loaded_count() -> None:
    """On the device, or with the denoiser that they travel with, and in RAM where that one waits."""
    laden = replace(FLUX, adapters=5 * GB, denoiser="transformer")
    for residency in (Residency.RESIDENT, Residency.MODEL):
        assert laden.needed(residency) == FLUX.needed(residency) + 5 * GB
    assert laden.on_host(Residency.MODEL, quantized=False) == FLUX.on_host(Residency.MODEL, quantized=False) + 5 * GB


def test_the_busiest_part_decides_where_parts_take_turns() -> None:
    """The VAE's work does not count beside the transformer, which is not there then."""
    busy = replace(FLUX, working={"vae": 20 * GB, "transformer": GB})
    assert busy.needed(Residency.MODEL) == 25 * GB
    assert busy.needed(Residency.RESIDENT) == sum(FLUX.parts.values()) + 20 * GB
    assert busy.needed(Residency.GROUP) == 2 * FLUX.layer + 20 * GB


def test_a_model_leaves_room_for_the_turn_of_the_one_before_it() -> None:
    """Another model's 20 GB while it draws: the weights of this one stay beside them, its activations do not."""
    need = sum(FLUX.parts.values()) + 20 * GB
    edge = math.ceil(need / 0.9)
    assert fits("resident none", edge, turn=20 * GB)
    assert not fits("resident none", edge - 1000, turn=20 * GB)
    assert fits("model none", edge - 1000, turn=20 * GB)


@pytest.mark.parametrize("quantize", ["int8", "float8", "torchao-int8"])
def test_moving_single_layers_of_quantized_weights_is_refused(quantize: Quantize) -> None:
    """Whatever is free; the sentence names both and what to take instead."""
    with pytest.raises(ModelLoadError, match=f"OFFLOAD=sequential cannot be combined with QUANTIZE={quantize}.*group"):
        place(99 * GB, FLUX, accelerated=True, offload="sequential", quantize=quantize)
