"""A stock pipeline's call in its own thread: ends with its state, hands errors over, takes only what its class has."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_families
import tiny_stock
import torch
from drawing import draw
from stock_families import picture, request_of, stock_family

from stable_diffusion_server.errors import DeviceLost, InvalidInput, NotFinite, OutOfMemory
from stable_diffusion_server.pipelines.families.stock import Stock, StockState
from stable_diffusion_server.pipelines.loading.footprint import footprint_of, native_tiling
from stable_diffusion_server.pipelines.loading.working_memory import Architecture
from stable_diffusion_server.pipelines.stock.vae_latents import latents_for_vae
from stable_diffusion_server.pipelines.stock_rows import STOCK_ROWS
from stable_diffusion_server.pipelines.vae_tiles import WHOLE
from stable_diffusion_server.types import Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def family() -> Stock:
    """SD 3, with tasks from text, image and mask."""
    return stock_family("sd3")


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the collector: what is freed is freed by losing its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def calls() -> list[threading.Thread]:
    """The threads of stock calls."""
    return [thread for thread in threading.enumerate() if thread.name == "stock-call"]


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "qwen-image", "sana", "flux2-klein"])
@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_state_that_is_lost_ends_its_thread_and_frees_its_latents(name: str, steps: int) -> None:
    """Before the first step, between two, and when all are done; only by losing the reference."""
    family = stock_family(name)
    state: Any = family.prepare(request_of(family))
    assert len(calls()) == 1
    held = []
    for _ in range(steps):
        family.step([state])
        held.append(weakref.ref(state.latents))
    assert state.index == steps
    assert state.steps == 4
    call = weakref.ref(state.call)
    del state
    assert not calls()
    assert call() is None
    assert [latents() for latents in held] == [None] * steps


@pytest.mark.usefixtures("uncollected")
def test_fifty_lost_states_leave_nothing_behind(family: Stock) -> None:
    """Every second one in the middle; the others are finished."""
    before, held = threading.active_count(), []
    for number in range(50):
        state = family.prepare(request_of(family, num_inference_steps=2, seed=number))
        family.step([state])
        held.append(weakref.ref(state.latents))
        if number % 2:
            family.step([state])
            family.finish(state)
        del state
    assert threading.active_count() == before
    assert not any(latents() is not None for latents in held)


@pytest.mark.usefixtures("uncollected")
def test_a_cancelled_call_ends_at_once_and_the_model_draws_on(family: Stock) -> None:
    """`cancel` twice, and after the end, has no effect."""
    expected = draw(family, request_of(family))
    state: Any = family.prepare(request_of(family, seed=99))
    family.step([state])
    state.call.cancel()
    assert not calls()
    state.call.cancel()
    assert (draw(family, request_of(family)) == expected).all()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    ("raised", "translated"),
    [
        (torch.OutOfMemoryError, OutOfMemory),
        (torch.AcceleratorError, DeviceLost),
        (RuntimeError, RuntimeError),
        (KeyboardInterrupt, KeyboardInterrupt),
    ],
)
def test_an_error_of_a_pass_comes_out_of_step(
    raised: type[BaseException], translated: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Translated, without the frames that hold latents, with a note of where it was; the next request is drawn."""
    family = stock_family("sd3")
    expected = draw(family, request_of(family))
    state: Any = family.prepare(request_of(family))
    family.step([state])
    latents = weakref.ref(state.latents)
    whole = family.pipeline.transformer.forward

    def fail(*given: Any, **named: Any) -> Any:
        try:
            [].pop()
        except IndexError as inner:  # its frames hold tensors as well
            raise (raised("no memory", 2) if raised is torch.AcceleratorError else raised("no memory")) from inner

    monkeypatch.setattr(family.pipeline.transformer, "forward", fail)
    with pytest.raises(translated) as caught:
        family.step([state])
    errors = [caught.value, caught.value.__cause__]
    assert "pipeline_stable_diffusion_3" in "".join(note for one in errors for note in getattr(one, "__notes__", ()))
    assert not calls()
    del state, caught, errors  # frames of `step` hold the state
    assert latents() is None
    monkeypatch.setattr(family.pipeline.transformer, "forward", whole)
    assert (draw(family, request_of(family)) == expected).all()


