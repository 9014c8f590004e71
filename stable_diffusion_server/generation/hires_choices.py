"""What the second pass of a request does otherwise than the first: its own words, sampler and upscaler, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.interfaces import ChosenUpscaler, ImageUpscaler
from stable_diffusion_server.generation.limits import HIRES_FIELDS, HIRES_OWN, has_second_pass
from stable_diffusion_server.generation.permissions import adapters_for
from stable_diffusion_server.generation.resolved_parameters import ResolvedParameters, SecondPassPlan
from stable_diffusion_server.pipelines import SCHEDULERS, ModelSpec
from stable_diffusion_server.types import ExtraValue, GenerationRequest, LatentResize, Task

_UPSCALER = "hires_upscaler"
_LATENT = {way.value: way for way in LatentResize}
# Parameters of the first pass → those that stand for them in the second.
_INSTEAD = {
    "prompt": "hires_prompt",
    "negative_prompt": "hires_negative_prompt",
    "scheduler": "hires_scheduler",
    "schedule": "hires_schedule",
    "guidance_scale": "hires_guidance",
    "num_inference_steps": "hires_steps",
    "lora": "hires_loras",
}
# Options of a sampler that are the model's, so that every scheduler takes them.
_OF_MODEL = frozenset({"subseed", "subseed_strength", "noise_source", "guidance_rescale"})


def latent_resize(name: str | None) -> LatentResize | None:
    """Return how latents are enlarged by the upscaler of this name; `None` if it enlarges images.

    AUTOMATIC1111's names are known too: `Latent (bicubic antialiased)` is `latent-bicubic-antialiased`.
    """
    if name is None:
        return None
    return _LATENT.get("-".join(name.lower().replace("(", " ").replace(")", " ").split()))


def check_second_pass(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raise `InvalidInput` that names each parameter of a second pass that cannot be drawn.

    A second pass has a size, which is its scale or both sides, and it draws a whole image again.
    """
    sides = {name: getattr(request, name) for name in ("hires_width", "hires_height")}
    given = [name for name in HIRES_FIELDS if getattr(request, name) is not None]
    faults = []
    if None in sides.values() and any(side is not None for side in sides.values()):
        missing = next(name for name, side in sides.items() if side is None)
        faults.append((missing, "hires_width and hires_height are given together, or neither."))
    elif sides["hires_width"] is not None and request.hires_scale is not None:
        faults.append(("hires_scale", "Give hires_scale, or hires_width and hires_height, and not all of them."))
    elif not has_second_pass(request):
        sentence = "a second pass needs hires_scale, or hires_width and hires_height."
        faults += [(name, f"{name} has no use: {sentence}") for name in given]
    elif request.mask is not None or request.extend is not None:
        faults += [(name, f"{name}: a second pass draws the whole image, and a mask keeps a part.") for name in given]
    elif not {Task.IMAGE_TO_IMAGE, Task.EDIT} & set(spec.tasks):
        faults += [(name, f"{name}: {spec.name} draws no second pass, it changes no images.") for name in given]
    if latent_resize(request.hires_upscaler) and (spec.any_extra or Task.IMAGE_TO_IMAGE not in spec.tasks):
        faults.append((_UPSCALER, f"{spec.name} takes no latents; an upscaler that enlarges images can be used."))
    if faults:
        raise InvalidInput.from_faults(faults)


