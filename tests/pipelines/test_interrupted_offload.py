"""Offloaded weights: after any cancellation or failure, no component stays on the device beside the next one.

This machine has no accelerator, so the components only seem to move: the hooks of diffusers and accelerate, the engine
and the arithmetic are real.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from drawing import MODELS_DIR, disc_mask, draw, job_for, scene

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.loading import loader, measurement
from stable_diffusion_server.pipelines.loading.components import load_pipeline
from stable_diffusion_server.pipelines.loading.offload import OffloadedModel, apply_residency
from stable_diffusion_server.pipelines.loading.packed_weights import PackedLinear, PackedWeight
from stable_diffusion_server.pipelines.loading.placement import (
    Footprint,
    Placement,
    Quantization,
    Quantize,
    Residency,
    place,
)
from stable_diffusion_server.pipelines.registry import LoadOptions, load
from stable_diffusion_server.types import DiffusionRequest, EngineEvent, EngineEventKind

pytestmark = pytest.mark.slow

# PyTorch treats them as two devices, and can compute with tensors on both.
CPU, DEVICE = torch.device("cpu"), torch.device("cpu:0")
CUDA = torch.device("cuda:0")
FACTS = {name: replace(facts, control_folder=None) for name, facts in MODELS.items()}
PATIENCE = 120.0


class Seeming:
    """A parameter that reports another device."""

    def __init__(self, parameter: torch.Tensor, device: torch.device) -> None:
        self._parameter = parameter
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parameter, name)


class Travels:
    """Records where components seem to be: `there` now, and `met`, the sets that were there together."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.met: list[set[str]] = []

    def follow(self, model: str, pipeline: Any) -> None:
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                self._follow(f"{model} {name}", part)

    def _follow(self, name: str, part: Any) -> None:
        move, parameters = part.to, part.parameters

        def to(*arguments: Any, **named: Any) -> Any:
            device = named.get("device", arguments[0] if arguments else None)
            if not isinstance(device, str | torch.device):
                return move(*arguments, **named)
            if torch.device(device) == CPU:
                self.there.discard(name)
            else:
                self.there.add(name)
                self.met.append(set(self.there))
            return part

        part.to = to
        part.parameters = lambda recurse=True: (
            Seeming(parameter, DEVICE if name in self.there else CPU) for parameter in parameters(recurse)
        )

    def crowded(self) -> list[set[str]]:
        """The sets in which a denoiser was on the device with another component."""
        return [met for met in self.met if len(met) > 1 and any("unet" in n or "transformer" in n for n in met)]


@pytest.fixture(scope="module")
def placed(one_thread: None) -> tuple[Any, Travels]:
    """Both embedded models with OFFLOAD=model on a simulated device."""
    travels = Travels()

    def settled(pipeline: Any, controlnet: Any, device: torch.device, residency: Residency) -> None:
        travels.follow("sdxl" if hasattr(pipeline, "unet") else "flux", pipeline)
        apply_residency(pipeline, controlnet, DEVICE, residency)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loader, "apply_residency", settled)
        patched.setattr(measurement, "place", lambda *free, **more: Placement(Residency.MODEL, Quantization.NONE, 0))
        made: Any = load(MODELS_DIR, "cpu", 1, LoadOptions(models=FACTS))
    assert not made.resident
    return made, travels


@pytest.fixture
def travels(placed: tuple[Any, Travels]) -> Travels:
    """Records component positions from now on."""
    placed[0].release_memory()
    placed[1].met.clear()
    return placed[1]


@pytest.fixture
def drawing(placed: tuple[Any, Travels]) -> Any:
    """The models."""
    return placed[0]


@pytest.fixture
def engine(drawing: Any) -> Iterator[Engine[Any]]:
    """An engine over them."""
    made: Engine[Any] = Engine(lambda: drawing, queue_limit=9, max_batch=2)
    made.start()
    wait(lambda: made.state is EngineState.READY)
    yield made
    made.stop(PATIENCE)


def wait(reached: Callable[[], bool]) -> None:
    over = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        if reached():
            return
        over.wait(0.02)
    raise AssertionError("nothing came of it")


def hung_up(engine: Engine[Any], job: DiffusionRequest, kind: EngineEventKind, step: int) -> None:
    """Cancel the request at an event, on the engine's own thread, before the next stage begins."""
    ready = threading.Event()

    def leave(event: EngineEvent) -> None:
        if event.kind is kind and event.step == step:
            ready.wait(PATIENCE)
            ticket.result.cancel()

    ticket = engine.submit(job, watch=leave)
    ready.set()
    wait(lambda: ticket.result.done() and not engine.running and not engine.waiting)


@pytest.mark.fault(169)
@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize(
    ("kind", "step"),
    [(EngineEventKind.STARTED, 0), (EngineEventKind.STEP, 1), (EngineEventKind.STEP, 3), (EngineEventKind.STEP, 4)],
)
def test_a_caller_who_hangs_up_leaves_nothing_on_the_device(
    model: str, kind: EngineEventKind, step: int, engine: Engine[Any], travels: Travels
) -> None:
    """At any stage: the next request's text encoders, and the other family's components, find the device empty."""
    hung_up(engine, job_for(model), kind, step)
    other = "flux" if model == "sdxl" else "sdxl"
    for follower in (job_for(model, prompt="a word that was never encoded"), job_for(other)):
        engine.submit(follower).result.result(PATIENCE)
    wait(lambda: not travels.there)
    assert travels.crowded() == []


