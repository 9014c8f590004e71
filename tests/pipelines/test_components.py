"""Loading: one sentence for each kind of faulty file; and the guards around decoding."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import MODELS_DIR, disc_mask, draw, job_for, outline, psnr, scene
from safetensors.torch import load_file, save_file

from stable_diffusion_server.errors import DeviceLost, InvalidInput, ModelLoadError, NotFinite, OutOfMemory
from stable_diffusion_server.pipelines.base import decode, translate_torch_errors
from stable_diffusion_server.pipelines.catalog import MODELS, REAL_MODELS, scheduler_of, spec_of
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_controlnet, load_pipeline
from stable_diffusion_server.pipelines.loading.footprint import choose_device, dtype_of
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler, set_timesteps
from stable_diffusion_server.pipelines.scheduler_rows import SCHEDULERS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A copy of the embedded models to damage."""
    shutil.copytree(ROOT / "models" / "embedded-flux", tmp_path / "embedded-flux")
    return tmp_path


@pytest.mark.fault(57)
def test_missing_files_are_reported(tmp_path: Path) -> None:
    """An empty folder: the sentence names the model and the missing file."""
    with pytest.raises(ModelLoadError, match=r"The model flux is missing: no model_index\.json in FLUX\.1-schnell\."):
        load_pipeline(REAL_MODELS["flux"][0], tmp_path, CPU)


@pytest.mark.fault(57)
def test_truncated_weights_are_reported(models: Path) -> None:
    """Half a file is refused."""
    weights = models / "embedded-flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="embedded-flux cannot be loaded"):
        load_pipeline(MODELS["flux"], models, CPU)


def test_weights_that_are_not_all_there_are_reported(models: Path) -> None:
    """Otherwise diffusers would fill the gap with random numbers and continue."""
    weights = models / "embedded-flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights)
    with pytest.raises(ModelLoadError, match="embedded-flux/transformer lacks 1 of its weights"):
        load_pipeline(MODELS["flux"], models, CPU)


def test_weights_of_another_shape_are_reported(models: Path) -> None:
    """Weights of another model size are refused."""
    weights = models / "embedded-flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1].clone()
    save_file(tensors, weights)
    with pytest.raises(ModelLoadError, match="embedded-flux"):
        load_pipeline(MODELS["flux"], models, CPU)


def test_pickled_weights_are_not_read(models: Path) -> None:
    """Only safetensors: unpickling can run any code in the file."""
    folder = models / "embedded-flux" / "transformer"
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelLoadError):
        load_pipeline(MODELS["flux"], models, CPU)


def test_the_variant_is_taken_where_the_folder_has_it(models: Path) -> None:
    """The fp16 files of real models are read under their names, on any device, also where the spec names no variant."""
    for weights in (models / "embedded-flux").rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    facts = replace(MODELS["flux"], variant="fp16")
    for spec in (facts, MODELS["flux"]):
        assert load_pipeline(spec, models, CPU).transformer.dtype == torch.float32
    for weights in (models / "embedded-flux").rglob("*.safetensors"):
        weights.rename(weights.with_name(weights.name.replace(".fp16.", ".bf16.")))
    with pytest.raises(ModelLoadError):
        load_pipeline(facts, models, CPU)


def test_weights_have_the_type_the_catalogue_says(models: Path) -> None:
    """A dtype for accelerators and one for the CPU."""
    facts = replace(MODELS["flux"], cpu_dtype="bfloat16")
    pipeline = load_pipeline(facts, models, CPU)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder_2.dtype} == {torch.bfloat16}
    assert dtype_of(MODELS["flux"], torch.device("cuda")) == torch.float32


def test_half_precision_draws_nearly_the_same_picture(families: dict[str, Any]) -> None:
    """Every task in bfloat16, within the error of its eight bits of fraction."""
    facts = replace(MODELS["flux"], cpu_dtype="bfloat16")
    half = Flux(load_pipeline(facts, MODELS_DIR, CPU), facts)
    for changes in ({}, {"image": scene(), "strength": 0.6}, {"image": scene(), "mask": disc_mask(), "refine": True}):
        job = job_for("flux", **changes)
        assert psnr(draw(half, job), draw(families["flux"], job)) > 30


