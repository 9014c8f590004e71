"""Shared by the families: the state of a request, its schedule, and conversions between pixels and latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import DeviceLost, NotFinite, OutOfMemory
from stable_diffusion_server.pipelines.conditioning.control_groups import ControlNetInput
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling, runs_in_tiles
from stable_diffusion_server.pipelines.wrapping import current_tiling, wrapping
from stable_diffusion_server.types import NOISE_SEEDS, DiffusionRequest, ImageArray

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class DenoisingSegment:
    """Consecutive steps of one schedule, with the noise they start from (shaped like the latents) and its generator.

    `timesteps` has one for each forward pass; a scheduler of second order takes two passes a step, so that `steps`, as
    a caller counts them, are fewer; 0 means one for each pass.

    A request has one segment; a refined request has a second one, which starts from the result of the first: with noise
    added, or, for another network with a `conditioning` of its own, as it is.
    """

    scheduler: Any
    timesteps: torch.Tensor
    generator: torch.Generator
    noise: torch.Tensor
    conditioning: Any = None
    steps: int = 0

    def steps_done(self, passes: int) -> int:
        """How many steps are finished after so many passes; the last step of a scheduler of second order has one."""
        return passes * (self.steps or len(self.timesteps)) // len(self.timesteps)

    def add_noise(self, latents: torch.Tensor, position: int) -> torch.Tensor:
        """`latents` with the noise level of pass number `position`.

        Some schedulers use their own step counter instead of the timestep, so `position` must be the next step.
        """
        timestep = self.timesteps[position].reshape(1)
        noisy: torch.Tensor
        if hasattr(self.scheduler, "scale_noise"):  # flow matching
            noisy = self.scheduler.scale_noise(latents, timestep, self.noise)
        else:
            noisy = self.scheduler.add_noise(latents, self.noise, timestep)
        return noisy

    def step(
        self, prediction: torch.Tensor, position: int, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latents after pass `position`, and the scheduler's estimate of the final ones, if it gives one.

        Schedulers that draw noise in a step use this segment's generator.
        """
        extra = {"generator": self.generator} if self.scheduler.draws_noise else {}
        extra |= self.scheduler.step_options
        step = self.scheduler.step(prediction, self.timesteps[position], latents, return_dict=False, **extra)
        if hasattr(self.scheduler, "scale_noise"):  # flow matching: extrapolate the velocity to sigma 0
            return step[0], step[0] - self.scheduler.sigmas[self.scheduler.step_index] * prediction
        return step[0], step[1] if len(step) > 1 else None


@dataclass(frozen=True, slots=True)
class InpaintConstraint:
    """Keeps `latents` of the original image wherever `mask` (shaped like them, or 1 × 1 × h × w) is 0.

    Where a `soft` mask is c, the last share c of the passes is free (Levin and Fried 2023, arXiv 2306.00950).
    """

    mask: torch.Tensor
    latents: torch.Tensor
    soft: bool = False

    def repainted(self, done: float) -> torch.Tensor:
        """The mask of what stays as it is drawn after this share of the passes, 0..1."""
        if not self.soft:
            return self.mask
        return ((1 - self.mask <= done) & (self.mask > 0)).to(self.mask.dtype)


