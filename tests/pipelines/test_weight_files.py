"""Unusable weight files: each is reported with its name and reason, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import MODELS_DIR
from safetensors.torch import load_file, save_file

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.loading.components import empty_pipeline, load_controlnet, load_pipeline
from stable_diffusion_server.pipelines.registry import LoadOptions, load

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded SDXL to damage."""
    return Path(shutil.copytree(MODELS_DIR / "embedded-sdxl", tmp_path / "embedded-sdxl"))


def load_error(folder: Path, model: str = "sdxl") -> str:
    """The error of a model that cannot be loaded."""
    with pytest.raises(ModelLoadError) as refused:
        load_pipeline(MODELS[model], folder.parent, CPU)
    return refused.value.detail


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def to_bin(folder: Path) -> None:
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / UNET).unlink()


def to_dangling_link(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("../../blobs/0123")


def to_shards(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    listed = {f"w{n}": f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": listed}))


def to_shards_outside(folder: Path) -> None:
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": {"w": "../../other.safetensors"}}))


def to_scaled_fp8(folder: Path) -> None:
    save_file({"a.weight": torch.zeros(4), "a.scale_weight": torch.ones(1)}, folder / UNET)


def to_four_bits(folder: Path) -> None:
    save_file({"a.weight": torch.zeros(64, dtype=torch.uint8), "a.bias": torch.ones(1)}, folder / UNET)


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a pointer of git-lfs": (lambda f: (f / UNET).write_text(POINTER), (UNET, "pointer of git-lfs")),
    "a tokenizer that is a pointer of git-lfs": (
        lambda f: (f / "tokenizer_2" / "tokenizer.json").write_text(POINTER),
        ("tokenizer_2/tokenizer.json", "pointer of git-lfs"),
    ),
    "truncated": (
        lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:100_000]),
        (UNET, "truncated", "100,000 of"),
    ),
    "cut within its header": (
        lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:1000]),
        (UNET, "not a safetensors file, or not all of it"),
    ),
    "empty": (lambda f: (f / UNET).write_bytes(b""), (UNET, "is empty")),
    "a web page": (lambda f: (f / UNET).write_text("<!DOCTYPE html><html>Sign in"), (UNET, "web page")),
    "a pickle": (lambda f: torch.save({}, f / UNET), (UNET, "is a pickle")),
    "a folder": (lambda f: (f / UNET).unlink() or (f / UNET).mkdir(), ("unet", "diffusion_pytorch_model.safetensors")),
    ".bin only": (to_bin, ("unet holds diffusion_pytorch_model.bin", "only safetensors files are read")),
    "of another variant alone": (
        lambda f: (f / UNET).rename(f / "unet" / "diffusion_pytorch_model.non_ema.safetensors"),
        ("unet holds diffusion_pytorch_model.non_ema.safetensors",),
    ),
    "a link that leads nowhere": (to_dangling_link, (UNET, "link that leads nowhere")),
    "a missing shard": (to_shards, ("00002-of-00002.safetensors is missing",)),
    "a shard elsewhere": (to_shards_outside, ("no safetensors file beside it",)),
    "a missing part": (lambda f: shutil.rmtree(f / "text_encoder_2"), ("text_encoder_2/config.json",)),
    "a broken configuration": (lambda f: (f / "vae" / "config.json").write_text("{"), ("vae/config.json", "not JSON")),
    "quantized by bitsandbytes": (
        lambda f: change(f / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        ("unet is quantized by bitsandbytes",),
    ),
    "quantized by torchao": (
        lambda f: change(f / "text_encoder" / "config.json", quantization_config={"quant_method": "torchao"}),
        ("text_encoder is quantized by torchao",),
    ),
    "quantized by gguf": (
        lambda f: change(f / "unet" / "config.json", quantization_config={"quant_method": "gguf"}),
        ("unet is quantized by gguf",),
    ),
    "fp8 with factors": (to_scaled_fp8, (UNET, "quantized weights")),
    "of four bits, without saying so": (to_four_bits, (UNET, "quantized weights")),
    "of a class nobody knows": (
        lambda f: change(f / "model_index.json", text_encoder=["transformers", "ClipOfTomorrow"]),
        ("ClipOfTomorrow",),
    ),
}


