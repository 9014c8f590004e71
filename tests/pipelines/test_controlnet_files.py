"""ControlNets from single files, by original and by diffusers' names: equal to the folder form of the same weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoint_stand_ins import sd15_pipeline, sdxl_pipeline, write
from drawing import draw, largest_difference, outline
from original_names import controlnet_tensors, xlabs_tensors
from safetensors.torch import load_file, save_file
from tiny_families import build, z_image_control
from tiny_oracles import request_for
from tiny_parts import SIDE

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines import MODELS
from stable_diffusion_server.pipelines.families.sd15 import Sd15
from stable_diffusion_server.pipelines.loading.components import load_controlnet
from stable_diffusion_server.pipelines.loading.controlnet_file import controlnet_of_file
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")
LAYOUTS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "original": lambda network: {f"control_model.{name}": one for name, one in controlnet_tensors(network).items()},
    "original, without prefix": controlnet_tensors,
    "diffusers": lambda network: dict(network.state_dict()),
    "xlabs": xlabs_tensors,
}


@cache
def pipeline_of(family: str) -> Any:
    """A small SDXL or SD 1.5."""
    return sdxl_pipeline() if family == "sdxl" else sd15_pipeline(width=768)


@cache
def network_of(family: str) -> Any:
    """A small ControlNet of a family with weights everywhere."""
    if family in ("flux", "flux of XLabs"):
        hint = {"num_single_layers": 1} if family == "flux" else {"num_single_layers": 0, "guidance_embeds": True}
        network = diffusers.FluxControlNetModel(
            num_layers=2,
            num_attention_heads=1,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            conditioning_embedding_channels=None if family == "flux" else 16,
            **hint,
        )
    else:
        network = diffusers.ControlNetModel.from_unet(pipeline_of(family).unet)
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.05, generator=generator)
    return network


def spec_of(family: str, place: str) -> ModelSpec:
    return replace(MODELS["flux" if family.startswith("flux") else "sdxl"], control_folder=place, cpu_dtype="float32")


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((f, layout) for f in ("sd15", "sdxl") for layout in LAYOUTS if layout != "xlabs"),
        *(("flux", "diffusers"), ("flux of XLabs", "diffusers"), ("flux of XLabs", "xlabs")),
    ],
)
def test_a_file_is_the_network_of_its_folder(family: str, layout: str, tmp_path: Path) -> None:
    """Configuration and every weight; without its weights, the same shapes. No socket is opened."""
    network = network_of(family)
    network.save_pretrained(tmp_path / "folder")
    write(tmp_path / "file.safetensors", LAYOUTS[layout](network), None)
    by_folder = load_controlnet(spec_of(family, "folder"), tmp_path, CPU)
    by_file = load_controlnet(spec_of(family, "file.safetensors"), tmp_path, CPU)
    assert facts_of(by_file) == facts_of(by_folder)
    weights = by_folder.state_dict()
    assert by_file.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in by_file.state_dict().items())
    empty = controlnet_of_file(tmp_path / "file.safetensors", by_file.__class__.__name__, torch.float32, meta=True)
    assert {name: one.shape for name, one in empty.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    assert all(weight.is_meta for weight in empty.parameters())


def facts_of(network: Any) -> dict[str, Any]:
    """The configuration, without where it is from."""
    config = json.loads(json.dumps({name: one for name, one in network.config.items() if not name.startswith("_")}))
    # A list of equal numbers and the number are the same.
    for name in ("transformer_layers_per_block", "attention_head_dim"):
        value = config.get(name)
        config[name] = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
    return config


def test_the_owners_spec_names_a_file(tmp_path: Path) -> None:
    """Found in MODELS_DIR, counted, in the revision, and drawn as its folder is."""
    pipeline_of("sd15").save_pretrained(tmp_path / "mine")
    network = network_of("sd15")
    network.save_pretrained(tmp_path / "folder")
    write(tmp_path / "edges.safetensors", LAYOUTS["original"](network), None)
    (tmp_path / "mine.toml").write_text('native_size = [64, 64]\ndtype = "float32"\ncontrolnets = ["edges"]\n')
    found = find_owned_models(tmp_path, [tmp_path]).specs["mine"]
    loaded = load(tmp_path, "cpu", 1, LoadOptions(models={"mine": found}, performance="off")).residents["mine"]
    assert loaded.info.follows_edges, loaded.info.remarks
    assert loaded.spec.control_revision
    request = request_for(loaded.spec, control=outline(SIDE, SIDE), control_scale=0.8, num_inference_steps=2)
    drawn = draw(loaded.family, request)
    # Copied as the registry copies it: rounding depends on where weights of a mapped file begin.
    by_folder = copy.deepcopy(load_controlnet(replace(found, control_folder="folder"), tmp_path, CPU))
    assert largest_difference(drawn, draw(Sd15(loaded.family.pipeline, loaded.spec, by_folder), request)) == 0
    assert largest_difference(drawn, draw(loaded.family, replace(request, control=None))) > 2


def changed(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Any:
    return pytest.param(change, id=name)


@pytest.mark.parametrize(
    "change",
    [
        changed("lacks a weight", lambda tensors: tensors.pop("input_blocks.1.0.out_layers.3.bias")),
        changed("lacks a zero convolution", lambda tensors: tensors.pop("zero_convs.3.0.weight")),
        changed("has one too many", lambda tensors: tensors.update({"time_embed.9.weight": torch.ones(2)})),
        changed("another shape", lambda tensors: tensors.update({"time_embed.0.weight": torch.ones(2, 3)})),
        changed("a shape of no sides", lambda tensors: tensors.update({"input_hint_block.0.weight": torch.ones(())})),
        changed("a gap", lambda tensors: tensors.update({"input_blocks.99999999999.0.op.weight": torch.ones(2)})),
        changed("a long number", lambda tensors: tensors.update({f"input_blocks.{'9' * 5000}.0": torch.ones(2)})),
        changed("many hints", lambda tensors: tensors.update({"input_hint_block.900000.weight": torch.ones(2)})),
        changed(
            "many blocks",
            lambda tensors: tensors.update({f"input_blocks.{n}.0.op.weight": torch.ones(1) for n in range(12, 9000)}),
        ),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(
    change: Callable[[dict[str, torch.Tensor]], object], tmp_path: Path
) -> None:
    """Also where numbers in its names would make long lists."""
    tensors = {name: tensor.detach().clone() for name, tensor in controlnet_tensors(network_of("sd15")).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(ModelLoadError) as refused:
        load_controlnet(spec_of("sd15", "bad.safetensors"), tmp_path, CPU)
    assert refused.value.detail.startswith(("The files in bad.safetensors cannot be loaded", "bad.safetensors"))
    assert len(refused.value.detail) < 600
    assert str(tmp_path) not in refused.value.detail


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    """A VAE, a union, another class, Z-Image's, pickles, half a file, text."""
    write(tmp_path / "vae.safetensors", dict(build("sd15").vae.state_dict()), None)
    network = network_of("sd15")
    union = {**network.state_dict(), "task_embedding": torch.ones(2, 2)}
    write(tmp_path / "union.safetensors", union, None)
    write(tmp_path / "flux.safetensors", dict(network_of("flux").state_dict()), None)
    write(tmp_path / "z.safetensors", dict(z_image_control("").state_dict()), None)
    whole = write(tmp_path / "whole.safetensors", controlnet_tensors(network), None).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("no weights " * 40)
    torch.save(load_file(tmp_path / "whole.safetensors"), tmp_path / "pickle.pt")
    spec = spec_of("sd15", "")
    for name, control_class, words in (
        ("vae.safetensors", "ControlNetModel", "no ControlNet"),
        ("union.safetensors", "ControlNetModel", "union"),
        ("flux.safetensors", "ControlNetModel", "flux"),
        ("whole.safetensors", "FluxControlNetModel", "sd15"),
        ("z.safetensors", "ZImageControlNetModel", "diffusers folder"),
        ("half.safetensors", "ControlNetModel", "truncated"),
        ("text.safetensors", "ControlNetModel", "text.safetensors"),
        ("pickle.pt", "ControlNetModel", ".safetensors files"),
    ):
        with pytest.raises(ModelLoadError) as refused:
            load_controlnet(replace(spec, control_folder=name, control_class=control_class), tmp_path, CPU)
        assert words in refused.value.detail, refused.value.detail
        assert str(tmp_path) not in refused.value.detail
