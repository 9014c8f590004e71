"""What a model file is, by its header: each kind with the original tensor names and shapes of full size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from model_files import (
    FILES,
    LOKR,
    SCALED,
    SDXL_LAYERS,
    flux,
    kohya,
    linear,
    peft,
    prefixed,
    qwen3,
    sdxl_checkpoint,
    t5,
    write_gguf,
    write_safetensors,
)

from stable_diffusion_server.pipelines.library import FileIdentity, identify

SMALL_FLUX = flux(double=1, single=1)

# File → kind, families, variant, task.
EXPECTED = {
    "sdxl": ("checkpoint", "sdxl", "", "normal"),
    "sdxl-inpaint": ("checkpoint", "sdxl", "", "inpaint"),
    "sdxl-vpred": ("checkpoint", "sdxl", "", "normal"),
    "sdxl-unet": ("denoiser", "sdxl", "", "normal"),
    "sdxl-refiner": ("checkpoint", "sdxl", "refiner", "refiner"),
    "playground": ("checkpoint", "sdxl", "playground-v2.5", "normal"),
    "sd15": ("checkpoint", "sd15", "", "normal"),
    "sd15-inpaint": ("checkpoint", "sd15", "", "inpaint"),
    "sd15-pix2pix": ("checkpoint", "sd15", "", "edit"),
    "sd2": ("checkpoint", "sd2", "", "normal"),
    "flux-all": ("checkpoint", "flux", "schnell", "normal"),
    "flux-schnell": ("denoiser", "flux", "schnell", "normal"),
    "flux-dev": ("denoiser", "flux", "dev", "normal"),
    "flux-dev-comfy": ("denoiser", "flux", "dev", "normal"),
    "flux-fill": ("denoiser", "flux", "fill", "fill"),
    "flux-canny": ("denoiser", "flux", "control", "control"),
    "klein-4b": ("denoiser", "flux2", "klein-4b", "normal"),
    "klein-9b": ("denoiser", "flux2", "klein-9b", "normal"),
    "flux2-dev": ("denoiser", "flux2", "dev", "normal"),
    "z-image": ("denoiser", "z-image", "", "normal"),
    "sd35-large": ("denoiser", "sd3", "3.5-large", "normal"),
    "sd35-medium": ("denoiser", "sd3", "3.5-medium", "normal"),
    "qwen-image": ("denoiser", "qwen-image", "", "normal"),
    "sdxl-unet-diffusers": ("denoiser", "sdxl", "", "normal"),
    "flux-diffusers": ("denoiser", "flux", "dev", "normal"),
    "chroma": ("denoiser", "chroma", "", "normal"),
    "krea2": ("denoiser", "krea2", "", "normal"),
    "wan": ("denoiser", "wan", "t2v", "video"),
    "pixart": ("denoiser", "pixart", "sigma", "normal"),
    "sana": ("denoiser", "sana", "", "normal"),
    "auraflow": ("denoiser", "auraflow", "", "normal"),
    "lumina2": ("denoiser", "lumina2", "", "normal"),
    "hidream": ("denoiser", "hidream", "", "normal"),
    "anima": ("denoiser", "anima", "", "normal"),
    "hunyuan-video": ("denoiser", "hunyuan-video", "", "video"),
    "flux3": ("denoiser", "flux3", "", "normal"),
    "stable-cascade": ("denoiser", "stable-cascade", "prior", "normal"),
    "vae-sd": ("vae", "sd15 sd2 sdxl", "", "normal"),
    "vae-flux": ("vae", "flux sd3 z-image", "", "normal"),
    "vae-flux2": ("vae", "flux2", "", "normal"),
    "taesd": ("tiny-vae", "sd15 sd2 sdxl", "taesd", "normal"),
    "taesd-half": ("tiny-vae", "sd15 sd2 sdxl", "taesd", "normal"),
    "taesd-diffusers": ("tiny-vae", "sd15 sd2 sdxl", "taesd", "normal"),
    "clip-l": ("text-encoder", "", "clip-l", "normal"),
    "clip-g": ("text-encoder", "", "clip-g", "normal"),
    "open-clip-g": ("text-encoder", "", "clip-g", "normal"),
    "t5xxl": ("text-encoder", "", "t5-xxl", "normal"),
    "umt5": ("text-encoder", "", "umt5-xxl", "normal"),
    "qwen3": ("text-encoder", "", "qwen3-4b", "normal"),
    "clip-vision": ("image-encoder", "", "clip-vision", "normal"),
    "lora-sdxl": ("lora", "sdxl", "lora", "normal"),
    "lora-sd15": ("lora", "sd15", "lora", "normal"),
    "lora-flux": ("lora", "flux", "lora", "normal"),
    "lora-klein": ("lora", "flux2", "lora", "normal"),
    "lora-ai-toolkit": ("lora", "flux", "lora", "normal"),
    "lora-old": ("lora", "sdxl", "lora", "normal"),
    "lora-xlabs": ("lora", "flux", "lora", "normal"),
    "locon": ("lora", "sdxl", "locon", "normal"),
    "loha": ("lora", "sdxl", "loha", "normal"),
    "lokr": ("lora", "sdxl", "lokr", "normal"),
    "dora": ("lora", "sdxl", "dora", "normal"),
    "embedding-sd15": ("embedding", "sd15", "", "normal"),
    "embedding-sdxl": ("embedding", "sdxl", "", "normal"),
    "embedding-diffusers": ("embedding", "sd15", "", "normal"),
    "controlnet-sd15": ("controlnet", "sd15", "", "normal"),
    "controlnet-sdxl": ("controlnet", "sdxl", "", "normal"),
    "controlnet-diffusers": ("controlnet", "sdxl", "", "normal"),
    "controlnet-union": ("controlnet", "sdxl", "union", "normal"),
    "controlnet-flux": ("controlnet", "flux", "", "normal"),
    "controlnet-flux-union": ("controlnet", "flux", "union", "normal"),
    "control-lora": ("control-lora", "sdxl", "sai", "normal"),
    "control-lora-flux": ("control-lora", "flux", "lora", "normal"),
    "ip-adapter": ("image-prompt", "sdxl", "ip-adapter", "normal"),
    "ip-adapter-plus": ("image-prompt", "sd15", "ip-adapter-plus", "normal"),
    "redux": ("image-prompt", "flux", "redux", "normal"),
    "esrgan": ("upscaler", "", "rrdb", "normal"),
    "real-esrgan": ("upscaler", "", "rrdb", "normal"),
}


def summary(found: FileIdentity) -> tuple[str, str, str, str]:
    return found.kind.value, " ".join(found.families), found.variant, found.task.value


def test_every_kind_that_is_written_has_an_expectation() -> None:
    """The table names each file of `model_files.py`."""
    assert set(EXPECTED) == set(FILES)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_identified_by_its_header(tmp_path: Path, name: str) -> None:
    """Kind, families, variant and task; nothing is wrong with it."""
    found = identify(write_safetensors(tmp_path / "some name.safetensors", FILES[name]))
    assert (summary(found), found.reason, found.container) == (EXPECTED[name], "", "safetensors")


@pytest.mark.parametrize("name", EXPECTED)
def test_identification_does_not_depend_on_the_order_of_tensors(tmp_path: Path, name: str) -> None:
    """The same tensors sorted the other way round are the same model."""
    turned = dict(sorted(FILES[name].items(), reverse=True))
    assert summary(identify(write_safetensors(tmp_path / "a.safetensors", turned))) == EXPECTED[name]


def test_a_file_of_many_gigabytes_is_identified_without_reading_its_weights(tmp_path: Path) -> None:
    """Flux dev has 23.8 GB; the file here is as long, and all of it but the header is a hole."""
    file = write_safetensors(tmp_path / "flux1-dev.safetensors", FILES["flux-dev"], "BF16")
    facts = os.stat(file)
    assert facts.st_size > 23.7e9
    assert facts.st_blocks * 512 < 1e6
    assert (summary(identify(file)), identify(file).precision) == (EXPECTED["flux-dev"], "bf16")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sdxl", ("denoiser", "clip_g", "clip_l", "vae")),
        ("sdxl-refiner", ("denoiser", "clip_g", "vae")),
        ("sd15", ("denoiser", "clip_l", "vae")),
        ("sd2", ("denoiser", "clip_h", "vae")),
        ("flux-all", ("denoiser", "clip_l", "t5", "vae")),
        ("flux-dev", ("denoiser",)),
    ],
)
def test_a_checkpoint_names_its_parts(tmp_path: Path, name: str, parts: tuple[str, ...]) -> None:
    """The loader takes the others from elsewhere."""
    assert identify(write_safetensors(tmp_path / "a.safetensors", FILES[name])).parts == parts


def test_markers_of_v_prediction_and_zero_snr_are_read(tmp_path: Path) -> None:
    """NoobAI's v-prediction files have two empty marker tensors; other files say nothing of it."""
    found = identify(write_safetensors(tmp_path / "a.safetensors", FILES["sdxl-vpred"]))
    assert (found.prediction, found.zero_snr) == ("v_prediction", True)
    plain = identify(write_safetensors(tmp_path / "b.safetensors", FILES["sdxl"]))
    assert (plain.prediction, plain.zero_snr) == ("", False)
    declared = write_safetensors(tmp_path / "c.safetensors", FILES["sdxl"], metadata={"modelspec.prediction_type": "v"})
    assert identify(declared).prediction == "v_prediction"


