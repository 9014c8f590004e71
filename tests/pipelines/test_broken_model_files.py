"""What is wrong with a model's file is one sentence that names the file, the part and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import flux_pipeline, sdxl_pipeline, write
from original_names import Tensors, sdxl_tensors, transformer_tensors
from packed_files import gguf_file, quantize_q8_0
from single_file_specs import T5_WORDS, sdxl_spec, split_flux

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.single_file import empty_checkpoint, load_checkpoint

pytestmark = pytest.mark.slow

FP32 = torch.float32


@pytest.fixture(scope="module")
def sdxl_small() -> Any:
    """A small SDXL."""
    return sdxl_pipeline()


def without(start: str) -> Callable[[Tensors], Tensors]:
    """Drop the tensors whose names begin so."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


def with_more(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    """Add tensors to the UNet."""
    return lambda tensors: {**tensors, **{f"model.diffusion_model.{name}": tensor for name, tensor in more.items()}}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no VAE": (without("first_stage_model."), "holds no VAE"),
    "no CLIP-G": (without("conditioner.embedders.1."), "holds no CLIP-G"),
    "no UNet": (without("model.diffusion_model."), "holds no denoiser"),
    "half a UNet": (
        without("model.diffusion_model.out."),
        "denoiser in model.safetensors cannot be used: out.2.weight",
    ),
    "a layer missing": (
        without("model.diffusion_model.middle_block.0.out_layers.3"),
        "weights are missing (mid_block.resnets.0.conv2.bias",
    ),
    "packed integers": (
        with_more(**{"middle_block.1.proj_out.weight": torch.zeros(128, 64, dtype=torch.uint8)}),
        "holds packed integers",
    ),
    "a lone scale": (with_more(**{"out.2.scale_weight": torch.ones(1)}), "is the scale of a weight"),
    "an unknown format": (
        with_more(
            **{"out.2.comfy_quant": torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)}
        ),
        "says the format 'nvfp4'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(case: str, sdxl_small: Any, tmp_path: Path) -> None:
    """One sentence says which part of which file cannot be used, and why; nothing is drawn with random weights."""
    change, sentence = BROKEN[case]
    write(tmp_path / "model.safetensors", change(sdxl_tensors(sdxl_small)))
    with pytest.raises(ModelLoadError) as refused:
        load_checkpoint(sdxl_spec(("denoiser", "model.safetensors")), tmp_path, FP32)
    assert sentence in refused.value.detail
    assert str(tmp_path) not in refused.value.detail


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "zero bytes": (lambda data: b"", "is empty"),
    "truncated": (lambda data: data[: len(data) // 2], "is truncated"),
    "cut in its header": (lambda data: data[:50], "is not a safetensors file, or not all of it"),
    "a pickle": (lambda data: b"\x80\x02}q\x00.", "is a pickle under another name"),
    "a web page": (lambda data: b"<!DOCTYPE html>", "is a web page"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(case: str, tmp_path: Path) -> None:
    """Before anything is loaded, one sentence says what is wrong with the file."""
    change, sentence = DAMAGED[case]
    file = write(tmp_path / "model.safetensors", {"input_blocks.0.0.weight": torch.zeros(64, 4, 3, 3)})
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ModelLoadError) as refused:
        empty_checkpoint(sdxl_spec(("denoiser", "model.safetensors")), tmp_path)
    assert sentence in refused.value.detail
    assert "model.safetensors" in refused.value.detail


def test_a_truncated_gguf_file_is_named(tmp_path: Path) -> None:
    """Cut in its weights, cut in its header, and empty."""
    small = flux_pipeline(tokenizer=T5_WORDS)
    gguf_file(tmp_path / "flux.gguf", quantize_q8_0(transformer_tensors(small.transformer), "blocks.")[0], "flux")
    spec = split_flux(small, tmp_path, "flux.gguf")
    whole = (tmp_path / "flux.gguf").read_bytes()
    for data, sentence in ((whole[:-9], "truncated"), (whole[:900], "truncated within its header"), (b"", "empty")):
        (tmp_path / "flux.gguf").write_bytes(data)
        with pytest.raises(ModelLoadError) as refused:
            empty_checkpoint(spec, tmp_path)
        assert sentence in refused.value.detail
