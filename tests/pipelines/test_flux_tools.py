"""FLUX.1 Fill and Kontext from transformer files with original names: what stock draws from the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from checkpoint_stand_ins import flux_pipeline, write
from drawing import draw, largest_difference
from model_files import FILES, write_safetensors
from original_names import transformer_tensors
from single_file_specs import T5_WORDS, split_flux
from stock_pictures import no_network
from test_single_files import narrow_converter, stock_transformer
from tiny_oracles import MASKED, TinyCase, request_for, stock_picture

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import Kind, ModelTask
from stable_diffusion_server.pipelines.library.identity import FileIdentity
from stable_diffusion_server.pipelines.loading.single_file import empty_checkpoint, load_checkpoint
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import LoadOptions, load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
__all__ = ["narrow_converter", "no_network"]  # pytest uses them here

FP32 = torch.float32


def row_of(variant: str, task: ModelTask) -> ModelSpec:
    """The row of a variant of FLUX.1."""
    row = family_row(FileIdentity(Kind.DENOISER, ("flux",), variant, task))
    assert row is not None
    return row


@pytest.mark.usefixtures("narrow_converter")
@pytest.mark.parametrize("kind", ["Fill", "Kontext"])
def test_a_transformer_file_draws_as_stock(kind: str, tmp_path: Path) -> None:
    """Beside VAE, CLIP-L and T5; Fill's 384 channels are read off the file."""
    small = flux_pipeline(3, guided=True, tokenizer=T5_WORDS, kind=kind)
    file = write(tmp_path / "flux.safetensors", transformer_tensors(small.transformer))
    row = row_of(kind.lower(), ModelTask.FILL if kind == "Fill" else ModelTask.EDIT)
    files = split_flux(small, tmp_path, file.name)
    spec = replace(row, checkpoint=files.checkpoint, folder=file.name, text_tokens=77)
    pipeline = load_checkpoint(spec, tmp_path, FP32)
    stock = getattr(diffusers, f"Flux{kind}Pipeline")(
        **{**pipeline.components, "transformer": stock_transformer(file, small, tmp_path, FP32)}
    )
    request = request_for(spec, **(MASKED if kind == "Fill" else {}))
    case = TinyCase("file", "flux", f"Flux{kind}Pipeline", arguments={"max_area": 64 * 64})
    expected = stock_picture(Flux(stock, spec), case, request)
    assert expected.std() > 5, "a flat picture would prove nothing"
    assert largest_difference(draw(Flux(pipeline, spec), request), expected) <= 2


def test_the_owner_says_what_the_tensors_do_not(tmp_path: Path) -> None:
    """dev, Krea and Kontext have the same tensors; Fill and schnell cannot be named so."""
    for name, shapes in (
        ("a", "flux-dev"),
        ("b", "flux-dev"),
        ("c", "flux-dev"),
        ("d", "flux-fill"),
        ("e", "flux-schnell"),
    ):
        write_safetensors(tmp_path / f"{name}.safetensors", FILES[shapes])
    for name, shapes in (("vae", "vae-flux"), ("clip_l", "clip-l"), ("t5", "t5xxl")):
        write_safetensors(tmp_path / f"{name}.safetensors", FILES[shapes])
    (tmp_path / "t5-tokenizer").symlink_to(T5_WORDS)
    for name, variant in (("b", "kontext"), ("c", "krea"), ("d", "kontext"), ("e", "kontext")):
        (tmp_path / f"{name}.toml").write_text(f'variant = "{variant}"\n')
    found = find_owned_models(tmp_path, (tmp_path,))
    assert dict(found.refused) == {}
    specs = {name: (spec.pipeline_class, spec.default_guidance) for name, spec in found.specs.items()}
    assert specs == {
        "a": ("FluxPipeline", 3.5),
        "b": ("FluxKontextPipeline", 2.5),
        "c": ("FluxPipeline", 4.5),
        "d": ("FluxFillPipeline", 30.0),
        "e": ("FluxPipeline", 0.0),
    }
    fill = empty_checkpoint(found.specs["d"], tmp_path)["transformer"]
    assert (fill.config.in_channels, fill.config.out_channels) == (384, 64)


@pytest.mark.parametrize(("name", "kind"), [("flux-fill", "Fill"), ("flux-kontext", "Kontext")])
def test_a_folder_is_found_loaded_and_drawn_as_stock(name: str, kind: str, tmp_path: Path) -> None:
    """By its class; a truncated part is refused by a sentence."""
    tiny_families.build(name).save_pretrained(tmp_path / "mine")
    found = find_owned_models(tmp_path, (tmp_path,))
    assert (dict(found.refused), found.remarks) == ({}, [])
    spec = replace(found.specs["mine"], cpu_dtype="float32", measured_dtype=False)
    registry = load(tmp_path, "cpu", 1, LoadOptions(models={"mine": spec}))
    assert registry.unusable == {}
    family = registry.residents["mine"].family
    request = request_for(spec, **(MASKED if kind == "Fill" else {}))
    case = TinyCase("folder", "flux", f"Flux{kind}Pipeline", arguments={"max_area": 64 * 64})
    assert largest_difference(draw(family, request), stock_picture(family, case, request)) <= 2
    weights = tmp_path / "mine" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="is truncated"):
        load(tmp_path, "cpu", 1, LoadOptions(models={"mine": spec}))


@pytest.mark.parametrize(("kind", "of"), [("Fill", "Kontext"), ("Kontext", "Fill")])
def test_a_transformer_of_the_other_kind_is_refused(kind: str, of: str, tmp_path: Path) -> None:
    """By its channels, in a sentence, when it is loaded."""
    small: Any = flux_pipeline(3, guided=True, tokenizer=T5_WORDS, kind=of)
    write(tmp_path / "flux.safetensors", transformer_tensors(small.transformer))
    row = row_of(kind.lower(), ModelTask.FILL if kind == "Fill" else ModelTask.EDIT)
    spec = replace(
        row, checkpoint=split_flux(small, tmp_path, "flux.safetensors").checkpoint, folder="flux.safetensors"
    )
    with pytest.raises(ModelLoadError, match="channels"):
        load_checkpoint(spec, tmp_path, FP32)
