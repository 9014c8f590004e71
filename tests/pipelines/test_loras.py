"""LoRAs: they change only the images that request them, and no file outside their folder is read."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import MODELS_DIR, draw, draw_together, job_for, psnr, scene
from lora_training import train_swap
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.catalog import MODELS, scheduler_of, with_lcm
from stable_diffusion_server.pipelines.conditioning import lora
from stable_diffusion_server.pipelines.conditioning.lora import (
    LoraManager,
    add_to_controlnet,
    digest_of,
    find,
    names_in,
    read_header,
)
from stable_diffusion_server.pipelines.conditioning.lora_files import read_lora
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_pipeline
from stable_diffusion_server.pipelines.loading.model_files import lora_file
from stable_diffusion_server.pipelines.registry import LoadOptions, load

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GREEN = (("green", 1.0),)


def fresh_sdxl() -> Sdxl:
    facts = MODELS["sdxl"]
    return Sdxl(load_pipeline(facts, MODELS_DIR, CPU), facts)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """An allowed folder with one LoRA, trained here: red things become green."""
    folder = tmp_path_factory.mktemp("loras")
    train_swap(fresh_sdxl(), folder)
    return folder


@pytest.fixture(scope="module")
def painter(loras: Path) -> Sdxl:
    """The embedded SDXL with that folder."""
    facts = MODELS["sdxl"]
    pipeline = load_pipeline(facts, MODELS_DIR, CPU)
    return Sdxl(pipeline, facts, loras=LoraManager(pipeline, loras))


def middle(pixels: Any) -> Any:
    """Mean colour of the middle of an image."""
    height, width = pixels.shape[:2]
    return pixels[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8].reshape(-1, 3).mean(0)


def test_an_adapter_does_what_it_was_trained_to_do(painter: Sdxl, sdxl: Sdxl) -> None:
    """The red circle is green, and the background is still blue."""
    without, with_it = draw(sdxl, job_for("sdxl")), draw(painter, job_for("sdxl", loras=GREEN))
    assert middle(without).argmax() == 0
    assert middle(with_it).argmax() == 1
    assert with_it[3, 3].argmax() == 2


@pytest.mark.parametrize("shape", ["circle", "square", "heart"])
def test_the_adapter_that_comes_along_draws_outlines(sdxl: Sdxl, one_thread: None, shape: str) -> None:
    """The middle of the object has the background's colour, and there is still an object."""
    facts = MODELS["sdxl"]
    pipeline = load_pipeline(facts, MODELS_DIR, CPU)
    outlined = Sdxl(pipeline, facts, loras=LoraManager(pipeline, MODELS_DIR / "loras"))
    job = job_for("sdxl", prompt=f"a red {shape} on a blue background", width=256, height=256)
    assert middle(draw(sdxl, job)).argmax() == 0
    drawn = draw(outlined, replace(job, loras=(("outlines", 1.0),)))
    assert middle(drawn).argmax() == 2
    assert drawn[3, 3].argmax() == 2
    assert 0.01 < (drawn.argmax(2) == 0).mean() < 0.25


def test_jobs_without_it_are_drawn_as_if_it_had_never_been_loaded(painter: Sdxl, sdxl: Sdxl) -> None:
    """Before, between and after jobs with a LoRA, bit for bit."""
    plain = job_for("sdxl", image=scene(), strength=0.8)
    expected = draw(sdxl, plain)
    for _ in range(2):
        assert (draw(painter, plain) == expected).all()
        draw(painter, job_for("sdxl", loras=GREEN))
    assert (draw(painter, plain) == expected).all()


def test_the_weight_says_how_much(painter: Sdxl) -> None:
    """Half weight is between none and full; zero equals none."""
    drawn = [draw(painter, job_for("sdxl", loras=(("green", weight),))) for weight in (0.0, 0.5, 1.0)]
    greener = [middle(pixels)[1] - middle(pixels)[0] for pixels in drawn]
    assert greener == sorted(greener)
    assert (drawn[0] == draw(painter, job_for("sdxl"))).all()