def test_an_error_before_the_first_step_comes_out_of_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in a text encoder."""
    family = stock_family("aura-flow")
    monkeypatch.setattr(family.pipeline.text_encoder, "forward", _no_memory)
    with pytest.raises(OutOfMemory):
        family.prepare(request_of(family))
    assert not calls()


def _no_memory(*given: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError("no memory")


def test_a_picture_that_finds_no_memory_is_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`finish` may be repeated, in tiles: the call has ended, and its latents are kept."""
    for name in ("sd3", "qwen-image", "sana"):
        family = stock_family(name)
        state = family.prepare(request_of(family, width=128))
        while not state.done:
            family.step([state])
        whole = family.finish(state)
        with monkeypatch.context() as patched:
            patched.setattr(family.pipeline.vae, "decode", _no_memory)
            with pytest.raises(OutOfMemory):
                family.finish(state)
        assert family.shrink(state)
        tiled = family.finish(state)
        assert tiled.tiled
        assert tiled.pixels.shape == whole.pixels.shape == (64, 128, 3)
        shrinks = 1
        while family.shrink(state):
            shrinks += 1
        assert shrinks == 4, "whole, then 512, 256, 128, 64"
        smallest = family.finish(state).pixels
        assert smallest.shape == whole.pixels.shape
        assert np.abs(smallest.astype(int) - whole.pixels).mean() < 40, name


def test_a_picture_that_the_class_decodes_is_drawn_anew_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call has ended with the error, so the engine's second try draws it again: the same picture."""
    family = stock_family("kandinsky3", tiny_stock.build("kandinsky3"))
    request = request_of(family)
    expected = draw(family, request)
    state = family.prepare(request)
    while not state.done:
        family.step([state])
    with monkeypatch.context() as patched:
        patched.setattr(family.pipeline.movq, "decode", _no_memory)
        with pytest.raises(OutOfMemory):
            family.finish(state)
        with pytest.raises(OutOfMemory):
            family.finish(state)
    assert not family.shrink(state)
    assert (family.finish(state).pixels == expected).all()
    assert not calls()
    family.pipeline.movq.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(NotFinite):
        draw(family, request)


def test_a_pipeline_without_a_vae_has_a_footprint() -> None:
    """Pixels, or a decoder of another name: its denoiser is estimated, and nothing is tiled."""
    spec = STOCK_ROWS["Kandinsky3Pipeline"]
    unet = tiny_families.build("lumina2").transformer.to("meta")  # a class that cannot be counted
    model = Architecture({"unet": unet}, {"unet": torch.float32}, spec.text_tokens)
    footprint = footprint_of(spec, model)
    assert set(footprint.working) == {"unet"}
    assert footprint.working["unet"] > 0
    assert model.working_bytes["unet"].estimated
    assert native_tiling(spec, model, 10**9) == WHOLE


def test_latents_that_are_not_finite_are_refused() -> None:
    """The guard of the other families."""
    family = stock_family("sd3")
    family.pipeline.transformer.proj_out.weight[0, 0] = float("nan")
    state = family.prepare(request_of(family))
    while not state.done:
        family.step([state])
    with pytest.raises(NotFinite):
        family.finish(state)


def test_an_unfinished_picture_is_the_prediction_of_the_end(family: Stock) -> None:
    """The velocity of a step leads to latents nearer to the end than the noisy ones; previews show it too."""
    state: Any = family.prepare(request_of(family, num_inference_steps=8))
    assert family.preview(state).shape == (64, 64, 3)
    for _ in range(6):
        family.step([state])
    noisy, predicted = state.latents, state.predicted_original
    early, preview = family.finish(state).pixels, family.preview(state)
    while not state.done:
        family.step([state])
    end = state.latents
    assert (predicted - end).abs().mean() < (noisy - end).abs().mean()
    assert early.shape == family.finish(state).pixels.shape
    assert preview.shape == (128, 128, 3)
    assert preview.std() > 1


@pytest.mark.parametrize("name", ["qwen-image", "sana", "flux2-klein", "flux-kontext", "chroma", "lumina2"])
def test_previews_follow_each_layout_of_latents(name: str) -> None:
    """What a callback gives after the last step is in the VAE's scale what the call returns."""
    family = stock_family(name)
    task = Task.EDIT if name == "flux-kontext" else Task.TEXT_TO_IMAGE
    state: Any = family.prepare(request_of(family, task))
    while not state.done:
        family.step([state])
        assert family.preview(state).std() > 1
    with torch.inference_mode():
        seen = latents_for_vae(family.pipeline, state.latents, 64, 64, returned=False)
        returned = latents_for_vae(family.pipeline, state.call.finish()[0], 64, 64, returned=True)
    assert seen.shape == returned.shape
    assert torch.allclose(seen, returned, atol=1e-4)


def test_the_call_computes_as_the_engines_thread_does(family: Stock) -> None:
    """In inference mode, with the threads that the controlling one has at each step."""
    seen: list[tuple[int, bool]] = []
    hook = family.pipeline.transformer.register_forward_pre_hook(
        lambda *_: seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
    )
    try:
        state = family.prepare(request_of(family))
        for threads in (2, 1, 2, 1):
            torch.set_num_threads(threads)
            family.step([state])
    finally:
        hook.remove()
        torch.set_num_threads(1)
    assert seen == [(2, True), (1, True), (2, True), (1, True)]