def test_a_vae_that_overflows_in_fp16_is_kept_in_full_precision(models: Path) -> None:
    """The stock SDXL pipeline converts back and forth, at the cost of two conversions per image."""
    shutil.copytree(ROOT / "models" / "embedded-sdxl", models / "embedded-sdxl")
    config = models / "embedded-sdxl" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": True}))
    facts = replace(MODELS["sdxl"], cpu_dtype="float16")
    pipeline = load_pipeline(facts, models, CPU)
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.float16, torch.float32)
    for changes in ({}, {"image": scene(), "strength": 0.6}, {"image": scene(), "mask": disc_mask()}):
        assert draw(Sdxl(pipeline, facts), job_for("sdxl", **changes)).std() > 5


def test_a_controlnet_of_another_class_is_reported(models: Path) -> None:
    """SDXL's in place of Flux's."""
    shutil.copytree(ROOT / "models" / "embedded-controlnet-canny-sdxl", models / "edges")
    facts = replace(MODELS["flux"], control_folder="edges")
    with pytest.raises(ModelLoadError, match="edges holds a ControlNetModel, and a FluxControlNetModel is needed"):
        load_controlnet(facts, models, CPU)
    (models / "edges" / "config.json").unlink()
    with pytest.raises(ModelLoadError, match="The files in edges cannot be loaded"):
        load_controlnet(facts, models, CPU)
    assert load_controlnet(replace(facts, control_folder="nowhere"), models, CPU) is None
    assert load_controlnet(replace(facts, control_folder=None), models, CPU) is None


def test_a_controlnet_made_for_another_vae_is_reported(sdxl: Any) -> None:
    """Edges that do not fit the latents are detected at load, not during generation."""
    config = dict(sdxl.controlnet.config)
    channels = (8, *config["conditioning_embedding_out_channels"])
    other = type(sdxl.controlnet).from_config({**config, "conditioning_embedding_out_channels": channels})
    with pytest.raises(ModelLoadError, match=r"The ControlNet takes \d+ pixels"):
        Sdxl(sdxl.pipeline, sdxl.spec, other)


def test_edges_without_a_controlnet_are_refused(models: Path) -> None:
    """The job fails by its parameter instead of ignoring the edges."""
    facts = MODELS["flux"]
    plain = Flux(load_pipeline(facts, models, CPU), facts)
    with pytest.raises(InvalidInput) as refused:
        plain.prepare(job_for("flux", control=outline()))
    assert refused.value.field == "canny"


@pytest.mark.fault(57)
def test_a_hub_that_cannot_be_reached_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MODELS=hub without a network: one sentence with the name of the repository."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for facts in (REAL_MODELS["sdxl"][0], REAL_MODELS["flux"][0]):
        with pytest.raises(ModelLoadError, match=f"{facts.repo} cannot be had from the hub"):
            load_pipeline(facts, tmp_path, CPU, hub=HubClient())
        with pytest.raises(ModelLoadError, match="cannot be had from the hub"):
            load_controlnet(facts, tmp_path, CPU, hub=HubClient())
        with pytest.raises(ModelLoadError, match=f"The model {facts.name} is missing"):
            load_pipeline(facts, tmp_path, CPU)


@pytest.mark.fault(57)
def test_weights_of_another_class_are_reported(models: Path) -> None:
    """The error for an SDXL in place of a Flux names its class."""
    facts = replace(MODELS["sdxl"], folder="embedded-flux")
    with pytest.raises(ModelLoadError, match="holds a FluxPipeline, and sdxl needs a StableDiffusionXLPipeline"):
        load_pipeline(facts, models, CPU)


def test_a_broken_index_is_reported(models: Path) -> None:
    """Invalid JSON is no stack trace."""
    (models / "embedded-flux" / "model_index.json").write_text("{")
    with pytest.raises(ModelLoadError):
        load_pipeline(MODELS["flux"], models, CPU)


@pytest.mark.fault(58)
def test_a_device_that_is_not_there_is_reported_in_one_sentence() -> None:
    """DEVICE=cuda:99 on this machine."""
    with pytest.raises(ModelLoadError, match="DEVICE=cuda:99"):
        choose_device("cuda:99")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("model", MODELS)
def test_the_catalogues_revision_belongs_to_the_weights(model: str) -> None:
    """Other weights give other images: a changed file needs a new revision, which changes every content key."""
    folder = ROOT / "models" / MODELS[model].folder
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    assert MODELS[model].revision.rsplit("-", 1)[1] == content.hexdigest()[:10]


