"""The contract every family keeps: prepare, step, finish. Knows tensors and jobs, and neither queues nor requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import DeviceLost, NotFinite, OutOfMemory
from stable_diffusion_server.pipelines.conditioning.controlnet import ControlNetInput
from stable_diffusion_server.pipelines.conditioning.lora import LorasInUse
from stable_diffusion_server.types import DiffusionRequest, ImageArray

C = TypeVar("C")

# Latent pixels along a side; smaller tiles would be mostly seam.
_SMALLEST_TILE = 8


@dataclass(frozen=True, slots=True)
class DenoisingSegment:
    """A run of steps: its schedule, and the noise it begins with (shaped like the latents) with its generator.

    A job has one; a refined job has a second one, which begins with what the first one came to.
    """

    scheduler: Any
    timesteps: torch.Tensor
    generator: torch.Generator
    noise: torch.Tensor

    def noised(self, latents: torch.Tensor, position: int) -> torch.Tensor:
        """`latents` as noisy as this schedule has them at its step number `position`.

        Some schedulers look at their own step counter instead, so ask for the step that comes next.
        """
        timestep = self.timesteps[position].reshape(1)
        noised: torch.Tensor
        if hasattr(self.scheduler, "scale_noise"):  # flow matching
            noised = self.scheduler.scale_noise(latents, timestep, self.noise)
        else:
            noised = self.scheduler.add_noise(latents, self.noise, timestep)
        return noised

    def denoised(
        self, prediction: torch.Tensor, position: int, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latents after step `position`, and those they are expected to end as, where the scheduler tells.

        Schedulers that draw noise in a step draw it from our generator.
        """
        extra = {"generator": self.generator} if self.scheduler.draws_noise else {}
        step = self.scheduler.step(prediction, self.timesteps[position], latents, return_dict=False, **extra)
        if hasattr(self.scheduler, "scale_noise"):  # flow matching: straight on from here
            return step[0], step[0] - self.scheduler.sigmas[self.scheduler.step_index] * prediction
        return step[0], step[1] if len(step) > 1 else None


@dataclass(frozen=True, slots=True)
class InpaintConstraint:
    """What stays as it was: `latents` of a picture, wherever `mask` (shaped like them, or 1 × 1 × h × w) is 0."""

    mask: torch.Tensor
    latents: torch.Tensor


@dataclass(slots=True)
class PipelineState(Generic[C]):
    """One job between two steps. Owns its schedulers and generators, so that jobs in a batch never touch each other.

    `latents` are 1 × …, `stages` what is left to do, `index` the number of steps done; `conditioning` is what the
    family made of the prompt. `keep` and `control` make a job an inpainting or a guided one, together or alone.
    `expected` are the latents it seemed to end as at the last step, if known. `adapters` are those it is drawn with,
    which stay loaded for as long as it has them.
    """

    job: DiffusionRequest
    shape: tuple[object, ...]
    latents: torch.Tensor
    stages: tuple[DenoisingSegment, ...]
    conditioning: C
    keep: InpaintConstraint | None = None
    control: ControlNetInput | None = None
    index: int = 0
    begun: int = 0
    expected: torch.Tensor | None = None
    adapters: LorasInUse = ()

    @property
    def steps(self) -> int:
        """Number of steps in all."""
        return self.begun + sum(len(stage.timesteps) for stage in self.stages)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.index >= self.steps

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep of the next step, a scalar."""
        return self.stages[0].timesteps[self.index - self.begun]

    @property
    def model_input(self) -> torch.Tensor:
        """The latents as the model wants to see them at the next step."""
        scheduler = self.stages[0].scheduler
        if not hasattr(scheduler, "scale_model_input"):  # flow matching
            return self.latents
        scaled: torch.Tensor = scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def advance(self, prediction: torch.Tensor) -> None:
        """Take one step with the model's prediction for these latents; put back what is kept; begin the next stage.

        The blend is that of diffusers' inpaint pipelines (after Lugmayr et al. 2022, arXiv 2201.09865): the kept
        latents are as noisy as the next step expects, and clean after the last one.
        """
        stage = self.stages[0]
        self.latents, self.expected = stage.denoised(prediction, self.index - self.begun, self.latents)
        self.index += 1
        position = self.index - self.begun
        ended = position == len(stage.timesteps)
        if self.keep is not None:
            kept = self.keep.latents if ended else stage.noised(self.keep.latents, position)
            self.latents = (1 - self.keep.mask) * kept + self.keep.mask * self.latents
            if self.expected is not None:
                self.expected = (1 - self.keep.mask) * self.keep.latents + self.keep.mask * self.expected
        if ended and len(self.stages) > 1:
            self._begin_next_stage()

    def _begin_next_stage(self) -> None:
        """The next stage takes the finished latents for its picture, as a second call of a pipeline would."""
        self.stages, self.begun = self.stages[1:], self.index
        if self.keep is not None:
            self.keep = InpaintConstraint(self.keep.mask, self.latents)
        self.latents = self.stages[0].noised(self.latents, 0)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A finished picture: `pixels` uint8, height × width × 3; `redecoded` when the VAE had to run again in fp32."""

    pixels: NDArray[np.uint8]
    redecoded: bool


