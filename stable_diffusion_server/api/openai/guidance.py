"""Reads `true_cfg_scale`, which clients of vLLM-Omni and SGLang send beside or instead of `guidance_scale`.

There as in diffusers, `true_cfg_scale` weighs a prompt against a negative prompt, and `guidance_scale` is the guidance
that a model such as FLUX.1 dev was distilled with. Most models have one guidance, and take it by either name.
"""

from __future__ import annotations

from dataclasses import replace

from stable_diffusion_server.generation import RequestLimits, range_sentence
from stable_diffusion_server.pipelines import TRUE_GUIDANCE, ExtraParameter, ModelSpec
from stable_diffusion_server.types import ExtraValue, GenerationRequest, RequestWarning


def true_guidance_faults(
    scale: float | None, extra: dict[str, ExtraValue], spec: ModelSpec | None, limits: RequestLimits
) -> list[tuple[str, str]]:
    """Return (parameter, sentence) of a value out of the model's range, and of two different ones."""
    if scale is None:
        return []
    if TRUE_GUIDANCE in extra and extra[TRUE_GUIDANCE] != scale:
        return [(TRUE_GUIDANCE, f"{TRUE_GUIDANCE} and extra.{TRUE_GUIDANCE} differ; send one of them.")]
    own = _own_parameter(spec)
    low, high = (own.low, own.high) if own is not None else limits.bounds()["guidance_scale"]
    return [] if low <= scale <= high else [(TRUE_GUIDANCE, range_sentence(TRUE_GUIDANCE, low, high))]


def with_true_guidance(request: GenerationRequest, scale: float | None, spec: ModelSpec) -> GenerationRequest:
    """Return the request with `true_cfg_scale` as the model takes it.

    That is a parameter of the model's own beside its guidance, the guidance of models whose class calls it so, and
    otherwise the guidance if the request has none.
    """
    if scale is None:
        return request
    if _own_parameter(spec) is not None:
        return replace(request, extra=tuple({**dict(request.extra), TRUE_GUIDANCE: scale}.items()))
    if spec.guidance_name == TRUE_GUIDANCE or request.guidance_scale is None:
        return replace(request, guidance_scale=scale)
    return request


def guidance_warnings(scale: float | None, guidance: float | None, spec: ModelSpec) -> list[RequestWarning]:
    """Return a warning if a model with one guidance was given two: which of them had no effect."""
    if scale is None or guidance is None or scale == guidance or _own_parameter(spec) is not None:
        return []
    used, unused = TRUE_GUIDANCE, "guidance_scale"
    if spec.guidance_name != TRUE_GUIDANCE:
        used, unused = unused, used
    return [RequestWarning("not-honoured", f"{unused}: {spec.name} has one guidance, here by {used}.")]


def _own_parameter(spec: ModelSpec | None) -> ExtraParameter | None:
    named = (parameter for parameter in (spec.extra if spec else ()) if parameter.name == TRUE_GUIDANCE)
    return next(named, None)