@dataclass(slots=True)
class PipelineState(Generic[C]):
    """A request between two steps. It owns its schedulers and generators, so requests in a batch are independent.

    `latents` are 1 × …, `segments` the remaining ones, `index` the number of steps done, `segment_start` the index at
    which the present segment began, `passes` the number of forward passes in it; `conditioning` is what the family
    computed from the prompt. `predicted_original` is the scheduler's latest estimate of the final latents, if it gives
    one. `loras` stay loaded while the state exists; `images` are image prompts. `tiling` is that of the VAE, if the
    usual one took too much memory. `warnings` are sentences on what was not used as asked for.
    """

    request: DiffusionRequest
    shape: tuple[object, ...]
    latents: torch.Tensor
    segments: tuple[DenoisingSegment, ...]
    conditioning: C
    inpaint: InpaintConstraint | None = None
    controls: tuple[ControlNetInput, ...] = ()
    index: int = 0
    segment_start: int = 0
    passes: int = 0
    predicted_original: torch.Tensor | None = None
    loras: ActiveLoras = ()
    tiling: VaeTiling | None = None
    images: tuple[Any, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Total number of steps."""
        return self.segment_start + sum(segment.steps_done(len(segment.timesteps)) for segment in self.segments)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.index >= self.steps

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep of the next pass, a scalar."""
        return self.segments[0].timesteps[self.passes]

    @property
    def model_input(self) -> torch.Tensor:
        """The latents, scaled for the model at the next pass."""
        scheduler = self.segments[0].scheduler
        if not hasattr(scheduler, "scale_model_input"):  # flow matching
            return self.latents
        scaled: torch.Tensor = scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def advance(self, prediction: torch.Tensor) -> None:
        """Take the scheduler on by the model's prediction, apply the inpaint constraint, start the next segment.

        The blend is that of diffusers' inpaint pipelines (after Lugmayr et al. 2022, arXiv 2201.09865): the kept
        latents have the noise level of the next step, and none after the last one.
        """
        segment = self.segments[0]
        latents, predicted = segment.step(prediction, self.passes, self.latents)
        self.passes += 1
        self.index = self.segment_start + segment.steps_done(self.passes)
        ended = self.passes == len(segment.timesteps)
        if self.inpaint is not None:
            mask, original = self.inpaint.repainted(self.passes / len(segment.timesteps)), self.inpaint.latents
            latents = (1 - mask) * (original if ended else segment.add_noise(original, self.passes)) + mask * latents
            if predicted is not None:
                predicted = (1 - mask) * original + mask * predicted
        self.latents, self.predicted_original = latents, predicted
        if ended and len(self.segments) > 1:
            self._start_next_segment()

    def _start_next_segment(self) -> None:
        """Use the finished latents as the input image of the next segment, as a second pipeline call would.

        A network of its own continues with the latents as they are, without the ControlNet, which is another's.
        """
        self.segments, self.segment_start, self.passes = self.segments[1:], self.index, 0
        if self.segments[0].conditioning is not None:
            self.conditioning, self.controls = self.segments[0].conditioning, ()
            return
        if self.inpaint is not None:
            self.inpaint = replace(self.inpaint, latents=self.latents)
        self.latents = self.segments[0].add_noise(self.latents, 0)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A finished image: `pixels` uint8, height × width × 3.

    `redecoded` when the VAE had to run again in fp32, `tiled` when it ran in tiles for lack of memory at that moment.
    `latents` (channels × h × w, in the VAE's scale) are there if they are kept; then `pixels` are a small preview.
    """

    pixels: NDArray[np.uint8]
    redecoded: bool
    tiled: bool = False
    warnings: tuple[str, ...] = ()
    latents: NDArray[np.float32] | None = None


@contextmanager
def translate_torch_errors() -> Iterator[None]:
    """Run a block in inference mode and translate torch's errors into `OutOfMemory` and `DeviceLost`."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("The device has no memory left for this picture.") from error
    except torch.AcceleratorError as error:
        raise DeviceLost("The device reported an error it cannot recover from.") from error


def await_device(device: torch.device) -> None:
    """Wait until the device has finished; otherwise steps seem to take no time and errors surface elsewhere.

    Costs 1 of 139 ms for four steps of 1024² on an H200.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator on every device, so that a seed gives the same image everywhere."""
    return torch.Generator("cpu").manual_seed(seed % NOISE_SEEDS)


def classifier_free(prediction: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): negative + scale · (positive − negative).

    The rows are [negative, positive]; a single row has no guidance and stays as it is.
    """
    if len(prediction) == 1:
        return prediction
    negative, positive = prediction.chunk(2)
    return negative + scale * (positive - negative)


def by_row(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """One batch of tensors of one row each; the i-th is repeated `rows[i]` times."""
    return torch.cat([tensor for tensor, n in zip(tensors, rows, strict=True) for _ in range(n)])


def to_tensor(image: ImageArray, device: torch.device) -> torch.Tensor:
    """An image as floats in 0..1, 1 × 3 × height × width; a mask or edges become three equal channels."""
    pixels = np.atleast_3d(image.pixels).astype(np.float32) / 255
    # The memory layout of diffusers' image processor: convolutions round differently in others.
    return torch.from_numpy(pixels[None].transpose(0, 3, 1, 2)).to(device).expand(1, 3, -1, -1)


def latent_mask(mask: ImageArray, like: torch.Tensor, *, soft: bool = False) -> torch.Tensor:
    """The mask over latents `like` (1 × channels × h × w): 1 × 1 × h × w, 1 to repaint and 0 to keep.

    Binarized at one half unless `soft`, then shrunk to the nearest pixel, as diffusers' inpaint pipelines do.
    """
    levels = mask_levels(mask, like.device, soft=soft)
    return torch.nn.functional.interpolate(levels, size=like.shape[-2:]).to(like.dtype)


def mask_levels(mask: ImageArray, device: torch.device, *, soft: bool) -> torch.Tensor:
    """The mask as floats, 1 × 1 × height × width: binarized at one half unless `soft`."""
    levels = to_tensor(mask, device)[:, :1]
    return levels if soft else (levels >= 0.5).float()


def encode(
    vae: Any, image: torch.Tensor, generator: torch.Generator | None, tiling: VaeTiling = WHOLE
) -> tuple[torch.Tensor, VaeTiling | None]:
    """A sample of the VAE's unscaled latents (1 × channels × h × w) of floats in 0..1, drawn from `generator`.

    Without a generator, their most probable value. Also returns a smaller tiling if `tiling` needs too much memory.
    """
    pixels = (2 * image - 1).to(vae.dtype)
    tried, smaller = tiling, None
    while True:
        try:
            with tried.applied(vae, image.shape[-2] * image.shape[-1]):
                tiled = runs_in_tiles(vae, pixels.shape[-2:], "sample")
                with wrapping(None if tiled else current_tiling()):  # a tile that wraps would meet itself
                    distribution = vae.encode(pixels).latent_dist
            break
        except torch.OutOfMemoryError:
            smaller = tried.smaller()
            if smaller is None:
                raise
        tried = smaller  # outside the handler, whose traceback holds the tensors of the failed attempt
    latents: torch.Tensor = distribution.mode() if generator is None else distribution.sample(generator)
    return latents, smaller


def decode(vae: Any, latents: torch.Tensor) -> DecodedImage:
    """Decode unscaled latents (1 × channels × h × w, with a third dimension 1 for a VAE for videos) to pixels.

    Decodes again in fp32 when the result is not finite. Raises `NotFinite` when the latents are not finite, or fp32
    does not help.
    """
    if not torch.isfinite(latents).all():
        raise NotFinite("The latents are not finite; another seed or fewer guidance may help.")
    image = _decoded(vae, latents.to(vae.dtype))
    redecoded = False
    finite = _is_finite(image)
    if not finite and vae.dtype != torch.float32:
        image, redecoded = _decode_in_fp32(vae, latents), True
        finite = _is_finite(image)
    if not finite:
        raise NotFinite("The decoded picture is not finite.")
    # The arithmetic of diffusers' VaeImageProcessor, on the device, so that a quarter of the bytes is copied from it.
    scaled = (image[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
    levels = (scaled * 255).round().to(torch.uint8).contiguous()
    return DecodedImage(levels.cpu().numpy(), redecoded)


def _decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pixels in -1..1, 1 × 3 × height × width; of a VAE for videos, those of the first frame."""
    image: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return image[:, :, 0] if image.ndim == 5 else image


def _is_finite(image: torch.Tensor) -> bool:
    """Whether all numbers are finite. Minimum and maximum are NaN if any number is, at a third of isfinite's cost."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(image))).all())


def _decode_in_fp32(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    dtype = vae.dtype
    vae.to(torch.float32)
    try:
        return _decoded(vae, latents.float())
    finally:
        vae.to(dtype)
