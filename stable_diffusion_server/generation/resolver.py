"""Resolves a request: defaults, seed, output format, object key and digests. Pure except for a random seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.control_units import (
    NO_CONTROLNETS,
    ControlNetworks,
    ResolvedControl,
    resolve_controls,
)
from stable_diffusion_server.generation.hires_choices import resolve_second
from stable_diffusion_server.generation.image_prompts import ImagePromptAdapters, resolve_image_prompts
from stable_diffusion_server.generation.interfaces import NO_UPSCALER, ImageUpscaler
from stable_diffusion_server.generation.limits import (
    RequestLimits,
    asks_for_second_pass,
    check_second_size,
    image_options_identity,
    seed_of,
)
from stable_diffusion_server.generation.permissions import (
    Ownership,
    adapters_for,
    check_abilities,
    check_extra,
    negative_prompt_scale,
    reads_empty_negative,
    spec_for,
)
from stable_diffusion_server.generation.preprocessing import ImagePreprocessor, InProcessPreprocessor
from stable_diffusion_server.generation.prompts import (
    BUILTIN_STOP_WORDS,
    StopWords,
    clean_prompt,
    embeddings_for,
    read_prompts,
)
from stable_diffusion_server.generation.repair_requests import (
    DetailDetector,
    NoDetector,
    check_repairs,
    repair_identity,
)
from stable_diffusion_server.generation.resolved_output import ResolvedOutput, place_of, source_identities
from stable_diffusion_server.generation.resolved_parameters import ResolvedParameters, SecondPassPlan
from stable_diffusion_server.generation.seeds import with_subseed
from stable_diffusion_server.imaging import ContentSigner
from stable_diffusion_server.pipelines import (
    MODELS,
    EmbeddingFolder,
    ImagePromptFolder,
    ModelSpec,
    check_strength,
    resolve_sampling,
    scheduler_of,
)
from stable_diffusion_server.types import (
    GenerationRequest,
    RequestWarning,
    digest,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Options of the generation service. `embed_metadata` is full, digest or none.

    `bumpy_redraws` is the number of retries of a bumpy image, `None` for that in the model's spec. `models` are specs
    of usable models by name, maybe without the default. `loras` returns usable LoRAs: name → digest of the content; a
    lookup may read the file, and raises `InvalidInput` if it cannot be used. `controlnets` finds networks of control
    units, `preprocessor` makes their images, `credentials` signs. `unusable` are models that could not be loaded.
    `upscaler` finds the upscalers of second passes, `image_prompts` what reads those.
    """

    limits: RequestLimits
    default_model: str
    bucket_path: str
    embed_metadata: str = "full"
    bumpy_redraws: int | None = None
    models: Mapping[str, ModelSpec] = field(default_factory=lambda: MODELS)
    loras: Callable[[], Mapping[str, str]] = dict
    embeddings: EmbeddingFolder = field(default_factory=lambda: EmbeddingFolder(None))
    ownership: Ownership = field(default_factory=Ownership)
    credentials: ContentSigner | None = None
    stop_words: StopWords = BUILTIN_STOP_WORDS
    unusable: Mapping[str, str] = field(default_factory=dict)
    controlnets: ControlNetworks = NO_CONTROLNETS
    image_prompts: ImagePromptAdapters = field(default_factory=ImagePromptFolder)
    preprocessor: ImagePreprocessor = field(default_factory=InProcessPreprocessor)
    detector: DetailDetector = field(default_factory=NoDetector)
    upscaler: ImageUpscaler = NO_UPSCALER


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest(ResolvedOutput):
    """A request with all values that can be decided without decoding its input images.

    `lora_digests` are the SHA-256 of its LoRA files. `second` is what its second pass does otherwise, if anything.
    """

    parameters: ResolvedParameters
    lora_digests: tuple[str, ...] = ()
    second: SecondPassPlan | None = None