@pytest.mark.fault(169)
def test_every_task_has_one_large_part_on_the_device_at_a_time(drawing: Any, travels: Travels) -> None:
    """The VAE encodes images and masks before the first step, and then leaves the device."""
    for model in FACTS:
        for job in (job_for(model), job_for(model, image=scene(), mask=disc_mask(), refine=True)):
            draw(drawing, job)
    assert travels.met
    assert travels.crowded() == []
    drawing.release_memory()
    assert not travels.there


FAILURES: dict[str, tuple[str, str, type[Exception]]] = {
    "out of memory in a step": ("unet", "forward", torch.OutOfMemoryError),
    "an error in a step": ("unet", "forward", ValueError),
    "out of memory in the text encoder": ("text_encoder_2", "forward", torch.OutOfMemoryError),
    "an error in the decoder": ("vae", "decode", ValueError),
    "out of memory in the decoder": ("vae", "decode", torch.OutOfMemoryError),
}


@pytest.mark.fault(169)
@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_leaves_nothing_on_the_device(what: str, drawing: Any, travels: Travels) -> None:
    """The exception is raised, the components leave, and the same job then gives the same image."""
    part, method, kind = FAILURES[what]
    before, whole = draw(drawing, job_for("sdxl")), getattr(drawing.residents["sdxl"].family.pipeline, part)
    true = getattr(whole, method)

    def fails(*arguments: Any, **named: Any) -> Any:
        true(*arguments, **named)
        raise kind("on purpose")

    setattr(whole, method, fails)
    with pytest.raises(Exception, match=r"on purpose|no memory left"):
        draw(drawing, job_for("sdxl", prompt=f"a prompt for {what}"))
    assert not travels.there
    setattr(whole, method, true)
    assert np.array_equal(draw(drawing, job_for("sdxl")), before)
    assert travels.crowded() == []


@pytest.mark.fault(169)
@pytest.mark.parametrize("where", ["mid_block", "conv_out", "time_embedding"])
def test_a_pass_that_fails_in_the_middle_leaves_no_layer_behind(where: str, one_thread: None) -> None:
    """OFFLOAD=sequential: accelerate's hooks move a layer's weights back; here without simulation."""
    pipeline = load_pipeline(FACTS["sdxl"], MODELS_DIR, CPU)
    cpu_offload(pipeline.unet, CPU)  # as diffusers does for each component, on a device that is not "cpu:0"
    offloaded = OffloadedModel(pipeline, None, Residency.SEQUENTIAL)
    layer = next(module for module in getattr(pipeline.unet, where).modules() if not list(module.children()))
    true = layer._old_forward

    def fails(*arguments: Any, **named: Any) -> Any:
        raise ValueError("on purpose")

    def run() -> None:
        with torch.no_grad():
            pipeline("a red disc", height=64, width=64, num_inference_steps=1, output_type="latent")

    def left() -> list[str]:
        return [name for name, parameter in pipeline.unet.named_parameters() if not parameter.is_meta]

    assert left() == []
    layer._old_forward = fails
    with pytest.raises(ValueError, match="on purpose"):
        run()
    assert left()  # otherwise the test would prove nothing
    with pytest.raises(ValueError, match="on purpose"), offloaded.only("unet"):
        run()
    assert left() == []
    layer._old_forward = true
    run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("residency", [Residency.MODEL, Residency.GROUP, Residency.SEQUENTIAL])
def test_the_device_is_empty_after_a_failure(residency: Residency) -> None:
    """On a real device: as many bytes as before."""
    pipeline = load_pipeline(FACTS["sdxl"], MODELS_DIR, CUDA, move=False)
    apply_residency(pipeline, None, CUDA, residency)
    offloaded = OffloadedModel(pipeline, None, residency)
    before = torch.cuda.memory_allocated()
    layer = pipeline.unet.conv_out
    layer.register_forward_pre_hook(lambda *given: (_ for _ in ()).throw(ValueError("on purpose")))
    with pytest.raises(ValueError, match="on purpose"), torch.inference_mode(), offloaded.only("unet"):
        pipeline("a red disc", height=64, width=64, num_inference_steps=1)
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.fault(169)
@pytest.mark.parametrize("quantize", ["int8", "float8", "torchao-int8", "torchao-float8", "torchao-float8-dynamic"])
@pytest.mark.parametrize("accelerated", [True, False])
def test_quantized_weights_that_cannot_travel_by_layers_are_refused_by_name(
    quantize: Quantize, accelerated: bool
) -> None:
    """OFFLOAD=sequential with QUANTIZE.

    The sentence has both settings, and automatic placement never selects the pair.
    """
    footprint = Footprint({"unet": 10**9}, quantized=("unet",), layer=10**6, weight_bytes=2)
    with pytest.raises(ModelLoadError, match=f"OFFLOAD=sequential cannot be combined with QUANTIZE={quantize}"):
        place(10**9, footprint, accelerated=accelerated, offload="sequential", quantize=quantize)
    if accelerated:
        assert place(5 * 10**6, footprint, accelerated=True, quantize=quantize).residency is Residency.GROUP


def test_packed_weights_travel_layer_by_layer() -> None:
    """OFFLOAD=sequential takes fp8 and GGUF files: their weights are plain bytes, unlike quanto's and torchao's."""
    raw = torch.randn(8, 16).to(torch.float8_e4m3fn).view(torch.uint8)
    layer = PackedLinear(PackedWeight(raw, "F8_E4M3", torch.tensor([[2.0]])), torch.zeros(8))
    network, given = torch.nn.Sequential(layer), torch.randn(2, 16)
    expected = network(given)
    cpu_offload(network, execution_device=CPU)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert torch.equal(network(given), expected)