def test_what_a_header_cannot_tell_is_said_and_not_guessed(tmp_path: Path) -> None:
    """Flux dev, Krea and Kontext have the same tensors; ModelSpec metadata may name Kontext."""
    found = identify(write_safetensors(tmp_path / "flux1-kontext-dev.safetensors", SMALL_FLUX))
    assert (found.variant, len(found.remarks)) == ("dev", 1)
    metadata = {"modelspec.architecture": "flux-1-kontext-dev"}
    named = identify(write_safetensors(tmp_path / "a.safetensors", SMALL_FLUX, metadata=metadata))
    assert summary(named) == ("denoiser", "flux", "kontext", "edit")
    for name in ("vae-sd", "vae-flux", "taesd"):
        found = identify(write_safetensors(tmp_path / f"{name}.safetensors", FILES[name]))
        assert (found.family, len(found.families) > 1) == ("", True)


@pytest.mark.parametrize(
    ("dtype", "more", "expected"),
    [
        ("F32", {}, ("fp32", False, "")),
        ("F16", {}, ("fp16", False, "")),
        ("BF16", {}, ("bf16", False, "")),
        ("F8_E4M3", {}, ("fp8_e4m3", False, "")),
        ("F8_E5M2", {}, ("fp8_e5m2", False, "")),
        ("F8_E4M3", SCALED, ("fp8_e4m3", True, "")),
        ("F8_E4M3", {"double_blocks.0.img_attn.qkv.weight_scale": ()}, ("fp8_e4m3", True, "")),
        ("I8", {"double_blocks.0.img_attn.qkv.weight_scale": ()}, ("int8", False, "int8")),
        ("U8", {"double_blocks.0.img_attn.qkv.weight.absmax": (3,),
                "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": (3,)}, ("nf4", False, "nf4")),
        ("U8", {"double_blocks.0.img_attn.qkv.weight_scale_2": ()}, ("nvfp4", False, "nvfp4")),
        ("I8", {"double_blocks.0.img_attn.qkv.wscales": (3,)}, ("svdquant (nunchaku)", False, "svdquant")),
    ],
)  # fmt: skip
def test_precision_is_reported_and_what_cannot_be_read_is_refused(
    tmp_path: Path, dtype: str, more: dict[str, tuple[int, ...]], expected: tuple[str, bool, str]
) -> None:
    """Scaled fp8 in both of ComfyUI's forms is distinguished from plain fp8; 4-bit schemes are refused by name."""
    found = identify(write_safetensors(tmp_path / "a.safetensors", SMALL_FLUX | more, dtype))
    name, scaled, reason = expected
    assert (found.kind.value, found.precision, found.scaled) == ("denoiser", name, scaled)
    assert reason in found.reason
    assert bool(found.reason) == bool(reason)