def resolve_request(
    request: GenerationRequest, options: GenerationOptions, fetched: Mapping[str, bytes] | None = None
) -> ResolvedRequest:
    """Resolve a request. Pure except for `seed=random`. Raises `InvalidInput`, and `ModelLoadError` as `spec_for` does.

    `fetched` are the bytes of downloaded input images by parameter. Without them the URLs replace the bytes in the
    digests; then only `sent_digest`, and the key if `key_is_known`, are final.
    """
    options.limits.check(request)
    parameters = _resolve_parameters(request, options)
    sent_pictures = source_identities(request)
    pictures = source_identities(request, fetched)
    adapters = adapters_for(request, options.loras)
    spec = _identity_fields(request, parameters, adapters, options.stop_words)
    if request.repairs:
        _check_repairs(request, parameters.spec, options)
        spec["detectors"] = repair_identity(request.repairs, options.detector)
    second = None
    if asks_for_second_pass(request):
        if request.width is not None and request.height is not None:
            check_second_size(request, request.width, request.height, options.limits.max_side)
        resolve = partial(_resolve_parameters, options=options)
        second, identity = resolve_second(request, parameters, resolve, options.loras, options.upscaler)
        spec |= identity
        parameters = replace(parameters, warnings=second.warnings)
    seed_asked = {"seed": request.seed, **({"variation": request.variation} if request.variation else {})}
    request_digest = digest({**spec, **pictures, **seed_asked})
    if parameters.sampling:
        request, sampling = with_subseed(request, parameters.sampling, request_digest)
        parameters = replace(parameters, sampling=sampling)
        spec["sampling"] = sampling
    seed = seed_of(request, request_digest)
    content = digest({**spec, **pictures, "seed": seed})
    place = place_of(request, content, request_digest, options.bucket_path, options.ownership)
    return ResolvedRequest(
        request=request,
        parameters=parameters,
        seed=seed,
        file_format=place.file_format,
        quality=place.quality,
        key=place.key,
        content_digest=content,
        request_digest=request_digest,
        sent_digest=digest({**spec, **sent_pictures, **seed_asked}),
        source_digests=pictures,
        lora_digests=tuple(digest for _, _, digest in adapters),
        second=second,
    )


def _resolve_parameters(request: GenerationRequest, options: GenerationOptions) -> ResolvedParameters:
    spec = spec_for(request, options)
    check_abilities(request, spec)
    check_extra(request.extra, spec, request.task)
    warnings = []
    asked = _or_default(request.negative_prompt, spec.default_negative_prompt)
    negative: str | None = _cleaned(asked, "negative_prompt")
    if not negative and (request.negative_prompt is None or not reads_empty_negative(spec)):
        negative = None
    if negative and not spec.takes_negative_prompt:
        negative = None
        warnings.append(RequestWarning("negative-prompt-ignored", f"{spec.name} has no use for a negative prompt."))
    guidance = _or_default(request.guidance_scale, spec.default_guidance) + 0.0  # -0.0 is 0.0
    scale, scaled_by = negative_prompt_scale(spec, guidance, request.extra)
    if negative is not None and scale <= 1:
        negative, sentence = None, f"A negative prompt has a use only with {scaled_by} above 1."
        warnings += [RequestWarning("negative-prompt-ignored", sentence)] if request.negative_prompt else []
    if guidance != spec.default_guidance and not spec.takes_guidance:
        guidance = spec.default_guidance
        warnings.append(RequestWarning("guidance-ignored", f"{spec.name} was distilled to draw without guidance."))
    prompt = _cleaned(request.prompt, "prompt")
    if not prompt and not request.allow_empty_prompt:
        raise InvalidInput("prompt is empty.", field="prompt")
    steps = _or_default(request.num_inference_steps, spec.default_steps)
    read = read_prompts(prompt, negative, request.prompt_syntax, spec, steps)
    second = _second_prompt(request, prompt, spec)
    read_second = None if second is None else read_prompts(second, None, request.prompt_syntax, spec, steps)
    read_texts = (read.prompt, read.negative_prompt, read_second.prompt if read_second else None)
    named = embeddings_for(read_texts, request.prompt_syntax, spec, options.embeddings)
    follows, about_edges = _edges(request, spec)
    controls, about_controls = _controls(request, spec, options)
    warnings += [*about_edges, *about_controls]
    scheduler = _or_default(request.scheduler, spec.default_scheduler)
    hires_steps = steps if request.hires_scheduler is not None else request.hires_steps or steps
    parameters = ResolvedParameters(
        spec=spec,
        prompt=read.prompt,
        negative_prompt=read.negative_prompt,
        prompt_2=None if read_second is None else read_second.prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        scheduler=scheduler,
        strength=_or_default(request.strength, 1.0),
        canny=follows,
        control_scale=_or_default(request.control_scale, spec.control_scale),
        prompt_syntax=read.syntax,
        is_marked=read.is_marked or (read_second is not None and read_second.is_marked) or bool(named.used),
        clip_skip=None if request.clip_skip == spec.clip_skip else request.clip_skip,
        warnings=(*warnings, *read.warnings, *(read_second.warnings if read_second else ()), *named.warnings),
        sampling=request.sampling and resolve_sampling(spec, scheduler, max(steps, hires_steps), request.sampling),
        embeddings=named.used,
        controls=controls,
        image_prompts=resolve_image_prompts(request, spec, options.image_prompts) if request.image_prompts else (),
    )
    scheduler_of(spec, scheduler, steps)
    scheduler_of(spec, scheduler, hires_steps)
    if not request.at_least_one_step:
        check_strength(spec, steps, parameters.strength)
    return parameters


