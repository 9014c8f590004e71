"""The dtype on a CPU follows from measured products, and a restart does not change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stable_diffusion_server.pipelines.catalog import MODELS, REAL_MODELS
from stable_diffusion_server.pipelines.loading import cpu_dtype
from stable_diffusion_server.pipelines.loading.cpu_dtype import WORTHWHILE, CpuDtypes, Layer, seconds_of
from stable_diffusion_server.pipelines.loading.packed_weights import PackedWeight, keep_half, pack_layers, to_int8

pytestmark = pytest.mark.slow

SDXL, FLUX = REAL_MODELS["sdxl"][1], REAL_MODELS["flux"][0]
MEMORY = 10**12


def parts(side: int = 2048, name: str = "unet") -> dict[str, torch.nn.Module]:
    """A denoiser of two linear layers and a convolution, without weights."""
    with torch.device("meta"):
        layers = (torch.nn.Linear(side, side), torch.nn.Linear(8, side), torch.nn.Conv2d(8, 16, 3))
        return {name: torch.nn.Sequential(*layers)}


class Stopwatch:
    """Measured seconds: 1 for fp32, `ratio` times less for bf16. Counts the measurements."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.layers: list[Layer] = []

    def __call__(self, layer: Layer, dtype: str) -> float:
        self.layers.append(layer)
        return 1.0 if dtype == "float32" else 1.0 / self.ratio


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(0.5, "float32"), (0.99 * WORTHWHILE, "float32"), (1.01 * WORTHWHILE, "bfloat16")]
)
def test_bf16_is_taken_where_it_is_clearly_faster(ratio: float, chosen: str, tmp_path: Path) -> None:
    """Just below and just above the bound. The layers measured are those that hold most of the weights."""
    watch = Stopwatch(ratio)
    spec = CpuDtypes(tmp_path / "dtypes.json", "auto", watch, MEMORY).choose(SDXL, parts())
    assert spec.cpu_dtype == chosen
    linear, convolution = ("linear", 2048, 2048, 1), ("convolution", 8, 16, 3)
    # Where bf16 is slow, convolutions would take seconds.
    assert {*watch.layers} == ({linear, convolution} if chosen == "bfloat16" else {linear})


def test_the_dtype_is_part_of_the_revision(tmp_path: Path) -> None:
    """Unless it is the one of the catalogue, so that stored images keep their names."""
    fast, slow = (CpuDtypes(tmp_path / f"{ratio}.json", "auto", Stopwatch(ratio), MEMORY) for ratio in (4, 0.5))
    assert fast.choose(SDXL, parts()).revision == f"{SDXL.revision}+bfloat16"
    assert slow.choose(SDXL, parts()) == SDXL
    assert fast.choose(FLUX, parts(name="transformer")) == FLUX
    assert slow.choose(FLUX, parts(name="transformer")).revision == f"{FLUX.revision}+float32"


def test_a_restart_keeps_the_choice(tmp_path: Path) -> None:
    """Even if it would measure otherwise; other layers are measured, and a damaged file is measured again."""
    file = tmp_path / "data" / "dtypes.json"
    assert CpuDtypes(file, "auto", Stopwatch(4), MEMORY).choose(SDXL, parts()).cpu_dtype == "bfloat16"
    other = Stopwatch(0.5)
    again = CpuDtypes(file, "auto", other, MEMORY)
    assert again.choose(SDXL, parts()).cpu_dtype == "bfloat16"
    assert other.layers == []
    assert again.choose(SDXL, parts(side=4096)).cpu_dtype == "float32"
    for damaged in ("{", "[1]", '{"x": "float16"}', "[" * 100_000):
        file.write_text(damaged)
        assert CpuDtypes(file, "auto", Stopwatch(0.5), MEMORY).choose(SDXL, parts()).cpu_dtype == "float32"


def test_a_folder_that_cannot_be_written_costs_a_measurement_only(tmp_path: Path) -> None:
    """The choice holds for this process."""
    (tmp_path / "file").write_text("")
    watch = Stopwatch(4)
    dtypes = CpuDtypes(tmp_path / "file" / "dtypes.json", "auto", watch, MEMORY)
    assert [dtypes.choose(SDXL, parts()).cpu_dtype for _ in range(2)] == ["bfloat16", "bfloat16"]
    assert len(watch.layers) == 4


def test_what_does_not_fit_in_fp32_is_bf16(tmp_path: Path) -> None:
    """By the machine's memory, not by what is free at the moment. Nothing is measured for it."""
    needed = 4 * sum(weight.numel() for weight in parts()["unet"].parameters())
    watch = Stopwatch(0.5)
    for memory, chosen in ((needed / 0.9 + 10, "float32"), (needed / 0.9 - 10, "bfloat16")):
        dtypes = CpuDtypes(tmp_path / f"{chosen}.json", "auto", watch, int(memory))
        assert dtypes.choose(SDXL, parts()).cpu_dtype == chosen


@pytest.mark.parametrize(("pack", "share"), [(keep_half, 0.51), (to_int8, 0.26)])
def test_packed_weights_fit_where_they_would_not_in_fp32(pack: Callable[..., PackedWeight], share: float) -> None:
    """MMAP_WEIGHTS and QUANTIZE=int8 leave the choice to the measurement in a half and a quarter of the memory."""
    needed = 4 * sum(weight.numel() for weight in parts()["unet"].parameters())
    packed = parts()
    pack_layers(packed["unet"].half(), pack)
    dtypes = CpuDtypes(None, "auto", Stopwatch(0.5), int(share * needed / 0.9))
    assert dtypes.choose(SDXL, packed).cpu_dtype == "float32"
    assert dtypes.choose(SDXL, parts()).cpu_dtype == "bfloat16"


def test_the_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large machine, a small container can use its own limit only."""
    monkeypatch.setattr(cpu_dtype, "total_host_memory", lambda: 1000)
    assert CpuDtypes(None, "auto", Stopwatch(0.5)).choose(SDXL, parts()).cpu_dtype == "bfloat16"


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_the_operators_dtype_is_taken_without_a_measurement(wanted: str) -> None:
    """CPU_DTYPE comes before the measurement, and a spec's own dtype before both; embedded models have theirs."""
    watch = Stopwatch(4)
    dtypes = CpuDtypes(None, wanted, watch, MEMORY)
    assert dtypes.choose(SDXL, parts()).cpu_dtype == wanted
    owners = replace(SDXL, cpu_dtype="float16", measured_dtype=False)
    assert dtypes.choose(owners, parts()) == owners
    assert dtypes.choose(MODELS["sdxl"], parts()) == MODELS["sdxl"]
    assert watch.layers == []


def test_small_models_and_other_callers_keep_the_catalogues_dtype() -> None:
    """Products of small matrices measure overhead; benchmarks and tests ask for no choice."""
    watch = Stopwatch(4)
    assert CpuDtypes(None, "auto", watch, MEMORY).choose(SDXL, parts(side=64)) == SDXL
    assert CpuDtypes(measure=watch).choose(SDXL, parts()) == SDXL
    assert watch.layers == []


@pytest.mark.parametrize("layer", [("linear", 64, 96, 1), ("convolution", 16, 8, 3), ("convolution", 16, 8, 1)])
def test_both_dtypes_can_be_measured_here(layer: Layer) -> None:
    """On whatever processor this is."""
    assert all(seconds_of(layer, dtype) > 0 for dtype in ("float32", "bfloat16"))