def test_groups_may_take_turns(painter: Sdxl) -> None:
    """States with and without a LoRA, stepped alternately, give the same images as alone."""
    jobs = [job_for("sdxl", loras=GREEN), job_for("sdxl")]
    alone = [draw(painter, job) for job in jobs]
    states = [painter.prepare(job) for job in jobs]
    while not all(state.done for state in states):
        for state in states:
            painter.step([state])
    for state, expected in zip(states, alone, strict=True):
        assert (painter.finish(state).pixels == expected).all()


def test_jobs_with_other_adapters_share_a_forward_pass() -> None:
    """LoRAs and their weights are no part of the shape by which the engine batches."""
    assert len({job_for("sdxl", loras=loras).shape for loras in ((), GREEN, (("green", 0.5),))}) == 1


def test_a_batch_may_share_an_adapter(painter: Sdxl) -> None:
    """Two jobs of one batch run together."""
    jobs = [job_for("sdxl", loras=GREEN, seed=seed) for seed in (1, 2)]
    for mixed, job in zip(draw_together(painter, jobs), jobs, strict=True):
        assert psnr(mixed, draw(painter, job)) >= 45


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    "name",
    ["../secret", "..", "/etc/passwd", "green.ckpt", "nothing", "", "sub/green", "gr\x00een", "link", ".x"],
)
def test_only_the_folders_own_adapters_have_names(name: str, loras: Path, tmp_path: Path) -> None:
    """Paths, links to outside and unknown names are refused as invalid parameters."""
    folder = tmp_path / "allowed"
    shutil.copytree(loras, folder)
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(InvalidInput) as refused:
        find(folder, name)
    assert refused.value.field == "lora"
    assert find(folder, "green").name == "green.safetensors"
    assert "green" in names_in(folder)


def test_without_a_folder_there_are_no_adapters(sdxl: Sdxl) -> None:
    """The default: a job that names one is refused before anything is generated."""
    assert names_in(None) == ()
    with pytest.raises(InvalidInput, match="No adapters are offered here"):
        sdxl.prepare(job_for("sdxl", loras=GREEN))


def test_an_adapter_of_another_model_is_refused_and_harms_nothing(painter: Sdxl, loras: Path) -> None:
    """Tensors of wrong shapes: the job fails with its parameter, the next one succeeds."""
    expected = draw(painter, job_for("sdxl"))
    wrong = {name: torch.zeros(3, 3) for name in load_file(loras / "green.safetensors")}
    save_file(wrong, loras / "wrong.safetensors")
    (loras / "torn.safetensors").write_bytes((loras / "green.safetensors").read_bytes()[:-10])
    with pytest.raises(InvalidInput, match=r"wrong\.safetensors is for another model"):
        painter.prepare(job_for("sdxl", loras=(("wrong", 1.0),)))
    with pytest.raises(InvalidInput, match=r"torn\.safetensors is truncated"):
        painter.prepare(job_for("sdxl", loras=(("torn", 1.0),)))
    assert (draw(painter, job_for("sdxl")) == expected).all()
    assert middle(draw(painter, job_for("sdxl", loras=GREEN))).argmax() == 1


def test_an_adapter_that_fails_first_of_all_leaves_the_model_as_it_was(loras: Path, sdxl: Sdxl, tmp_path: Path) -> None:
    """No part of a half-loaded LoRA stays."""
    wrong = {name: torch.ones(3, 3) for name in load_file(loras / "green.safetensors")}
    save_file(wrong, tmp_path / "wrong.safetensors")
    pipeline = load_pipeline(MODELS["sdxl"], MODELS_DIR, CPU)
    own = Sdxl(pipeline, MODELS["sdxl"], loras=LoraManager(pipeline, tmp_path))
    with pytest.raises(InvalidInput):
        own.prepare(job_for("sdxl", loras=(("wrong", 1.0),)))
    assert (draw(own, job_for("sdxl")) == draw(sdxl, job_for("sdxl"))).all()


