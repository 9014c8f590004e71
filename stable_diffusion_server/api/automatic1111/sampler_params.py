"""A request's sampler, its schedule and its options, from parameters of AUTOMATIC1111 and SD.Next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from secrets import randbelow

from stable_diffusion_server.api.automatic1111.sampler_names import sampler_for
from stable_diffusion_server.api.automatic1111.sampling_params import SAMPLING_PARAMETERS, Sampling, read_sampling
from stable_diffusion_server.api.automatic1111.sdnext_params import read_scheduler_parameters, schedule_of
from stable_diffusion_server.api.automatic1111.task_params import Txt2Img
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import NOISE_SEEDS

# AUTOMATIC1111's setting: GPU, CPU or NV, which is the noise of a graphics card on any device.
RANDOM_SOURCE = "randn_source"


@dataclass(frozen=True, slots=True)
class RequestSampler:
    """The scheduler (`None`: the model's default), its options, and sentences on what is not drawn as asked."""

    scheduler: str | None
    sampling: Sampling
    ignored: list[str]


def read_sampler(params: Txt2Img, settings: Mapping[str, object], spec: ModelSpec) -> RequestSampler:
    """Return the sampler of a request. `settings` are options and `override_settings`.

    Raises `InvalidInput` where a client of SD.Next asks for that, see `read_scheduler_parameters`.
    """
    asked, extra = params.sampler_name or params.sampler_index or "", params.model_extra
    chosen = sampler_for(asked, params.scheduler or schedule_of(extra), spec)
    sent = {name: getattr(params, name, None) for name in SAMPLING_PARAMETERS}
    sampling, ignored = read_sampling(sent, chosen, spec)
    further, also_ignored = read_scheduler_parameters(extra, settings, asked, chosen, spec)
    sampling = _with_subseed((*sampling, *further, *_noise(settings, spec)), params.subseed)
    return RequestSampler(chosen.scheduler, sampling, [*chosen.ignored, *ignored, *also_ignored])


def _noise(settings: Mapping[str, object], spec: ModelSpec) -> Sampling:
    """Return the source of the noise; models that draw their own keep it."""
    of_gpu = settings.get(RANDOM_SOURCE) in ("GPU", "NV") and not spec.any_extra
    return (("noise_source", "gpu"),) if of_gpu else ()


def _with_subseed(sampling: Sampling, wanted: int | None) -> Sampling:
    """Return the options with the subseed, a random one unless it is sent."""
    if "subseed_strength" not in dict(sampling):
        return sampling
    return (*sampling, ("subseed", randbelow(NOISE_SEEDS) if wanted is None or wanted < 0 else wanted))