@pytest.mark.parametrize(
    ("quantized", "expected"), [("Q8_0", ""), ("Q4_0", ""), ("Q4_K", ""), ("BF16", ""), ("F16", ""), ("IQ3_S", "iq3_s")]
)
def test_gguf_files_are_identified_by_their_tensors(tmp_path: Path, quantized: str, expected: str) -> None:
    """Types that diffusers cannot dequantise are refused by name."""
    found = identify(write_gguf(tmp_path / "a.gguf", SMALL_FLUX, quantized))
    assert (summary(found), found.precision) == (("denoiser", "flux", "dev", "normal"), quantized.lower())
    assert (expected in found.reason, bool(found.reason)) == (True, bool(expected))


def test_gguf_text_encoders_are_identified(tmp_path: Path) -> None:
    """In llama.cpp's names and in those of transformers, with a tokenizer in the header."""
    names = {"enc.blk.0.attn_q.weight": (4096, 4096), "token_embd.weight": (32128, 4096)}
    found = identify(write_gguf(tmp_path / "t5.gguf", names, "Q8_0", "t5encoder", vocabulary=32_000))
    assert summary(found) == ("text-encoder", "", "t5-xxl", "normal")
    names = {"blk.0.attn_q.weight": (4096, 2560), "token_embd.weight": (151936, 2560)}
    assert identify(write_gguf(tmp_path / "q.gguf", names, "Q4_K", "qwen3")).variant == "qwen3-2560"
    assert identify(write_gguf(tmp_path / "u.gguf", t5(1024, 1), "Q8_0", "t5")).variant == "t5-large"