def test_adapters_that_were_not_used_for_long_are_forgotten(
    loras: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Many LoRAs do not fill the memory, and an evicted one is loaded again."""
    monkeypatch.setattr(lora, "MAX_IDLE", 2)
    for number, letter in enumerate("abcd"):  # the same content would be the same LoRA
        scaled = {name: tensor * number for name, tensor in load_file(loras / "green.safetensors").items()}
        save_file(scaled, tmp_path / f"{letter}.v1.safetensors")
    pipeline = load_pipeline(MODELS["sdxl"], MODELS_DIR, CPU)
    own = LoraManager(pipeline, tmp_path)
    for letter in "abcda":
        own.use(((f"{letter}.v1", 1.0),))
        assert len(own._held) <= 2
    assert digest_of(find(tmp_path, "a.v1")) in own._held


def test_an_adapter_someone_draws_with_is_not_forgotten(
    loras: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A preempted job finishes with its LoRA, whatever many others were loaded meanwhile, even if its file is gone."""
    monkeypatch.setattr(lora, "MAX_IDLE", 1)
    for number, letter in enumerate("abcd", 1):
        scaled = {name: tensor / number for name, tensor in load_file(loras / "green.safetensors").items()}
        save_file(scaled, tmp_path / f"{letter}.safetensors")
    pipeline = load_pipeline(MODELS["sdxl"], MODELS_DIR, CPU)
    own = Sdxl(pipeline, MODELS["sdxl"], loras=LoraManager(pipeline, tmp_path))
    waiting, expected = (
        own.prepare(job_for("sdxl", loras=(("a", 1.0),))),
        draw(own, job_for("sdxl", loras=(("a", 1.0),))),
    )
    (tmp_path / "a.safetensors").unlink()
    for letter in "bcd":
        draw(own, job_for("sdxl", loras=((letter, 1.0),)))
    while not waiting.done:
        own.step([waiting])
    assert (own.finish(waiting).pixels == expected).all()
    del waiting
    draw(own, job_for("sdxl", loras=(("b", 1.0),)))
    assert len(own.loras._held) == 1


def test_a_control_lora_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Black Forest Labs' kind, in both layouts: it would widen the input of the shared transformer."""
    for name in (
        "transformer.x_embedder.lora_A.weight",
        "img_in.lora_A.weight",
        "single_blocks.0.norm.query_norm.scale",
    ):
        save_file({name: torch.zeros(4, 128)}, tmp_path / "line.safetensors")
        with pytest.raises(ModelLoadError, match=r"control LoRA.*ControlNet"):
            read_lora(tmp_path / "line.safetensors")
    save_file({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 128)}, tmp_path / "plain.safetensors")
    assert read_lora(tmp_path / "plain.safetensors").digest == digest_of(tmp_path / "plain.safetensors")


@pytest.fixture
def control_lora(flux: Any, tmp_path: Path) -> Path:
    """A LoRA of a Flux ControlNet's attention, in the layout of diffusers' trainers."""
    net = copy.deepcopy(flux.controlnet)
    targets = ["to_q", "to_v"]
    net.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    # Larger than at initialisation: queries and values of a trained network are large.
    weights = {f"transformer.{name}": 4 * value for name, value in get_peft_model_state_dict(net).items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "line.safetensors")
    return tmp_path / "line.safetensors"


def test_a_lora_goes_on_the_controlnet_for_good(flux: Any, control_lora: Path) -> None:
    """CONTROLNET_LORA changes the effect of edges, and the shared transformer stays unchanged."""
    net = copy.deepcopy(flux.controlnet)
    add_to_controlnet(net, control_lora)
    guided = Flux(flux.pipeline, flux.spec, net)
    job = job_for("flux", control=scene())
    assert psnr(draw(guided, job), draw(flux, job)) < 60
    assert (draw(guided, job_for("flux")) == draw(flux, job_for("flux"))).all()


def test_a_lora_of_something_else_is_refused_by_the_controlnet(flux: Any, loras: Path) -> None:
    """A LoRA of SDXL's UNet does not fit Flux's ControlNet, and the sentence names the setting."""
    with pytest.raises(ModelLoadError, match="CONTROLNET_LORA"):
        add_to_controlnet(copy.deepcopy(flux.controlnet), loras / "green.safetensors")