@pytest.mark.fault(165)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(kind: str, folder: Path) -> None:
    """One sentence: the folder, the file in it, and the fault; without the path on the machine."""
    damage, words = BROKEN[kind]
    damage(folder)
    sentence = load_error(folder)
    assert sentence.startswith("The files in embedded-sdxl cannot be loaded")
    assert all(word in sentence for word in words), sentence
    assert str(folder.parent) not in sentence


@pytest.mark.fault(165)
def test_what_only_the_library_finds_is_reported_in_its_own_words(folder: Path) -> None:
    """An unknown tokenizer class: the library's message is part of ours."""
    (folder / "scheduler" / "scheduler_config.json").unlink()
    sentence = load_error(folder)
    assert "OSError" in sentence
    assert "scheduler_config.json" in sentence


@pytest.mark.fault(166)
@pytest.mark.parametrize(
    ("model", "part", "lacking"),
    [
        ("sdxl", "text_encoder", "layers.0."),
        ("sdxl", "text_encoder_2", "text_projection"),
        ("sdxl", "unet", "mid_block"),
        ("sdxl", "vae", "decoder.conv_out"),
        ("flux", "text_encoder", "final_layer_norm"),
        ("flux", "text_encoder_2", "block.0."),
        ("flux", "transformer", "proj_out"),
    ],
)
def test_a_part_that_lacks_weights_is_refused(model: str, part: str, lacking: str, tmp_path: Path) -> None:
    """Otherwise the libraries fill the gap with random numbers, different at each start."""
    folder = Path(shutil.copytree(MODELS_DIR / MODELS[model].folder, tmp_path / MODELS[model].folder))
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if lacking not in name}
    save_file(kept, file, metadata={"format": "pt"})
    assert f"{folder.name}/{part} lacks {len(tensors) - len(kept)} of its weights" in load_error(folder, model)


