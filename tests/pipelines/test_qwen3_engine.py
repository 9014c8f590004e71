"""FLUX.2 klein and Z-Image under the engine: shared passes, cancel, too little memory, one text encoder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from drawing import draw, psnr
from fakes import until
from tiny_qwen3 import MASK, PICTURE, REFERENCES, klein, order, z_image

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.errors import OutOfMemory
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.loading.placement import Quantization, Residency
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import Registry, load
from stable_diffusion_server.types import DiffusionRequest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SPEC = 'native_size = 128\ndtype = "float32"\n'


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Tiny klein and Z-Image whose text encoders hold the same weights, with and without a head."""
    folder = tmp_path_factory.mktemp("models")
    one, other = tiny_families.build("flux2-klein"), tiny_families.build("z-image")
    other.register_modules(text_encoder=one.text_encoder.model, tokenizer=one.tokenizer)
    for name, pipeline in (("klein", one), ("z", other)):
        pipeline.save_pretrained(folder / name)
        (folder / f"{name}.toml").write_text(SPEC)
    return load(folder, "cpu", 1, LoadOptions(models=find_owned_models(folder, [folder]).specs))


@pytest.fixture
def steps(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts in each forward pass."""
    seen: list[list[str]] = []
    step = registry.step

    def note_and_step(states: Sequence[Any]) -> None:
        seen.append([state.request.prompt for state in states])
        step(states)

    monkeypatch.setattr(registry, "step", note_and_step)
    return seen


@pytest.fixture
def gate(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is prepared until it is set, so that all requests are there at the first step."""
    opened = threading.Event()
    prepare = registry.prepare

    def wait_and_prepare(request: DiffusionRequest) -> Any:
        opened.wait(30)
        return prepare(request)

    monkeypatch.setattr(registry, "prepare", wait_and_prepare)
    yield opened
    opened.set()


@pytest.fixture
def engine(registry: Registry) -> Iterator[Engine[Any]]:
    """A running engine over both models."""
    made: Engine[Any] = Engine(lambda: registry, queue_limit=32, max_batch=8)
    made.start()
    until(lambda: made.state is EngineState.READY)
    yield made
    made.stop(10)


def of(registry: Registry, model: str, prompt: str, **changes: Any) -> DiffusionRequest:
    """A request for a loaded model."""
    return order(registry.residents[model].family, prompt=prompt, **changes)


def test_equal_text_encoders_are_held_once(registry: Registry) -> None:
    """Every weight of the one with a head is the memory of the one without; each still draws as if alone."""
    one, other = (registry.residents[name].networks["text_encoder"] for name in ("klein", "z"))
    places = {name.removeprefix("model."): weight.data_ptr() for name, weight in one.named_parameters()}
    assert {name: weight.data_ptr() for name, weight in other.named_parameters()} == places
    assert registry.residents.bytes_used() < sum(registry.residents.bytes_used([name]) for name in ("klein", "z"))


def test_mixed_requests_share_passes_where_their_shapes_agree(
    registry: Registry, engine: Engine[Any], steps: list[list[str]], gate: threading.Event
) -> None:
    """Texts with texts, edits of equal reference shapes with each other, Z-Image of every task; 45 dB against alone."""
    requests = [
        of(registry, "klein", "text 3", num_inference_steps=3),
        of(registry, "klein", "text 5", num_inference_steps=5),
        of(registry, "klein", "edit a", references=REFERENCES[:1], num_inference_steps=2),
        of(registry, "klein", "edit b", references=(PICTURE,), num_inference_steps=3),
        of(registry, "klein", "edit of another shape", references=REFERENCES[1:2], num_inference_steps=2),
        of(registry, "z", "z text", num_inference_steps=3),
        of(registry, "z", "z inpaint, no guidance", image=PICTURE, mask=MASK, guidance_scale=0.0),
        of(registry, "klein", "cancelled", num_inference_steps=150),
    ]
    tickets = [engine.submit(request) for request in requests]
    gate.set()
    drawn = [ticket.result.result(60) for ticket in tickets[:-1]]
    tickets[-1].result.cancel()
    until(lambda: engine.running == 0)
    assert len([prompts for prompts in steps if "cancelled" in prompts]) < 150
    together = {frozenset(prompts) for prompts in steps}
    assert any({"text 3", "text 5"} <= prompts for prompts in together)
    assert {"edit a", "edit b"} in together
    assert {"z text", "z inpaint, no guidance"} in together
    assert all(prompts == {"edit of another shape"} for prompts in together if "edit of another shape" in prompts)
    assert not any({"text 3", "edit a"} <= prompts for prompts in together)
    for request, result in zip(requests, drawn, strict=False):
        assert psnr(result.product.pixels, draw(registry, request)) >= 45


@pytest.mark.parametrize("model", ["klein", "z"])
def test_a_cancelled_request_ends_within_a_step_and_its_mate_goes_on(
    model: str, registry: Registry, engine: Engine[Any], steps: list[list[str]]
) -> None:
    """It had more than a hundred steps left; the one beside it is drawn as if alone."""
    mate = of(registry, model, "mate", num_inference_steps=20)
    cancelled = engine.submit(of(registry, model, "cancelled", num_inference_steps=180))
    ticket = engine.submit(mate)
    until(lambda: any("cancelled" in prompts for prompts in steps))
    assert cancelled.result.cancel()
    assert psnr(ticket.result.result(60).product.pixels, draw(registry, mate)) >= 45
    until(lambda: engine.running == 0)
    assert sum("cancelled" in prompts for prompts in steps) < 180


def _fails(often: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """Finds no memory for the first calls."""
    left = [often]

    def call(*args: Any, **given: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return original(*args, **given)

    return call


@pytest.mark.fault(51)
@pytest.mark.parametrize("model", ["klein", "z"])
@pytest.mark.parametrize(("part", "method"), [("transformer", "forward"), ("vae", "decode"), ("vae", "encode")])
def test_what_finds_too_little_memory_is_tried_again_or_ends_with_a_sentence(
    model: str, part: str, method: str, registry: Registry, engine: Engine[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, while decoding, while encoding the input image; a second request is drawn as ever."""
    network = getattr(registry.residents[model].family.pipeline, part)
    request = of(registry, model, "with an image", image=PICTURE, strength=0.5)
    expected = draw(registry, request)
    with monkeypatch.context() as patched:
        patched.setattr(network, method, _fails(1, getattr(network, method)))
        result = engine.submit(request).result.result(60)
    assert result.product.pixels.shape == expected.shape
    with monkeypatch.context() as patched:
        patched.setattr(network, method, _fails(99, getattr(network, method)))
        with pytest.raises(OutOfMemory):
            engine.submit(request).result.result(60)
    assert psnr(engine.submit(request).result.result(60).product.pixels, expected) >= 45


def test_int8_weights_draw_almost_the_same(tmp_path: Path) -> None:
    """QUANTIZE=int8 packs transformer and text encoder; the picture stays like that of the plain weights."""
    for name, tiny in (("flux2-klein", klein()), ("z-image-turbo", z_image())):
        tiny.pipeline.save_pretrained(tmp_path / name)
        (tmp_path / f"{name}.toml").write_text(SPEC)
    specs = find_owned_models(tmp_path, [tmp_path]).specs
    packed = load(tmp_path, "cpu", 1, LoadOptions(models=specs, quantize="int8"))
    for name in specs:
        placement = packed.residents[name].placement
        assert placement is not None
        assert (placement.residency, placement.quantization) == (Residency.RESIDENT, Quantization.INT8)
        plain = klein() if name == "flux2-klein" else z_image()
        request = order(plain, num_inference_steps=2)
        assert psnr(draw(packed.residents[name].family, request), draw(plain, request)) >= 20