def test_the_controlnets_lora_is_found_by_file_or_folder(control_lora: Path, tmp_path: Path) -> None:
    """A file, a folder with one, a name among the models; none and two are reported with the number."""
    assert lora_file(str(control_lora), tmp_path) == control_lora
    assert lora_file(str(tmp_path), tmp_path / "elsewhere") == control_lora
    assert lora_file("line.safetensors", tmp_path) == control_lora
    (tmp_path / "second.safetensors").write_bytes(b"")
    for name, count in ((str(tmp_path), 2), ("nowhere", 0)):
        with pytest.raises(ModelLoadError, match=f"names {count} "):
            lora_file(name, tmp_path)


def test_weights_are_distinguished_by_their_content(tmp_path: Path) -> None:
    """The digest follows the bytes, also when the file is rewritten under its name."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    first = digest_of(file)
    file.write_bytes(b"other")
    assert digest_of(file) != first
    assert len(first) == 16


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0[1, 2, 3, 4, 5]", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_is_reported(content: bytes, tmp_path: Path) -> None:
    """Empty, random, and JSON of another kind."""
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"broken\.safetensors is not a safetensors file"):
        read_header(file)


@pytest.fixture
def lcm_models(loras: Path, tmp_path: Path) -> Path:
    """The models folder with an LCM LoRA beside the SDXL; ours stands in for it."""
    (tmp_path / "embedded-sdxl").symlink_to(MODELS_DIR / "embedded-sdxl")
    (tmp_path / "lcm-lora-sdxl").mkdir()
    shutil.copy(loras / "green.safetensors", tmp_path / "lcm-lora-sdxl" / "pytorch_lora_weights.safetensors")
    return tmp_path


def test_the_lcm_lora_belongs_to_the_model_and_goes_with_others(lcm_models: Path, loras: Path) -> None:
    """With LOAD_LCM_LORA it applies to every job, beside a job's own.

    And the model facts say few steps and no guidance.
    """
    facts = with_lcm(replace(MODELS["sdxl"], lcm_folder="lcm-lora-sdxl", schedulers=("euler", "lcm")))
    assert 4 <= facts.default_steps <= 8
    assert 1.0 <= facts.default_guidance <= 2.0
    assert facts.default_scheduler == "lcm"
    assert facts.revision.endswith("+lcm")
    registry = load(lcm_models, "cpu", 1, LoadOptions(models={"sdxl": facts}, lora_dir=loras))
    assert registry.loaded[0].loras == names_in(loras)
    always = draw(registry, job_for("sdxl"))
    assert middle(always).argmax() == 1  # ours paints green
    both = draw(registry, job_for("sdxl", loras=(("green", -1.0),)))
    assert middle(both).argmax() == 0  # one cancels the other
    assert (draw(registry, job_for("sdxl")) == always).all()
    by_lcm = job_for("sdxl", scheduler="lcm", num_inference_steps=6, guidance_scale=1.0)
    assert draw(registry, by_lcm).std() > 5
    with pytest.raises(InvalidInput, match="from 1 to 50"):
        scheduler_of(facts, "lcm", 51)


def test_a_missing_lcm_lora_is_reported_at_load(tmp_path: Path) -> None:
    """The sentence names the folder it should be in."""
    (tmp_path / "embedded-sdxl").symlink_to(MODELS_DIR / "embedded-sdxl")
    facts = with_lcm(replace(MODELS["sdxl"], lcm_folder="lcm-lora-sdxl"))
    with pytest.raises(ModelLoadError, match=r"no \.safetensors file in lcm-lora-sdxl"):
        load(tmp_path, "cpu", 1, LoadOptions(models={"sdxl": facts}))


def test_adapters_go_on_weights_of_one_byte_too(loras: Path) -> None:
    """QUANTIZE=int8 and a LoRA together still paint green, and do not change jobs without it."""
    options = LoadOptions(models={"sdxl": MODELS["sdxl"]}, lora_dir=loras, quantize="int8")
    registry = load(MODELS_DIR, "cpu", 1, options)
    before = draw(registry, job_for("sdxl"))
    assert middle(draw(registry, job_for("sdxl", loras=GREEN))).argmax() == 1
    assert (draw(registry, job_for("sdxl")) == before).all()