@pytest.mark.parametrize("model", MODELS)
def test_the_embedded_models_hold_nothing_of_where_they_were_made(model: str) -> None:
    """No path of a machine in any configuration."""
    for path in (ROOT / "models" / MODELS[model].folder).rglob("*.json"):
        if "tokenizer.json" not in path.name:
            assert "_name_or_path" not in json.loads(path.read_text())


def test_what_is_not_in_the_catalogue_is_refused_by_name() -> None:
    """Model, scheduler and steps: each error names its field."""
    for refuse, field in (
        (lambda: spec_of("sd15"), "model"),
        (lambda: scheduler_of(MODELS["flux"], "ddim", 4), "scheduler"),
        (lambda: scheduler_of(MODELS["sdxl"], "ddim", 1001), "num_inference_steps"),
    ):
        with pytest.raises(InvalidInput) as refused:
            refuse()
        assert refused.value.field == field


@pytest.mark.parametrize("scheduler", MODELS["sdxl"].schedulers)
@pytest.mark.parametrize("steps", [1, 4, 60, 61, 62, 100])
def test_a_schedule_has_as_many_steps_as_were_asked_for(registry: Any, scheduler: str, steps: int) -> None:
    """61 steps are 61, none of them before the first timestep; the result and the progress report that number."""
    pipeline = registry.residents["sdxl"].family.pipeline
    row = SCHEDULERS[scheduler]
    if steps > row.max_steps:
        with pytest.raises(InvalidInput, match="takes from 1 to"):
            scheduler_of(MODELS["sdxl"], scheduler, steps)
        return
    made = make_scheduler(scheduler_of(MODELS["sdxl"], scheduler, steps), like=pipeline.scheduler)
    set_timesteps(made, steps, CPU)
    per_step = job_for("sdxl", scheduler=scheduler).passes_per_step
    # The last step of second order takes one pass, and PNDM takes one more in all.
    assert len(made.timesteps) == (2 * steps - 1 if per_step == 2 else steps + (scheduler == "pndm" and steps > 1))
    assert made.timesteps[-1] >= 0
    sample = torch.ones(1, 4, 2, 2)
    for timestep in made.timesteps:
        made.scale_model_input(sample, timestep)
        sample = made.step(sample * 0.1, timestep, sample, return_dict=False)[0]
    assert torch.isfinite(sample).all()


class HalfBrokenDecoder(torch.nn.Module):
    """A decoder that overflows in fp16 and works in fp32, like SDXL's own VAE."""

    def __init__(self, dtype: torch.dtype, broken_in: set[torch.dtype]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))
        self.broken_in = broken_in

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert not return_dict
        assert latents.dtype == self.dtype
        return (latents[:, :3] * (float("nan") if self.dtype in self.broken_in else 0.0),)


def latents(value: float = 1.0) -> torch.Tensor:
    return torch.full((1, 4, 8, 8), value)


def test_a_decoder_that_overflows_is_run_again_in_full_precision() -> None:
    """The image is valid, the result can report it, and the decoder is in half precision again afterwards."""
    vae = HalfBrokenDecoder(torch.float16, {torch.float16})
    drawn = decode(vae, latents())
    assert drawn.redecoded
    assert drawn.pixels.shape == (8, 8, 3)
    assert set(drawn.pixels.flat) <= {127, 128}
    assert vae.dtype == torch.float16


def test_a_sound_decoder_runs_once() -> None:
    """No second decode where none is needed."""
    assert not decode(HalfBrokenDecoder(torch.float32, set()), latents()).redecoded


@pytest.mark.fault(54)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_an_error_of_their_own(value: float) -> None:
    """There is nothing to decode; the error says that another seed may help."""
    with pytest.raises(NotFinite, match="seed"):
        decode(HalfBrokenDecoder(torch.float16, set()), latents(value))


def test_a_decoder_broken_in_every_precision_is_an_error() -> None:
    """An image that cannot be decoded is not stored as a grey one."""
    with pytest.raises(NotFinite):
        decode(HalfBrokenDecoder(torch.float16, {torch.float16, torch.float32}), latents())


@pytest.mark.parametrize(
    ("theirs", "ours"), [(torch.OutOfMemoryError, OutOfMemory), (torch.AcceleratorError, DeviceLost)]
)
def test_torchs_errors_become_ours(theirs: type[Exception], ours: type[Exception]) -> None:
    """By class, not by message text; so no package above the pipelines needs torch."""
    raised: Any = theirs("device says no") if theirs is torch.OutOfMemoryError else theirs.__new__(theirs)
    with pytest.raises(ours), translate_torch_errors():
        raise raised