@pytest.mark.fault(166)
def test_an_encoder_of_another_size_is_refused(folder: Path) -> None:
    """Weights of other shapes are neither forced in nor replaced by random ones."""
    file = folder / "text_encoder" / "model.safetensors"
    save_file({name: tensor[:-1].clone() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert "embedded-sdxl/text_encoder lacks" in load_error(folder)


def widened(folder: Path, part: str, kind: Any, **changes: Any) -> None:
    """Give a network another shape, with matching weights."""
    kind.from_config({**kind.load_config(folder / part), **changes}).save_pretrained(folder / part)


@pytest.mark.fault(166)
def test_an_inpainting_network_is_refused_when_it_is_loaded(folder: Path) -> None:
    """Nine input channels in a text-to-image folder: otherwise each generation would be a 500."""
    import diffusers

    widened(folder, "unet", diffusers.UNet2DConditionModel, in_channels=9)
    assert "unet takes 9 channels" in load_error(folder)


@pytest.mark.fault(166)
def test_parts_of_different_models_are_refused(folder: Path) -> None:
    """A tiny VAE, a guidance-distilled network, the tokenizer of another encoder."""
    import diffusers

    whole = Path(shutil.copytree(folder, folder.parent / "kept"))
    diffusers.AutoencoderTiny(latent_channels=4).save_pretrained(folder / "vae")
    change(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    (folder / "vae" / "config.json").write_text(
        json.dumps({**json.loads((folder / "vae" / "config.json").read_text()), "force_upcast": False})
    )
    assert "vae holds a AutoencoderTiny" in load_error(folder).replace("an Auto", "a Auto")
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    widened(folder, "unet", diffusers.UNet2DConditionModel, time_cond_proj_dim=8)
    assert "distilled with its guidance" in load_error(folder)


@pytest.mark.fault(166)
def test_a_controlnet_that_cannot_be_used_costs_itself_alone(tmp_path: Path, one_thread: None) -> None:
    """Missing weights, a dangling link, quantized weights: reported, and the model works without it."""
    shutil.copytree(MODELS_DIR / "embedded-sdxl", tmp_path / "embedded-sdxl")
    facts = replace(MODELS["sdxl"], control_folder="edges")
    whole = MODELS_DIR / "embedded-controlnet-canny-sdxl"

    def lacking(edges: Path) -> None:
        file = edges / "diffusion_pytorch_model.safetensors"
        save_file(dict(list(load_file(file).items())[1:]), file, metadata={"format": "pt"})

    def quantized(edges: Path) -> None:
        change(edges / "config.json", quantization_config={"quant_method": "bitsandbytes"})

    def pointer(edges: Path) -> None:
        (edges / "diffusion_pytorch_model.safetensors").write_text(POINTER)

    for damage, words in ((lacking, "edges lacks 1 of its weights"), (quantized, "bitsandbytes"), (pointer, "git-lfs")):
        shutil.copytree(whole, tmp_path / "edges", dirs_exist_ok=True)
        damage(tmp_path / "edges")
        with pytest.raises(ModelLoadError, match=words):
            load_controlnet(facts, tmp_path, CPU)
    drawing = load(tmp_path, "cpu", 1, LoadOptions(models={"sdxl": facts}))
    (model,) = drawing.loaded
    assert not model.follows_edges
    assert "git-lfs" in model.remarks[0]
    assert drawing.models["sdxl"].control_folder is None


@pytest.mark.fault(165)
def test_a_model_that_cannot_be_used_costs_itself_alone(tmp_path: Path, one_thread: None) -> None:
    """The other family works; this one's reason is recorded. With none left, every reason is reported."""
    for name in ("embedded-sdxl", "embedded-flux", "embedded-controlnet-canny-flux"):
        shutil.copytree(MODELS_DIR / name, tmp_path / name)
    (tmp_path / "embedded-sdxl" / UNET).write_text(POINTER)
    drawing = load(tmp_path, "cpu", 1)
    assert [model.name for model in drawing.loaded] == ["flux"]
    assert "git-lfs" in drawing.unusable["sdxl"]
    shutil.rmtree(tmp_path / "embedded-flux" / "vae")
    with pytest.raises(ModelLoadError, match=r"git-lfs.*vae"):
        load(tmp_path, "cpu", 1)


@pytest.mark.fault(165)
def test_links_are_followed_wherever_they_lead(tmp_path: Path) -> None:
    """A folder that is a link into the hub's cache, whose files are links to blobs, is accepted."""
    blobs, cached = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted((MODELS_DIR / "embedded-flux").rglob("*"))):
        if file.is_file():
            link = cached / file.relative_to(MODELS_DIR / "embedded-flux")
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blobs / str(number))
            link.symlink_to(blobs / str(number))
    (cached / "README.md").symlink_to(blobs / "gone")
    models = tmp_path / "models"
    models.mkdir()
    (models / "embedded-flux").symlink_to(cached)
    parts = set(empty_pipeline(MODELS["flux"], models))
    # The embedded ControlNet, which is not below this folder, comes from the source tree.
    assert parts == {"text_encoder", "text_encoder_2", "transformer", "vae", "control"}
    assert load_pipeline(MODELS["flux"], models, CPU).transformer is not None
    (models / "embedded-flux").unlink()
    (models / "embedded-flux").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="embedded-flux is a link that leads nowhere"):
        load_pipeline(MODELS["flux"], models, CPU)


@pytest.mark.parametrize("halves", [("unet",), ("text_encoder", "text_encoder_2", "vae"), ("unet", "vae")])
def test_each_part_is_read_in_the_variant_it_has(halves: tuple[str, ...], folder: Path) -> None:
    """fp16 for some components only, and shards in diffusers' and transformers' naming."""
    import diffusers

    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    for name in halves:
        shutil.rmtree(folder / name)
        part = getattr(pipeline, name).to(torch.float16)
        part.save_pretrained(folder / name, variant="fp16", max_shard_size="2MB")
    loaded = load_pipeline(replace(MODELS["sdxl"], variant="fp16"), folder.parent, CPU)
    assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float32}