ATTACKS: list[tuple[str, Any]] = [
    ("unknown", 1),
    ("callback_on_step_end", "x"),
    ("callback", "x"),
    ("latents", 1),
    ("generator", 1),
    ("__class__", "x"),
    ("__init__", 1),
    ("self", "x"),
    ("kwargs", "x"),
    ("output_type", "pil"),
    ("return_dict", False),
    ("num_images_per_prompt", 64),
    ("prompt", "another"),
    ("prompt_2", "another"),
    ("negative_prompt", "another"),
    ("negative_prompt_3", "another"),
    ("guidance_scale", 3.0),
    ("num_inference_steps", 9),
    ("height", 8192),
    ("sigmas", 1.0),
    ("joint_attention_kwargs", "x"),
    ("ip_adapter_image", "/etc/passwd"),
    ("skip_guidance_layers", 7),
    ("clip_skip", 1.5),
    ("clip_skip", "1"),
    ("clip_skip", True),
    ("clip_skip", 10**9),
    ("mu", float("nan")),
    ("mu", float("inf")),
    ("mu", -1e300),
    ("max_sequence_length", 10**9),
    ("max_sequence_length", 0),
    ("max_sequence_length", -5),
    ("x" * 100_000, 1),
    ("\u0000", 1),
    ("", 1),
]


@pytest.mark.parametrize(("name", "value"), ATTACKS, ids=lambda given: ascii(given)[:30])
def test_parameters_that_a_class_does_not_offer_are_refused_by_name(name: str, value: Any, family: Stock) -> None:
    """Before any thread is started, with a bounded sentence that names the field."""
    with pytest.raises(InvalidInput) as refused:
        family.prepare(request_of(family, extra=((name, value),)))
    assert not calls()
    assert refused.value.field is not None
    assert refused.value.field.startswith("extra.")
    assert len(refused.value.detail) < 1000


def test_parameters_that_a_class_offers_change_the_picture(family: Stock) -> None:
    """As its own call takes them; whole numbers are numbers."""
    plain = draw(family, request_of(family))
    for extra in ((("max_sequence_length", 1),), (("skip_layer_guidance_scale", 2),), (("mu", 1),)):
        drawn = draw(family, request_of(family, extra=extra))
        assert drawn.shape == plain.shape
    lumina = stock_family("lumina2")
    usual = draw(lumina, request_of(lumina))
    assert (draw(lumina, request_of(lumina, extra=(("cfg_trunc_ratio", 0.25),))) != usual).any()
    assert (draw(lumina, request_of(lumina, extra=(("cfg_normalization", False),))) != usual).any()


def test_values_that_the_class_itself_refuses_are_the_callers_mistake(family: Stock) -> None:
    """Of a right type and out of the class's range: refused with the names, not an internal error."""
    with pytest.raises(InvalidInput) as refused:
        family.prepare(request_of(family, extra=(("clip_skip", 50_000),)))
    assert refused.value.field == "extra"
    assert "clip_skip" in refused.value.detail


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("lora", {"loras": (("detail", 1.0),)}),
        ("refine", {"refine": True}),
        ("canny", {"control": picture()}),
    ],
)
def test_what_no_stock_call_takes_is_refused(field: str, changes: dict[str, Any], family: Stock) -> None:
    """By the name of the field."""
    with pytest.raises(InvalidInput) as refused:
        family.prepare(request_of(family, **changes))
    assert refused.value.field == field


def test_a_task_without_a_class_is_refused() -> None:
    """AuraFlow draws from text alone."""
    family = stock_family("aura-flow")
    with pytest.raises(InvalidInput):
        family.prepare(request_of(family, Task.INPAINT))


def test_a_strength_that_leaves_no_step_draws_one(family: Stock) -> None:
    """As AUTOMATIC1111's clients expect; the class itself would raise an error."""
    state = family.prepare(replace(request_of(family, Task.IMAGE_TO_IMAGE), strength=0.0))
    assert state.steps == 1


def test_a_state_is_not_mixed_up_with_another_familys() -> None:
    """The type is checked before a call is looked for."""
    family = stock_family("aura-flow")
    state: Any = family.prepare(request_of(family))
    assert isinstance(state, StockState)
    state.call = None
    with pytest.raises(ValueError, match="has a call"):
        family.step([state])
    other: Callable[..., Any] = tiny_families.build
    with pytest.raises(TypeError):
        family.step([other])  # type: ignore[list-item]  # on purpose
