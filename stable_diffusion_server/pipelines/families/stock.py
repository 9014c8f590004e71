"""Any text-to-image pipeline of diffusers: drawn by its own call, one step at a time, alone in its forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray

from stable_diffusion_server.errors import InvalidInput, NotFinite
from stable_diffusion_server.pipelines.base import (
    DecodedImage,
    PipelineState,
    await_device,
    decode,
    translate_torch_errors,
)
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.diffusers_family import DiffusersFamily
from stable_diffusion_server.pipelines.family import LoadedFamily
from stable_diffusion_server.pipelines.latent_preview import LatentPreviewer
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import token_counter
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.stock.call_arguments import call_arguments
from stable_diffusion_server.pipelines.stock.calls import RefusedByClass
from stable_diffusion_server.pipelines.stock.position_tables import check_size
from stable_diffusion_server.pipelines.stock.stepwise import StockCall
from stable_diffusion_server.pipelines.stock.task_pipelines import for_request, over_components
from stable_diffusion_server.pipelines.stock.vae_latents import PreviewVae, latents_for_vae, layout_of
from stable_diffusion_server.pipelines.stock_classes import StockClass, stock_class
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling
from stable_diffusion_server.types import DiffusionRequest

# Its call reads the second value of a step when there is one step, which other schedulers do not return.
_ONE_STEP = "PixArtAlphaPipeline"


@dataclass
class StockState(PipelineState[None]):
    """A request whose call waits in its own thread; the thread ends when the last reference to this goes.

    `latents` are those of the last callback, empty before it; `segments` stay empty.
    """

    call: StockCall | None = None
    scheduler: Any = None

    @property
    def steps(self) -> int:
        """Total number of steps."""
        return self.running.steps

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.running.done

    @property
    def running(self) -> StockCall:
        """The call."""
        if self.call is None:
            raise ValueError("a state of a stock pipeline has a call")
        return self.call

    def take_step(self) -> None:
        """Run one step of the call and take what it says."""
        call = self.running
        call.step()
        self.index = call.index
        if call.latents is not None:
            self.latents, self.predicted_original = call.latents, _predicted(self.scheduler, call)


class Stock(DiffusersFamily):
    """Draws with the calls of a pipeline's own class and, for other tasks, of the classes beside it in diffusers."""

    def __init__(
        self,
        pipeline: Any,
        spec: ModelSpec,
        controlnet: Any = None,
        loras: LoraManager | None = None,
        prompt_cache: PromptCache | None = None,
        tiling: VaeTiling = WHOLE,
    ) -> None:
        self.pipeline, self.spec, self.controlnet, self.tiling = pipeline, spec, controlnet, tiling
        self.prompt_cache = PromptCache(0) if prompt_cache is None else prompt_cache
        known = stock_class(type(pipeline).__name__)
        classes = {
            task: stock_class(name) for task, name in (known.tasks if known else {}).items() if task in spec.tasks
        }
        self._pipelines = {task: (over_components(pipeline, kind.name), kind) for task, kind in classes.items() if kind}
        self._understood = bool(layout_of(type(pipeline).__name__))
        if self._understood:
            self._previewer = LatentPreviewer(PreviewVae(pipeline.vae), self._preview_latents)
        self._counters = _token_counters(pipeline)

    @classmethod
    def load(cls, spec: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> LoadedFamily:
        """Load the pipeline of `spec` and place it. Raises `ModelLoadError`, `ModelTooLarge` when it does not fit.

        Without PERFORMANCE, whose optimizations are for networks that they were measured with, and without LoRAs.
        """
        return super().load(spec, models_dir, device, replace(options, performance="off", loras=LoraFolder(None)))

    def prepare(self, request: DiffusionRequest) -> PipelineState[Any]:
        """Start the call of a request; it encodes prompt and images and waits before its first step.

        Raises `InvalidInput` for what the class does not take.
        """
        pipeline, kind = self._pipeline_for(request)
        check_size(pipeline, request.width, request.height)
        if (
            kind.name == _ONE_STEP
            and request.num_inference_steps == 1
            and "LCM" not in type(pipeline.scheduler).__name__
        ):
            raise InvalidInput(f"{kind.name} takes one step with LCM's schedule only.", field="num_inference_steps")
        arguments = call_arguments(request, self.spec, kind.parameters, latent=self._understood)
        guidance = request.guidance_scale if kind.guider else None
        own = for_request(pipeline, guidance, (request.width, request.height))
        call = StockCall(own, arguments, self.device)
        try:
            with translate_torch_errors(), self._tiled(request):
                call.start()
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            if not request.extra and isinstance(error, RefusedByClass):
                sentence = f"{kind.name} does not take a prompt of this form, or images or a size like these."
                raise InvalidInput(sentence, field="prompt") from error
            if not request.extra:
                raise
            names = ", ".join(name for name, _ in request.extra)
            sentence = f"{kind.name} does not take these values of {names} ({type(error).__name__})."
            raise InvalidInput(sentence, field="extra") from error
        shape = (*request.shape, request.task, request.num_inference_steps)
        empty = torch.empty(0, device=self.device)
        return StockState(request, shape, empty, (), None, index=call.index, call=call, scheduler=own.scheduler)

    def step(self, states: Sequence[PipelineState[Any]]) -> None:
        """One step of each state's call, one after the other."""
        with translate_torch_errors():
            for state in states:
                _own(state).take_step()
            await_device(self.device)

    def finish(self, state: PipelineState[Any]) -> DecodedImage:
        """Decode the latents; before the last step, the prediction of the final ones. Raises `NotFinite`.

        If the layout of the class's latents is unknown, its own call decodes; after an error it runs again in full.
        """
        mine, request = _own(state), state.request
        with translate_torch_errors():
            if not self._understood:
                with self._tiled(request):
                    return self._drawn_by_class(mine)
            if mine.done:
                latents, returned = mine.running.finish()[0], True
            else:
                latents, returned = mine.latents if mine.predicted_original is None else mine.predicted_original, False
            tiling = state.tiling or self.tiling
            unscaled = latents_for_vae(self.pipeline, latents, request.height, request.width, returned=returned)
            with tiling.applied(self.pipeline.vae, request.width * request.height):
                image = decode(self.pipeline.vae, unscaled)
        return replace(image, tiled=state.tiling is not None, warnings=state.warnings)

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """A small image of the state; grey before the first step, and where the class's latents are not understood."""
        if not self._understood or not state.latents.numel():
            return np.full((64, 64, 3), 128, np.uint8)
        return self._previewer.preview(state)

    def shrink(self, state: PipelineState[Any]) -> bool:
        """Decode this request in tiles, or in smaller ones; false when they are as small as they can be."""
        return self._understood and hasattr(self.pipeline.vae, "use_tiling") and super().shrink(state)

    def token_counter(self) -> Callable[[str], int]:
        """The largest count of the tokenizers."""
        counters = self._counters
        return lambda prompt: max((count(prompt) for count in counters), default=0)

    def _pipeline_for(self, request: DiffusionRequest) -> tuple[Any, StockClass]:
        if request.task not in self._pipelines:
            raise InvalidInput(f"{self.spec.name} does not draw the task {request.task}.", field="model")
        return self._pipelines[request.task]

    def _drawn_by_class(self, state: StockState) -> DecodedImage:
        """The pixels that the call returns: 0..1, height × width × 3."""
        if not state.done:
            raise ValueError("an unfinished picture of this class cannot be decoded")
        if state.running.failed:
            again = self.prepare(state.request)
            while not again.done:
                self.step([again])
            state.call = _own(again).call
        image = np.asarray(state.running.finish()[0])[0]
        if not np.isfinite(image).all():
            raise NotFinite("The decoded picture is not finite.")
        return DecodedImage((image * 255).round().astype(np.uint8), redecoded=False)

    @contextmanager
    def _tiled(self, request: DiffusionRequest) -> Iterator[None]:
        """A block in which the class's own encoding and decoding of an image is tiled as its size needs it."""
        with self.tiling.applied(getattr(self.pipeline, "vae", None), request.width * request.height):
            yield

    def _vae_latents(self, state: PipelineState[Any], latents: torch.Tensor) -> torch.Tensor:
        height, width = state.request.height, state.request.width
        return latents_for_vae(self.pipeline, latents, height, width, returned=False)

    def _preview_latents(self, state: PipelineState[Any], latents: torch.Tensor) -> torch.Tensor:
        unscaled = self._vae_latents(state, latents)
        return unscaled[:, :, 0] if unscaled.ndim == 5 else unscaled


def _own(state: PipelineState[Any]) -> StockState:
    if not isinstance(state, StockState):
        raise TypeError("a state of another family")
    return state


def _predicted(scheduler: Any, call: StockCall) -> torch.Tensor | None:
    """The final latents by the velocity of the last step, for Euler's flow matching: x − σ·v, v = Δx / Δσ."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or call.latents is None or call.previous is None:
        return None
    index = scheduler.step_index
    if scheduler.config.stochastic_sampling or not index or index >= len(scheduler.sigmas):
        return None
    before, now = (float(sigma) for sigma in scheduler.sigmas[index - 1 : index + 1])
    if before == now:
        return None
    return call.latents - now * (call.latents - call.previous) / (now - before)


def _token_counters(pipeline: Any) -> list[Callable[[str], int]]:
    """Counters of the tokenizers that read the whole prompt.

    Not CLIP's beside others, whose short limit concerns a pooled vector, and not ByT5's, which reads quoted words.
    """
    found = [part for name, part in pipeline.components.items() if "tokenizer" in name and callable(part)]
    whole = [part for part in found if not type(part).__name__.startswith(("CLIP", "ByT5"))]
    return [token_counter(part) for part in whole or found]
