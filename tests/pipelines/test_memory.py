"""One set of weights serves every task, and quantized or offloaded weights give nearly the same image."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from drawing import MODELS_DIR, disc_mask, draw, job_for, outline, psnr, scene

from stable_diffusion_server.errors import ModelLoadError, ModelTooLarge
from stable_diffusion_server.pipelines.catalog import MODELS, with_quantization
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading import measurement
from stable_diffusion_server.pipelines.loading.components import load_controlnet, load_pipeline
from stable_diffusion_server.pipelines.loading.footprint import bytes_of
from stable_diffusion_server.pipelines.loading.offload import apply_residency
from stable_diffusion_server.pipelines.loading.placement import Footprint, Quantize, Residency
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.registry import LoadOptions, load

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {"sdxl": Sdxl, "flux": Flux}
TASKS = {
    "sdxl": (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
    ),
    "flux": (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
    ),
}


def modules_of(pipeline: Any) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def draw_every_task(family: Any) -> None:
    name = family.spec.name
    jobs = [job_for(name), job_for(name, image=scene(), strength=0.5), job_for(name, image=scene(), mask=disc_mask())]
    for job in [*jobs, *([job_for(name, control=outline())] if family.controlnet is not None else [])]:
        draw(family, job)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_all_tasks_together_take_the_memory_of_one(name: str, one_thread: None) -> None:
    """After running every task: the same modules, and at most a twentieth more than the base and the ControlNet."""
    facts = MODELS[name]
    family = KINDS[name](load_pipeline(facts, MODELS_DIR, CPU), facts, load_controlnet(facts, MODELS_DIR, CPU))
    base, before = bytes_of(*modules_of(family.pipeline)), modules_of(family.pipeline)
    control = bytes_of(family.controlnet) if family.controlnet is not None else 0
    draw_every_task(family)
    after = modules_of(family.pipeline)
    assert all(mine is theirs for mine, theirs in zip(before, after, strict=True))
    together = bytes_of(*after, *([family.controlnet] if control else []))
    apart = bytes_apart(name)
    print(f"\n| {name} | text alone {base:,} | all tasks {together:,} | loaded separately {apart:,} |")  # noqa: T201  # the table
    assert together <= 1.05 * base + control
    assert apart > 2.5 * together


def bytes_apart(name: str) -> int:
    """Size of every task's stock pipeline, each loaded separately as in the original."""
    facts, total = MODELS[name], 0
    for kind in TASKS[name]:
        parts = {"controlnet": load_controlnet(facts, MODELS_DIR, CPU)} if "ControlNet" in kind else {}
        folder = MODELS_DIR / facts.folder
        pipeline = getattr(diffusers, kind).from_pretrained(folder, dtype=torch.float32, **parts)
        total += bytes_of(*modules_of(pipeline))
    return total


@pytest.mark.parametrize(
    ("quantize", "least"), [("int8", 45), ("float8", 40), ("torchao-int8", 40), ("torchao-float8", 30)]
)
def test_weights_of_one_byte_draw_nearly_the_same_picture(
    quantize: Quantize, least: float, families: dict[str, Any]
) -> None:
    """A third of the denoiser's memory, or less; torchao leaves convolutions alone.

    Every task still works.
    """
    if "torchao" in quantize:
        # Not among the test dependencies: diffusers imports it wherever it is installed, which takes seconds.
        pytest.importorskip("torchao")
    models = {name: with_quantization(facts, quantize) for name, facts in MODELS.items()}
    registry = load(MODELS_DIR, "cpu", 1, LoadOptions(models=models, quantize=quantize))
    for name, family in ((model.spec.name, model.family) for model in registry.residents.loaded):
        part = family.spec.denoiser_part
        fine, coarse = (bytes_of(getattr(f.pipeline, part)) for f in (families[name], family))
        ratio = psnr(draw(family, job_for(name)), draw(families[name], job_for(name)))
        print(f"\n| {name} | {quantize} | {part} {fine:,} → {coarse:,} bytes | {ratio:.1f} dB |")  # noqa: T201  # the table
        assert (1.2 if "torchao" in quantize and name == "sdxl" else 3) * coarse < fine
        assert ratio >= least
        draw_every_task(family)
    assert {model.quantization for model in registry.loaded} == {quantize}
    assert all(model.revision.endswith(f"+{quantize}") for model in registry.loaded)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_layers_that_travel_in_groups_draw_the_very_same_picture(name: str, families: dict[str, Any]) -> None:
    """Group offloading works on the CPU too, where it saves nothing: its hooks do not change the arithmetic."""
    facts = MODELS[name]
    family = KINDS[name](load_pipeline(facts, MODELS_DIR, CPU), facts, load_controlnet(facts, MODELS_DIR, CPU))
    apply_residency(family.pipeline, family.controlnet, CPU, Residency.GROUP)
    job = job_for(name, image=scene(), strength=0.6)
    assert psnr(draw(family, job), draw(families[name], job)) > 80


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("residency", list(Residency))
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_every_residency_draws_on_a_gpu(name: str, residency: Residency, families: dict[str, Any]) -> None:
    """With every offload mode, the image is nearly that of the CPU."""
    facts, cuda = MODELS[name], torch.device("cuda")
    pipeline = load_pipeline(facts, MODELS_DIR, cuda, move=False)
    family = KINDS[name](pipeline, facts, load_controlnet(facts, MODELS_DIR, cuda, move=False))
    apply_residency(family.pipeline, family.controlnet, cuda, residency)
    assert psnr(draw(family, job_for(name)), draw(families[name], job_for(name))) > 30
    draw_every_task(family)