class Family(Protocol):
    """A model family. All three run on the device thread alone; states passed to `step` share one shape.

    They raise `OutOfMemory` and `DeviceLost`; `finish` raises `NotFinite` too.
    """

    def prepare(self, job: DiffusionRequest) -> PipelineState[Any]:
        """Encode the prompt, make the latents, set the timesteps."""

    def step(self, states: Sequence[PipelineState[Any]]) -> None:
        """One denoising step for every state, in one forward pass."""

    def finish(self, state: PipelineState[Any]) -> DecodedImage:
        """Decode the latents."""

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """A small picture of where a state stands, made without decoding."""

    def shrink(self) -> bool:
        """Take less memory from now on; false when there is no less."""

    def count_tokens(self, prompt: str) -> int:
        """Length of the prompt in the encoder's tokens, special tokens included. Safe from any thread."""


@contextmanager
def translate_torch_errors() -> Iterator[None]:
    """Run a block in inference mode and turn torch's errors into ours."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("The device has no memory left for this picture.") from error
    except torch.AcceleratorError as error:
        raise DeviceLost("The device reported an error it cannot recover from.") from error


def await_device(device: torch.device) -> None:
    """Wait until what was launched is computed: else a step would seem to take no time, and errors come elsewhere.

    Measured on an H200 for four steps of 1024²: 1 of 139 ms.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU whatever the device, so that a seed means the same picture everywhere."""
    return torch.Generator("cpu").manual_seed(seed)


def to_tensor(picture: ImageArray, device: torch.device) -> torch.Tensor:
    """A picture as floats in 0..1, 1 × 3 × height × width; a mask or edges become three equal channels."""
    pixels = np.atleast_3d(picture.pixels).astype(np.float32) / 255
    # Laid out as diffusers' image processor does, since convolutions round by it.
    return torch.from_numpy(pixels[None].transpose(0, 3, 1, 2)).to(device).expand(1, 3, -1, -1)


def latent_mask(mask: ImageArray, like: torch.Tensor) -> torch.Tensor:
    """The mask over latents `like` (1 × channels × h × w): 1 × 1 × h × w, 1 to repaint and 0 to keep.

    Binarized at one half, then shrunk to the nearest pixel, as diffusers' inpaint pipelines do.
    """
    binary = (to_tensor(mask, like.device)[:, :1] >= 0.5).float()
    return torch.nn.functional.interpolate(binary, size=like.shape[-2:]).to(like.dtype)


def encode(vae: Any, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A sample of the VAE's unscaled latents (1 × channels × h × w) of floats in 0..1. Draws from `generator`."""
    latents: torch.Tensor = vae.encode((2 * image - 1).to(vae.dtype)).latent_dist.sample(generator)
    return latents


def decode(vae: Any, latents: torch.Tensor) -> DecodedImage:
    """Decode unscaled latents (1 × channels × h × w) by the VAE to pixels.

    Decoded floats that are not finite are decoded again in fp32; raises `NotFinite` when the latents themselves are
    not, or when fp32 does not help.
    """
    if not torch.isfinite(latents).all():
        raise NotFinite("The latents are not finite; another seed or fewer guidance may help.")
    image = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    redecoded = False
    finite = _is_finite(image)
    if not finite and vae.dtype != torch.float32:
        image, redecoded = _decode_in_fp32(vae, latents), True
        finite = _is_finite(image)
    if not finite:
        raise NotFinite("The decoded picture is not finite.")
    # The same arithmetic as diffusers' VaeImageProcessor: to 0..1, clamp, then round to 0..255; on the device, from
    # which a quarter of the bytes has to come then.
    scaled = (image[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
    levels = (scaled * 255).round().to(torch.uint8).contiguous()
    return DecodedImage(levels.cpu().numpy(), redecoded)


def _is_finite(image: torch.Tensor) -> bool:
    """Whether all numbers are: the extremes tell, since NaN is one where there is any, at a third of the cost."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(image))).all())


def shrink_tiles(vae: Any) -> bool:
    """Decode in tiles from now on, or in tiles half as wide; false when they are as small as they may be."""
    if not vae.use_tiling:
        vae.enable_tiling()
        return True
    if vae.tile_latent_min_size <= _SMALLEST_TILE:
        return False
    vae.tile_latent_min_size //= 2
    vae.tile_sample_min_size //= 2
    return True


def _decode_in_fp32(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    dtype = vae.dtype
    vae.to(torch.float32)
    try:
        image: torch.Tensor = vae.decode(latents.float(), return_dict=False)[0]
        return image
    finally:
        vae.to(dtype)
