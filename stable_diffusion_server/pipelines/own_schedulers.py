"""Samplers that diffusers lacks, over its Euler scheduler: ancestral Euler with eta, DPM++ 2S ancestral, ER-SDE.

Their noise is drawn from the generator that `step` is given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

# Points of the numerical integrals of ER-SDE.
_POINTS = 200


class SigmaScheduler(EulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    """What the samplers below share. Samples are x = x₀ + σ·noise, as k-diffusion counts them."""

    def _denoised(self, prediction: torch.Tensor, sample: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The estimate of the final sample, by the model's kind of prediction."""
        if self.config.prediction_type == "epsilon":
            return sample - sigma * prediction
        if self.config.prediction_type == "v_prediction":
            return prediction * (-sigma / (sigma**2 + 1) ** 0.5) + (sample / (sigma**2 + 1))
        return prediction

    def _noise(self, like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        noise: torch.Tensor = randn_tensor(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        return noise

    def _begun(self, timestep: torch.Tensor) -> int:
        """The index of this pass."""
        if self.step_index is None:
            self._init_step_index(timestep)
        index: int = self.step_index
        return index


def ancestral_step(start: torch.Tensor, end: torch.Tensor, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise level to step down to from `start`, and the noise to add to arrive at `end` (k-diffusion)."""
    up = torch.minimum(end, eta * (end**2 * (start**2 - end**2) / start**2) ** 0.5)
    return (end**2 - up**2) ** 0.5, up


class EulerAncestralScheduler(SigmaScheduler):
    """diffusers' ancestral Euler with every spacing of its plain Euler, and with `eta`, the share of new noise."""

    # No argument of `step`: stock pipelines give one that takes it DDIM's default, 0.
    eta = 1.0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next sample, and the estimate of the final one."""
        index = self._begun(timestep)
        sigma, end = self.sigmas[index], self.sigmas[index + 1]
        sample = sample.to(torch.float32)
        denoised = self._denoised(model_output, sample, sigma)
        down, up = ancestral_step(sigma, end, self.eta)
        derivative = (sample - denoised) / sigma
        following = sample + derivative * (down - sigma) + self._noise(model_output, generator) * (up * s_noise)
        self._step_index += 1
        return following.to(model_output.dtype), denoised


class DPM2SAncestralScheduler(SigmaScheduler):
    """DPM-Solver++(2S) with ancestral noise (k-diffusion; Lu et al. 2022, arXiv 2211.01095), two passes a step.

    A step goes from x at σ to the middle √(σ·σ_down), and with the estimate from there to σ_down, where noise is added;
    the last one goes to the estimate itself. `eta` must be set before the timesteps: the middle depends on it.
    """

    order = 2
    eta = 1.0

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **given: Any) -> None:
        """Set the timesteps of both passes of each step: 2 · steps − 1."""
        super().set_timesteps(num_inference_steps, device=device, **given)
        sigmas, times = _tensors(self)
        down, _ = ancestral_step(sigmas[:-2], sigmas[1:-1], self.eta)
        middle = (sigmas[:-2] * down).sqrt()
        trained = (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).log().numpy()
        middle_times = torch.tensor([float(self._sigma_to_t(sigma, trained)) for sigma in middle.numpy()])
        between = torch.stack([sigmas[:-2], middle], dim=1).flatten()
        self.sigmas = torch.cat([between, sigmas[-2:]])
        self.timesteps = torch.cat([torch.stack([times[:-1], middle_times.to(times)], dim=1).flatten(), times[-1:]])
        self._start: torch.Tensor | None = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample of the next pass, and the estimate of the final one."""
        index = self._begun(timestep)
        sigma, end = self.sigmas[index], self.sigmas[index + 1]
        sample = sample.to(torch.float32)
        denoised = self._denoised(model_output, sample, sigma)
        self._step_index += 1
        if self._start is not None:
            begin, start = self.sigmas[index - 1], self._start
            down, up = ancestral_step(begin, end, self.eta)
            following = (down / begin) * start + (1 - down / begin) * denoised
            following = following + self._noise(model_output, generator) * (up * s_noise)
            self._start = None
        else:
            following = (end / sigma) * sample + (1 - end / sigma) * denoised
            self._start = sample if end > 0 else None
        return following.to(model_output.dtype), denoised


class ErSdeScheduler(SigmaScheduler):
    """ER-SDE-Solver-3 in its variance-exploding form (Cui et al. 2023, arXiv 2309.06169).

    With the noise scale φ(σ) = σ·(e^(σ^0.3) + 10) of its authors.
    """

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **given: Any) -> None:
        """Set the timesteps, and forget what earlier steps estimated."""
        super().set_timesteps(num_inference_steps, device=device, **given)
        # (σ, estimate, its slope in σ) of up to two earlier steps, the latest first.
        self._past: list[tuple[float, torch.Tensor, torch.Tensor | None]] = []

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next sample, and the estimate of the final one."""
        index = self._begun(timestep)
        sigma, end = float(self.sigmas[index]), float(self.sigmas[index + 1])
        sample = sample.to(torch.float32)
        denoised = self._denoised(model_output, sample, self.sigmas[index])
        self._step_index += 1
        if end == 0:
            return denoised.to(model_output.dtype), denoised
        ratio = _scale(end) / _scale(sigma)
        following = ratio * sample + (1 - ratio) * denoised
        slope = None
        if self._past:
            before, earlier, earlier_slope = self._past[0]
            slope = (denoised - earlier) / (sigma - before)
            width = (sigma - end) / _POINTS
            points = [end + number * width for number in range(_POINTS)]
            area = sum(1 / _scale(point) for point in points) * width
            following = following + (end - sigma + area * _scale(end)) * slope
            if earlier_slope is not None:
                curvature = (slope - earlier_slope) / ((sigma - self._past[1][0]) / 2)
                moment = sum((point - sigma) / _scale(point) for point in points) * width
                following = following + ((end - sigma) ** 2 / 2 + moment * _scale(end)) * curvature
        self._past = [(sigma, denoised, slope), *self._past[:1]]
        spread = math.sqrt(max(end**2 - sigma**2 * ratio**2, 0.0))
        following = following + self._noise(model_output, generator) * (spread * s_noise)
        return following.to(model_output.dtype), denoised


def _tensors(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return scheduler.sigmas, scheduler.timesteps


def _scale(sigma: float) -> float:
    return sigma * (math.exp(sigma**0.3) + 10)