def test_a_vae_in_slices_and_tiles_draws_the_same_small_picture(families: dict[str, Any]) -> None:
    """Both are options; neither changes an image of one tile."""
    registry = load(MODELS_DIR, "cpu", 1, LoadOptions(vae_slicing=True, vae_tiling=True))
    assert registry.residents["sdxl"].family.pipeline.vae.use_tiling
    assert registry.residents["sdxl"].family.pipeline.vae.use_slicing
    assert psnr(draw(registry, job_for("sdxl")), draw(families["sdxl"], job_for("sdxl"))) > 80


def test_what_is_loaded_is_reported(one_thread: None) -> None:
    """Source, revision, device, placement, and bytes."""
    registry = load(MODELS_DIR, "cpu", 1)
    loaded = {model.name: model for model in registry.loaded}
    assert set(loaded) == set(MODELS)
    assert loaded["sdxl"].folder == "embedded-sdxl"
    assert loaded["sdxl"].follows_edges
    assert (loaded["sdxl"].device, loaded["sdxl"].residency, loaded["sdxl"].dtype) == ("cpu", "resident", "float32")
    assert loaded["sdxl"].bytes > 4 * 6_000_000
    assert registry.resident
    registry.release_memory()


def test_offloading_on_the_cpu_is_refused_at_load() -> None:
    """One sentence that names the setting."""
    with pytest.raises(ModelLoadError, match="OFFLOAD=model"):
        load(MODELS_DIR, "cpu", 1, LoadOptions(offload="model"))


def test_a_model_that_does_not_fit_is_refused_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine too small for one model: a sentence with the numbers, and the other model alone is loaded."""
    footprint = measurement.footprint_of

    def too_large(facts: ModelSpec, *arguments: Any, **more: Any) -> Footprint:
        true = footprint(facts, *arguments, **more)
        return replace(true, parts={"unet": 10**15}) if facts.revision == "real" else true

    monkeypatch.setattr(measurement, "footprint_of", too_large)
    real = replace(MODELS["flux"], revision="real")
    drawing = load(MODELS_DIR, "cpu", 1, LoadOptions(models={"flux": real, "sdxl": MODELS["sdxl"]}))
    assert drawing.models == {"sdxl": MODELS["sdxl"]}
    assert "GB of memory" in drawing.unusable["flux"]
    with pytest.raises(ModelTooLarge, match="GB of memory"):
        load(MODELS_DIR, "cpu", 1, LoadOptions(models={"flux": real}))


def test_a_damaged_model_is_refused_and_not_replaced(tmp_path: Path) -> None:
    """The operator must learn of incomplete files; the other model is loaded."""
    (tmp_path / "real").mkdir()
    damaged = replace(MODELS["flux"], folder="real")
    drawing = load(tmp_path, "cpu", 1, LoadOptions(models={"flux": damaged, "sdxl": MODELS["sdxl"]}))
    assert [*drawing.models] == ["sdxl"]
    assert "real" in drawing.unusable["flux"]
    with pytest.raises(ModelLoadError, match="real"):
        load(tmp_path, "cpu", 1, LoadOptions(models={"flux": damaged}))


def test_attention_in_slices_draws_nearly_the_same_picture(families: dict[str, Any]) -> None:
    """ATTENTION_SLICING: another order of additions, and visually the same image."""
    drawing = load(MODELS_DIR, "cpu", 1, LoadOptions(models={"sdxl": MODELS["sdxl"]}, attention_slicing=True))
    job = job_for("sdxl")
    sliced = drawing.finish(done(drawing, job)).pixels
    assert psnr(sliced, draw(families["sdxl"], job)) > 60


def done(drawing: Any, job: Any) -> Any:
    state = drawing.prepare(job)
    while not state.done:
        drawing.step([state])
    return state


def test_safe_performance_changes_rounding_alone(families: dict[str, Any]) -> None:
    """PERFORMANCE=safe, the default: another memory layout for convolutions, and the same image."""
    drawing = load(MODELS_DIR, "cpu", 1, LoadOptions(performance="safe"))
    for name, family in families.items():
        if "-" not in name:
            job = job_for(name)
            assert psnr(drawing.finish(done(drawing, job)).pixels, draw(family, job)) > 70


def test_compressed_weights_need_cuda_and_say_so() -> None:
    """DF11_MODEL_PATH on the CPU: one sentence, without an import error of the package."""
    with pytest.raises(ModelLoadError, match="DF11_MODEL_PATH needs a CUDA device"):
        load(
            MODELS_DIR, "cpu", 1, LoadOptions(models={"flux": MODELS["flux"]}, dfloat11="DFloat11/FLUX.1-schnell-DF11")
        )


def test_a_missing_torchao_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a dependency of the server, so the sentence says how to install it."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ModelLoadError, match="pip install torchao"):
        load(MODELS_DIR, "cpu", 1, LoadOptions(models={"flux": MODELS["flux"]}, quantize="torchao-int8"))


def test_a_missing_quantizer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what to install."""
    import sys

    monkeypatch.setitem(sys.modules, "optimum", None)  # as on a machine without that package
    with pytest.raises(ModelLoadError, match="pip install optimum-quanto"):
        load(MODELS_DIR, "cpu", 1, LoadOptions(models={"flux": replace(MODELS["flux"])}, quantize="float8"))