def test_metadata_decides_between_families_that_tensors_leave_open(tmp_path: Path) -> None:
    """A LoRA of one middle block fits every Stable Diffusion by its names."""
    layers = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (1280, 1280)}
    found = identify(write_safetensors(tmp_path / "a.safetensors", kohya(layers)))
    assert (found.families, len(found.remarks)) == (("sd15", "sd2", "sdxl"), 1)
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    assert identify(write_safetensors(tmp_path / "b.safetensors", kohya(layers), metadata=metadata)).family == "sdxl"
    # Metadata that contradicts the tensors is not believed.
    metadata = {"ss_base_model_version": "sd_v1"}
    file = write_safetensors(tmp_path / "c.safetensors", kohya(SDXL_LAYERS), metadata=metadata)
    assert identify(file).family == "sdxl"


def test_shown_metadata_is_bounded(tmp_path: Path) -> None:
    """Thumbnails and training logs are left out, long texts are cut, control characters replaced."""
    metadata = {"modelspec.title": "a\x1b[31mb" + "c" * 5000, "modelspec.thumbnail": "data:" + "x" * 9000}
    metadata |= {"ss_tag_frequency": "{}", "ss_network_module": "networks.lora"}
    found = identify(write_safetensors(tmp_path / "a.safetensors", LOKR, metadata=metadata))
    assert set(found.metadata) == {"modelspec.title", "ss_network_module"}
    assert found.metadata["modelspec.title"].startswith("a\ufffd[31mb")
    assert len(found.metadata["modelspec.title"]) < 2100


