"""The values of PERFORMANCE; on a CPU, `safe` changes the matrix library and no visible pixel."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from drawing import draw, job_for

from stable_diffusion_server.app.warmup import warm_up
from stable_diffusion_server.pipelines.acceleration.apply import PRESETS, Optimization, optimizations_of
from stable_diffusion_server.pipelines.acceleration.onednn import OneDnnConv2d, OneDnnLinear, OneDnnUpsample, use_onednn
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.settings.loader import set_compiler_cache

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rows", [1, 31, 32, 500])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_by_onednn_is_the_layer(rows: int, bias: bool) -> None:
    """The same product up to rounding, for any number of rows, with the same parameters under the same names."""
    plain = torch.nn.Linear(48, 96, bias=bias)
    other = torch.nn.Linear(48, 96, bias=bias)
    other.load_state_dict(plain.state_dict())
    other.__class__ = OneDnnLinear
    given = torch.randn(2, rows, 48)
    with torch.inference_mode():
        torch.testing.assert_close(other(given), plain(given), rtol=1e-5, atol=1e-5)
    assert list(other.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    ("rows", "side", "stride", "padding"), [(1, 16, 1, 1), (2, 16, 1, 1), (1, 8, 2, 1), (1, 5, 1, 0)]
)
def test_a_convolution_by_onednn_is_the_convolution(rows: int, side: int, stride: int, padding: int) -> None:
    """Small and large, with and without stride."""
    plain = torch.nn.Conv2d(8, 16, 3, stride=stride, padding=padding)
    other = torch.nn.Conv2d(8, 16, 3, stride=stride, padding=padding)
    other.load_state_dict(plain.state_dict())
    other.__class__ = OneDnnConv2d
    given = torch.randn(rows, 8, side, side)
    with torch.inference_mode():
        torch.testing.assert_close(other(given), plain(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("rows", "height", "width"), [(1, 8, 8), (3, 5, 7), (2, 1, 1)])
def test_a_doubling_by_onednn_is_the_doubling(rows: int, height: int, width: int, layout: Any) -> None:
    """Up to rounding, also at the borders, and for another output size than the double."""
    plain = Upsample2D(16, use_conv=True)
    wanted, given = copy.deepcopy(plain), torch.randn(rows, 16, height, width).to(memory_format=layout)
    use_onednn(SimpleNamespace(components={"vae": Dtyped(plain)}), None)
    assert type(plain) is OneDnnUpsample
    with torch.inference_mode():
        torch.testing.assert_close(plain(given), wanted(given), rtol=1e-5, atol=1e-5)
        size = (2 * height + 1, 2 * width)
        torch.testing.assert_close(plain(given, size), wanted(given, size), rtol=1e-5, atol=1e-5)
    assert list(plain.state_dict()) == list(wanted.state_dict())


@pytest.mark.parametrize(
    "block",
    [Upsample2D(8), Upsample2D(8, use_conv_transpose=True), Upsample2D(8, use_conv=True, kernel_size=1, padding=0)],
)
def test_other_doublings_stay_as_they_are(block: Upsample2D) -> None:
    """Without a convolution, with a transposed one, or with another kernel size than the fused one supports."""
    use_onednn(SimpleNamespace(components={"vae": Dtyped(block)}), None)
    assert type(block) is Upsample2D


class Dtyped(torch.nn.Sequential):  # type: ignore[misc]  # torch is untyped here
    """Modules with a dtype attribute, like diffusers'."""

    dtype = torch.float32


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_a_model_that_was_warmed_up_draws_as_before(registry: Any, model: str) -> None:
    """Images are bit-exact."""
    job = job_for(model, seed=11)
    before = draw(registry, job)
    warm_up(registry, {model: MODELS[model]}, [(128, 128), (192, 128)], pairs=True)
    np.testing.assert_array_equal(draw(registry, job), before)


def test_compiled_code_is_kept_unless_the_user_said_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of the setting, or in that of the environment."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    set_compiler_cache(Path("data/compiled"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    set_compiler_cache(Path("data/compiled"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "data/compiled"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


@pytest.mark.parametrize("name", [*PRESETS, *Optimization])
def test_every_level_and_part_can_be_set(name: str) -> None:
    """Alone and combined; settings and pipelines know the same names."""
    for value in (name, f"safe,{name}"):
        settings = Settings(performance=value, _env_file=None)
        assert optimizations_of(settings.performance) >= optimizations_of(name)


@pytest.mark.parametrize("value", ["", "faster", "safe,", "safe fast", "SAFE", "safe,,fast"])
def test_other_names_are_refused_at_the_start(value: str) -> None:
    """The error names the setting and is not one of the pipelines' own."""
    with pytest.raises(ValueError, match="performance"):
        Settings(performance=value, _env_file=None)
    with pytest.raises(ValueError, match="is not a valid Optimization"):
        optimizations_of(value)


def test_levels_hold_one_another() -> None:
    """`fast` includes `safe`, and minutes of compilation need an explicit choice."""
    assert optimizations_of("off") == frozenset()
    assert optimizations_of("safe") < optimizations_of("fast")
    assert optimizations_of("fast,compile-whole") == frozenset(Optimization)
    assert optimizations_of("layout,tf32") == {Optimization.LAYOUT, Optimization.TF32}