def _edges(request: GenerationRequest, spec: ModelSpec) -> tuple[bool, list[RequestWarning]]:
    """Return whether edges are followed, and a warning if they would be where the model could."""
    if request.canny is not None or request.controls:
        return bool(request.canny), []
    if spec.control_folder is not None:
        return True, []
    sentence = f"{spec.name} has no ControlNet; the edges are not followed."
    return False, [RequestWarning("canny-unavailable", sentence)]


def _controls(
    request: GenerationRequest, spec: ModelSpec, options: GenerationOptions
) -> tuple[tuple[ResolvedControl, ...], list[RequestWarning]]:
    if not request.controls:
        return (), []
    return resolve_controls(request, spec, options.controlnets, options.preprocessor)


def _check_repairs(request: GenerationRequest, spec: ModelSpec, options: GenerationOptions) -> None:
    """Raise `InvalidInput` for repairs that cannot be drawn, before anything is."""

    def check(part: GenerationRequest) -> None:
        options.limits.check(part)
        _resolve_parameters(part, options)

    check_repairs(request, spec, check)


def _second_prompt(request: GenerationRequest, prompt: str, spec: ModelSpec) -> str | None:
    """Return the cleaned prompt of the second text encoder, `None` if it reads the first one."""
    if request.prompt_2 is None:
        return None
    second = _cleaned(request.prompt_2, "prompt_2")
    return None if second == prompt else second


def prompts_for_model(parameters: ResolvedParameters) -> dict[str, Any]:
    """Return the fields of a `DiffusionRequest` that say what its prompts are and how they are read."""
    return {
        "prompt": parameters.prompt,
        "negative_prompt": parameters.negative_prompt,
        "prompt_2": parameters.prompt_2,
        "weighted": parameters.is_marked,
        "clip_skip": parameters.clip_skip,
        "embeddings": parameters.embeddings,
    }


def _identity_fields(
    request: GenerationRequest,
    parameters: ResolvedParameters,
    adapters: list[tuple[str, float, str]],
    stop_words: StopWords,
) -> dict[str, object]:
    """Return the fields that identify the image, except the seed and the input images."""
    return {
        "task": request.task,
        "model": parameters.spec.name,
        "revision": parameters.spec.revision_for(edges=parameters.canny),
        "prompt": parameters.prompt,
        "negative_prompt": parameters.negative_prompt,
        "size": (request.width, request.height),
        "num_inference_steps": parameters.num_inference_steps,
        "guidance_scale": parameters.guidance_scale,
        "scheduler": parameters.scheduler,
        "strength": parameters.strength,
        "refine": request.refine,
        "loras": adapters,
        "feather": request.feather,
        "control": (parameters.control_scale, request.canny_low, request.canny_high) if parameters.canny else None,
        # Only if they differ from the defaults, so that digests of earlier versions stay valid.
        **image_options_identity(request),
        **({"stop_words": stop_words.identity} if stop_words.identity else {}),
        **({"extra": sorted(request.extra)} if request.extra else {}),
        **({"lora_parts": sorted(request.lora_parts)} if request.lora_parts else {}),
        **({"prompt_syntax": parameters.prompt_syntax} if parameters.is_marked else {}),
        **({"prompt_2": parameters.prompt_2} if parameters.prompt_2 is not None else {}),
        **({"clip_skip": parameters.clip_skip} if parameters.clip_skip is not None else {}),
        **({"sampling": parameters.sampling} if parameters.sampling else {}),
        **({"embeddings": parameters.embeddings} if parameters.embeddings else {}),
        **({"controls": [one.identity for one in parameters.controls]} if parameters.controls else {}),
        **({"image_prompts": [one.identity for one in parameters.image_prompts]} if request.image_prompts else {}),
    }


def _or_default(value: T | None, default: T) -> T:
    return default if value is None else value


def _cleaned(text: str, field: str) -> str:
    try:
        return clean_prompt(text)
    except ValueError as error:
        raise InvalidInput(f"{field} {error}.", field=field) from error