BROKEN = {
    "zero bytes": (b"", "is empty"),
    "a few bytes": (b"abc", "is not a safetensors file"),
    "noise": (bytes(range(200, 256)) * 4, "is not a safetensors file"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "a pickle": (b"PK\x03\x04" + bytes(100), "pickle under another name"),
    "an old pickle": (b"\x80\x02}q\x00." + bytes(100), "pickle under another name"),
    "GGUF": (b"GGUF" + bytes(100), "name it .gguf"),
    "a web page": (b"<!DOCTYPE html><html>" + bytes(100), "is a web page"),
    "JSON": (b'{"error": "Not found", "status": 404, "more": 0}', "is a text in JSON"),
    "header only begun": (b"\xff\x00\x00\x00\x00\x00\x00\x00" + b'{"a":', "is truncated within its header"),
    "an absurd header": (b"\xff" * 8 + b"{" + bytes(100), "is not a safetensors file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, name: str) -> None:
    """The reason names the cause and, where there is one, the cure."""
    content, reason = BROKEN[name]
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    found = identify(file)
    assert (found.kind.value, found.families) == ("unknown", ())
    assert reason in found.reason


def test_a_truncated_or_lengthened_file_is_refused(tmp_path: Path) -> None:
    """Half downloads, of both containers; the numbers are in the reason."""
    for file in (
        write_safetensors(tmp_path / "a.safetensors", SMALL_FLUX),
        write_gguf(tmp_path / "a.gguf", SMALL_FLUX),
    ):
        size = file.stat().st_size
        for length in (size - 1, size // 2):
            os.truncate(file, length)
            assert "is truncated" in identify(file).reason
        os.truncate(file, 2000)
        assert "is truncated within its header" in identify(file).reason
    file = write_safetensors(tmp_path / "b.safetensors", SMALL_FLUX)
    os.truncate(file, file.stat().st_size + 7)
    assert "7 bytes after its last tensor" in identify(file).reason


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin", ".PKL"])
def test_pickled_files_are_refused_with_a_sentence(tmp_path: Path, ending: str) -> None:
    """They are never opened beyond their facts."""
    file = tmp_path / f"model{ending}"
    file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    found = identify(file)
    assert (found.kind.value, found.container) == ("unknown", "pickle")
    assert "would run code" in found.reason


def test_what_is_no_file_is_refused_without_blocking(tmp_path: Path) -> None:
    """A pipe, a folder of that name, a link that leads nowhere, a missing file."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    assert "is a device or a pipe" in identify(tmp_path / "pipe.safetensors").reason
    assert "has neither" in identify(tmp_path / "folder.safetensors").reason
    assert "leads nowhere" in identify(tmp_path / "link.safetensors").reason
    assert "is not there" in identify(tmp_path / "gone.safetensors").reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    """The system's reason is passed on."""
    file = write_safetensors(tmp_path / "a.safetensors", LOKR)
    file.chmod(0)
    assert "Permission denied" in identify(file).reason


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    """A file of no known kind, an empty one, and denoisers of unknown width."""
    found = identify(write_safetensors(tmp_path / "a.safetensors", linear("my.layer", 3, 4)))
    assert found.reason == "is of no known kind; its tensors are named like my.layer.bias, my.layer.weight"
    assert identify(write_safetensors(tmp_path / "b.safetensors", {})).reason == "holds no tensors"
    found = identify(write_safetensors(tmp_path / "c.safetensors", flux(100, double=1, single=1)))
    assert "100 input channels" in found.reason
    found = identify(write_safetensors(tmp_path / "d.safetensors", sdxl_checkpoint(6)))
    assert ("6 input channels" in found.reason, found.families) == (True, ())
    assert identify(write_safetensors(tmp_path / "e.safetensors", qwen3(1000, 1))).variant == "qwen3-1000"


# --- folders


def pipeline_folder(
    folder: Path, class_name: str, part: str, config: dict[str, object], shapes: dict[str, tuple[int, ...]]
) -> Path:
    """A pipeline's folder with one network."""
    (folder / part).mkdir(parents=True)
    index = {"_class_name": class_name, part: ["diffusers", "X"], "scheduler": ["diffusers", "Y"], "safe": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / part / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / part / "diffusion_pytorch_model.safetensors", shapes)
    return folder


UNET = {"in_channels": 4, "cross_attention_dim": 2048}
PIPELINES = [
    ("StableDiffusionXLPipeline", "unet", UNET, ("sdxl", "", "normal")),
    ("StableDiffusionXLInpaintPipeline", "unet", UNET | {"in_channels": 9}, ("sdxl", "", "inpaint")),
    ("StableDiffusionXLPipeline", "unet", UNET | {"in_channels": 9}, ("sdxl", "", "inpaint")),
    ("StableDiffusionXLPipeline", "unet", UNET | {"time_cond_proj_dim": 256}, ("sdxl", "lcm", "normal")),
    (
        "StableDiffusionXLImg2ImgPipeline",
        "unet",
        UNET | {"projection_class_embeddings_input_dim": 2560},
        ("sdxl", "refiner", "refiner"),
    ),
    ("StableDiffusionPipeline", "unet", UNET | {"cross_attention_dim": 768}, ("sd15", "", "normal")),
    ("StableDiffusionPipeline", "unet", UNET | {"cross_attention_dim": 1024}, ("sd2", "", "normal")),
    ("FluxPipeline", "transformer", {"guidance_embeds": False}, ("flux", "schnell", "normal")),
    ("FluxPipeline", "transformer", {"guidance_embeds": True}, ("flux", "dev", "normal")),
    ("FluxKontextPipeline", "transformer", {"guidance_embeds": True}, ("flux", "kontext", "edit")),
    ("FluxFillPipeline", "transformer", {"guidance_embeds": True}, ("flux", "fill", "fill")),
    ("FluxControlPipeline", "transformer", {"guidance_embeds": True}, ("flux", "control", "control")),
    ("Flux2KleinPipeline", "transformer", {}, ("flux2", "klein-base", "normal")),
    ("Flux2KleinKVPipeline", "transformer", {}, ("flux2", "klein-kv", "normal")),
    ("ZImagePipeline", "transformer", {}, ("z-image", "", "normal")),
    ("QwenImageEditPlusPipeline", "transformer", {}, ("qwen-image", "", "edit")),
]


@pytest.mark.parametrize(("class_name", "part", "config", "expected"), PIPELINES)
def test_a_pipeline_folder_is_identified_by_its_index(
    tmp_path: Path, class_name: str, part: str, config: dict[str, object], expected: tuple[str, str, str]
) -> None:
    """Class, configuration of the denoiser, and precision of its weights."""
    found = identify(pipeline_folder(tmp_path / "a", class_name, part, config, SMALL_FLUX))
    assert summary(found) == ("pipeline", *expected)
    assert (found.precision, found.container, found.reason) == ("fp16", "folder", "")
    assert found.parts == (part, "scheduler")


def test_a_folders_scheduler_says_what_it_predicts(tmp_path: Path) -> None:
    """v-prediction with zero terminal SNR is a matter of scheduler_config.json."""
    folder = pipeline_folder(tmp_path / "a", "StableDiffusionXLPipeline", "unet", UNET, FILES["sdxl-unet-diffusers"])
    (folder / "scheduler").mkdir()
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    found = identify(folder)
    assert (found.prediction, found.zero_snr, found.metadata["scheduler"]) == (
        "v_prediction",
        True,
        "EulerDiscreteScheduler",
    )


@pytest.mark.parametrize(("distilled", "variant"), [(True, "klein"), (False, "klein-base")])
def test_the_index_says_whether_a_klein_is_distilled(tmp_path: Path, distilled: bool, variant: str) -> None:
    """Both have the same tensors; without the entry the stock class takes it for false."""
    folder = pipeline_folder(tmp_path / "a", "Flux2KleinPipeline", "transformer", {}, SMALL_FLUX)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": distilled}))
    assert summary(identify(folder)) == ("pipeline", "flux2", variant, "normal")


@pytest.mark.parametrize(("shift", "variant"), [(3.0, "turbo"), (6.0, "base")])
def test_the_shift_of_the_schedule_tells_turbo_from_z_image(tmp_path: Path, shift: float, variant: str) -> None:
    """Both have the same tensors and configurations."""
    folder = pipeline_folder(tmp_path / "a", "ZImagePipeline", "transformer", {}, SMALL_FLUX)
    (folder / "scheduler").mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert summary(identify(folder)) == ("pipeline", "z-image", variant, "normal")


def test_a_broken_folder_says_what_is_wrong(tmp_path: Path) -> None:
    """A part that is missing, truncated, quantized or of an unknown class, and JSON that is none."""
    unet = FILES["sdxl-unet-diffusers"]

    def folder(name: str, **config: object) -> Path:
        return pipeline_folder(tmp_path / name, "StableDiffusionXLPipeline", "unet", UNET | config, unet)

    (folder("a") / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "weights (*.safetensors) is missing" in identify(tmp_path / "a").reason
    os.truncate(folder("b") / "unet" / "diffusion_pytorch_model.safetensors", 5000)
    assert "is truncated" in identify(tmp_path / "b").reason
    assert (
        "quantized by bitsandbytes"
        in identify(folder("c", quantization_config={"quant_method": "bitsandbytes"})).reason
    )
    for content, reason in (
        (b"[1]", "is not a JSON object"),
        (b"{", "is not JSON"),
        (b"", "is empty"),
        (b"{}", "names no class"),
    ):
        (folder(f"d{len(content)}") / "model_index.json").write_bytes(content)
        assert reason in identify(tmp_path / f"d{len(content)}").reason
    (folder("e") / "model_index.json").write_text('{"_class_name": "MyOwnPipeline"}')
    assert "MyOwnPipeline, which is not known" in identify(tmp_path / "e").reason
    (folder("f") / "model_index.json").write_bytes(b"[" * 1_000_000)
    assert "is not JSON" in identify(tmp_path / "f").reason
    (folder("g") / "model_index.json").write_bytes(b" " * 3_000_000)
    assert "are read of a configuration" in identify(tmp_path / "g").reason


def test_folders_of_one_network_are_identified(tmp_path: Path) -> None:
    """ControlNets, VAEs and text encoders as the hub has them."""
    configurations = {
        "controlnet-diffusers": {"_class_name": "ControlNetModel"},
        "controlnet-union": {"_class_name": "ControlNetUnionModel"},
        "vae-sd": {"_class_name": "AutoencoderKL"},
        "clip-l": {"architectures": ["CLIPTextModel"]},
        "t5xxl": {"architectures": ["T5EncoderModel"]},
        "flux-diffusers": {"_class_name": "FluxTransformer2DModel"},
    }
    for name, config in configurations.items():
        write_safetensors(tmp_path / name / "model.safetensors", FILES[name])
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        found = identify(tmp_path / name)
        assert (summary(found), found.container, found.reason) == (EXPECTED[name], "folder", "")
    (tmp_path / "vae-sd" / "config.json").write_text('{"_class_name": "Unheard"}')
    assert "Unheard, which is not known" in identify(tmp_path / "vae-sd").reason


def test_the_models_that_come_with_the_server_are_identified() -> None:
    """Their folders are real ones, with small networks."""
    models = Path(__file__).parents[2] / "models"
    assert summary(identify(models / "embedded-flux")) == ("pipeline", "flux", "schnell", "normal")
    assert identify(models / "embedded-sdxl").prediction == "v_prediction"
    assert summary(identify(models / "loras" / "outlines.safetensors"))[0] == "lora"


def test_lora_layouts_are_distinguished(tmp_path: Path) -> None:
    """Who wrote a LoRA decides how it is converted."""
    layers = {"double_blocks.0.img_attn.qkv": (3072, 9216), "single_blocks.0.linear1": (3072, 21504)}
    for shapes, layout in (
        (FILES["lora-sdxl"], "kohya"),
        (FILES["lora-old"], "diffusers"),
        (FILES["lora-xlabs"], "xlabs"),
        (FILES["lora-ai-toolkit"], "diffusers"),
        (peft(layers), "original"),
        (prefixed("diffusion_model.", peft(layers)), "comfyui"),
        (prefixed("base_model.model.", peft(layers)), "peft"),
        (FILES["loha"], "kohya"),
    ):
        found = identify(write_safetensors(tmp_path / "a.safetensors", shapes))
        assert (found.kind.value, found.layout) == ("lora", layout)
