"""The contract every family keeps: prepare, step, finish. Knows tensors and jobs, and neither queues nor requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import DevicePoisoned, NotFinite, OutOfMemory
from stable_diffusion_server.orders import Job

C = TypeVar("C")


@dataclass(slots=True)
class State(Generic[C]):
    """One job between two steps. Owns its scheduler and generator, so that jobs in a batch never touch each other.

    `latents` are 1 × …, `timesteps` holds all of the schedule, `index` the next one to do; `conditioning` is what
    the family made of the prompt.
    """

    job: Job
    shape: tuple[object, ...]
    latents: torch.Tensor
    timesteps: torch.Tensor
    scheduler: Any
    generator: torch.Generator
    conditioning: C
    index: int = 0

    @property
    def steps(self) -> int:
        """Number of steps in all."""
        return len(self.timesteps)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.index >= self.steps

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep of the next step, a scalar."""
        return self.timesteps[self.index]

    def advance(self, prediction: torch.Tensor) -> None:
        """Take one scheduler step with the model's prediction for these latents."""
        self.latents = self.scheduler.step(
            prediction, self.timestep, self.latents, return_dict=False, **self.extra_step_arguments()
        )[0]
        self.index += 1

    def extra_step_arguments(self) -> dict[str, object]:
        """The generator for schedulers that draw noise in a step; the others do not take one."""
        return {"generator": self.generator} if self.scheduler.draws_noise else {}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished picture: `pixels` uint8, height × width × 3; `redecoded` when the VAE had to run again in fp32."""

    pixels: NDArray[np.uint8]
    redecoded: bool


class Family(Protocol):
    """A model family. All three run on the device thread alone; states passed to `step` share one shape.

    They raise `OutOfMemory` and `DevicePoisoned`; `finish` raises `NotFinite` too.
    """

    def prepare(self, job: Job) -> State[Any]:
        """Encode the prompt, make the latents, set the timesteps."""

    def step(self, states: Sequence[State[Any]]) -> None:
        """One denoising step for every state, in one forward pass."""

    def finish(self, state: State[Any]) -> Drawn:
        """Decode the latents."""

    def count_tokens(self, prompt: str) -> int:
        """Length of the prompt in the encoder's tokens, special tokens included. Safe from any thread."""


@contextmanager
def torch_errors_told() -> Iterator[None]:
    """Run a block in inference mode and turn torch's errors into ours."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("The device has no memory left for this picture.") from error
    except torch.AcceleratorError as error:
        raise DevicePoisoned("The device reported an error it cannot recover from.") from error


def decode(vae: Any, latents: torch.Tensor) -> Drawn:
    """Decode unscaled latents (1 × channels × h × w) by the VAE to pixels.

    Decoded floats that are not finite are decoded again in fp32; raises `NotFinite` when the latents themselves are
    not, or when fp32 does not help.
    """
    if not torch.isfinite(latents).all():
        raise NotFinite("The latents are not finite; another seed or fewer guidance may help.")
    image = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    redecoded = False
    if not torch.isfinite(image).all() and vae.dtype != torch.float32:
        image, redecoded = _decode_in_fp32(vae, latents), True
    if not torch.isfinite(image).all():
        raise NotFinite("The decoded picture is not finite.")
    # The same arithmetic as diffusers' VaeImageProcessor: to 0..1, clamp, then round to 0..255.
    scaled = (image * 0.5 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    return Drawn((scaled[0] * 255).round().astype(np.uint8), redecoded)


def _decode_in_fp32(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    dtype = vae.dtype
    vae.to(torch.float32)
    try:
        image: torch.Tensor = vae.decode(latents.float(), return_dict=False)[0]
        return image
    finally:
        vae.to(dtype)