def resolve_second(
    request: GenerationRequest,
    first: ResolvedParameters,
    resolve: Callable[[GenerationRequest], ResolvedParameters],
    loras: Callable[[], Mapping[str, str]],
    upscaler: ImageUpscaler,
) -> tuple[SecondPassPlan, dict[str, object]]:
    """Return the plan of a second pass, and what identifies it beside the request's parameters.

    `resolve` reads the parameters of a request, `loras` returns name → digest. Reads files. Raises `InvalidInput`.
    """
    check_second_pass(request, first.spec)
    chosen, identity = _chosen_upscaler(request, upscaler), dict[str, object]()
    if chosen is not None:
        identity["hires_upscaler"] = chosen.identity
    plan = SecondPassPlan(
        warnings=first.warnings, upscaler=chosen, latents=latent_resize(None if chosen is None else chosen.name)
    )
    if not any(getattr(request, name) is not None for name in HIRES_OWN):
        return plan, identity
    again = _second_request(request, dict(first.sampling), first.scheduler)
    try:
        parameters, adapters = resolve(again), adapters_for(again, loras)
    except InvalidInput as error:
        raise _of_second_pass(error, request) from error
    if adapters:
        identity["hires_adapters"] = adapters
    if parameters.embeddings:
        identity["hires_embeddings"] = parameters.embeddings
    warnings = tuple(dict.fromkeys((*first.warnings, *parameters.warnings)))
    digests = tuple(digest for _, _, digest in adapters)
    return replace(plan, own=(again, parameters), lora_digests=digests, warnings=warnings), identity


def _chosen_upscaler(request: GenerationRequest, upscaler: ImageUpscaler) -> ChosenUpscaler | None:
    """Return the upscaler that the request names, `None` for the usual one."""
    if request.hires_upscaler is None:
        return None
    if (way := latent_resize(request.hires_upscaler)) is not None:
        return ChosenUpscaler(way.value, way.value)
    try:
        return upscaler.find(request.hires_upscaler, _UPSCALER)
    except InvalidInput as error:
        raise InvalidInput(f"{error.detail} Latents are enlarged by {', '.join(_LATENT)}.", field=_UPSCALER) from error


def _second_request(request: GenerationRequest, sampling: dict[str, ExtraValue], scheduler: str) -> GenerationRequest:
    """Return a request whose parameters are those of the second pass.

    `sampling` and `scheduler` are those of the first pass. Options that another scheduler does not take are left out.
    """
    loras = request.loras if request.hires_loras is None else request.hires_loras
    named = {name for name, _ in loras}
    own_words = request.hires_prompt is not None
    negative = request.negative_prompt if request.hires_negative_prompt is None else request.hires_negative_prompt
    return replace(
        request,
        prompt=request.hires_prompt if request.hires_prompt is not None else request.prompt,
        prompt_2=None if own_words else request.prompt_2,
        negative_prompt=negative,
        num_inference_steps=request.hires_steps or request.num_inference_steps,
        guidance_scale=request.guidance_scale if request.hires_guidance is None else request.hires_guidance,
        scheduler=request.hires_scheduler or request.scheduler,
        sampling=_second_sampling(request, sampling, request.hires_scheduler or scheduler),
        loras=loras,
        lora_parts=tuple((name, parts) for name, parts in request.lora_parts if name in named),
        at_least_one_step=True,
    )


def _of_second_pass(error: InvalidInput, request: GenerationRequest) -> InvalidInput:
    """Return the error about `_second_request` with the names of the parameters that it came from."""
    faults = []
    for field, sentence in error.faults:
        instead = _INSTEAD.get(field, field)
        given = getattr(request, instead, None) is not None
        faults.append((instead, sentence.replace(field, instead)) if given else (field, sentence))
    return InvalidInput.from_faults(faults)


def _second_sampling(
    request: GenerationRequest, sampling: dict[str, ExtraValue], scheduler: str
) -> tuple[tuple[str, ExtraValue], ...]:
    row = SCHEDULERS.get(scheduler)
    if row is not None and request.hires_scheduler is not None:
        sampling = {
            name: value
            for name, value in sampling.items()
            if name in _OF_MODEL
            or name in row.takes
            or (name == "schedule" and value in row.schedules)
            or (name == "zero_snr" and (row.start_pure or value is not True))
        }
    if request.hires_schedule is not None:
        sampling["schedule"] = request.hires_schedule
    return tuple(sampling.items())
