"""Converts parameters of txt2img and img2img to generation requests, with sentences about ignored ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stable_diffusion_server.api.automatic1111.adetailer import read_repairs
from stable_diffusion_server.api.automatic1111.checkpoint_names import model_named
from stable_diffusion_server.api.automatic1111.controlnet_mapping import CannyUnit, choose_units
from stable_diffusion_server.api.automatic1111.controlnet_units import parse_units
from stable_diffusion_server.api.automatic1111.image_inputs import with_images
from stable_diffusion_server.api.automatic1111.image_prompt_units import take_image_prompts
from stable_diffusion_server.api.automatic1111.options import FORMATS, Option
from stable_diffusion_server.api.automatic1111.prompt_expansion import (
    check_length,
    expands,
    read_texts,
    texts_of,
    with_styles,
    with_wildcards,
)
from stable_diffusion_server.api.automatic1111.sampler_params import RANDOM_SOURCE, read_sampler
from stable_diffusion_server.api.automatic1111.sampling_params import SAMPLING_PARAMETERS
from stable_diffusion_server.api.automatic1111.sdnext_params import FALLBACK, is_scheduler_parameter
from stable_diffusion_server.api.automatic1111.second_pass_params import parse_second_pass
from stable_diffusion_server.api.automatic1111.task_params import Img2Img, Txt2Img, with_infotext
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import Forbidden, InvalidInput
from stable_diffusion_server.generation import NAME_MAX, range_sentence
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import (
    Format,
    GenerationRequest,
    PromptSyntax,
    Task,
)

# Parameters without effect on this server, with their neutral values, which cause no warning.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("seed_resize_from_h", "seed_resize_from_w", "s_min_uncond"), (0, -1)),
    **dict.fromkeys(("firstphase_width", "firstphase_height"), (0, -1)),
    **dict.fromkeys(("initial_noise_multiplier",), (0, 1)),
    **dict.fromkeys(("image_cfg_scale",), (1.5,)),
    **dict.fromkeys(("restore_faces", "include_init_images", "disable_extra_networks"), (False,)),
    **dict.fromkeys(("do_not_save_samples", "do_not_save_grid", "save_images"), (True, False)),
    **dict.fromkeys(("override_settings_restore_afterwards",), (True,)),
    **dict.fromkeys(("comments",), ()),
}
_SILENT = (
    "do_not_save_samples",
    "do_not_save_grid",
    "save_images",
    "hr_",
    "comments",
)
_CLIP_SKIP, _LAYERS = "CLIP_stop_at_last_layers", 12
_KNOWN_SETTINGS = {"sd_model_checkpoint", "samples_format", FALLBACK, RANDOM_SOURCE}
# Maximum number of sentences about ignored parameters.
_MOST_IGNORED = 100


@dataclass(frozen=True, slots=True)
class ParsedTask:
    """A generation request for each image, and sentences about ignored parameters.

    `params` are those of the request, with the ones of its infotext, and the prompts in their styles. `edges` is the
    plain unit of edges that is used, if any, and `maps` says of each control unit whether its control image follows the
    generated images. `expanded` are the prompts whose wildcards were expanded, by the image's number.
    """

    params: Txt2Img
    spec: ModelSpec
    generations: list[GenerationRequest]
    batch_size: int
    edges: CannyUnit | None
    ignored: list[str]
    maps: tuple[bool, ...] = ()
    expanded: Mapping[int, Mapping[str, str]] = field(default_factory=dict)

    @property
    def has_wildcards(self) -> bool:
        """Whether `expand_task` is to be called once the images have seeds."""
        return bool(self.generations[0].wildcards)


def parse_task(sent: Txt2Img, context: DialectContext, options: Mapping[str, Option]) -> ParsedTask:
    """Convert the parameters; `options` are the caller's, which `override_settings` override. Raises `InvalidInput`."""
    params, told_model, about_infotext = with_infotext(sent)
    check_length(params, context)
    params, about_styles = with_styles(params, context)
    overridden = {name: value for name, value in (params.override_settings or {}).items() if value is not None}
    settings: dict[str, object] = {**options, **overridden}
    own, about_model = _model(overridden, told_model, options, context)
    spec = context.model(own)
    width, height = _pixels(params, context)
    second = parse_second_pass(params, width, height, spec, context)
    generation, ignored = _words_and_numbers(params, spec, context, settings)
    clip_skip, settings = _clip_skip(settings, spec)
    generation = replace(
        generation,
        clip_skip=clip_skip,
        width=width,
        height=height,
        model=own,
        format=_format(settings),
        **(second.fields if second else {}),
    )
    units, about_scripts = parse_units(params.alwayson_scripts or {})
    prompts, units, about_prompts = take_image_prompts(units, params, spec, context) if units else ((), [], [])
    chosen = choose_units(units, params, spec, context)
    generation = replace(generation, controls=chosen.controls, image_prompts=prompts)
    generations, batch, about_images = with_images(generation, params, chosen.edges, context.max_n, spec)
    repairs, about_repairs = read_repairs(
        params.alwayson_scripts or {}, generation, spec, context, edits=isinstance(params, Img2Img)
    )
    generations = [replace(one, repairs=repairs) for one in generations] if repairs else generations
    followed = chosen.edges if generations[0].canny else None
    shown = len(generations) + bool(followed and followed.shows_map) + sum(chosen.maps)
    context.check_size(shown, *((second.width, second.height) if second else (width, height)), "batch_size")
    ignored = [
        *about_infotext,
        *about_styles,
        *about_model,
        *ignored,
        *(second.ignored if second else []),
        *about_scripts,
        *about_repairs,
        *about_prompts,
        *chosen.ignored,
        *_ignored_parameters(params, settings),
        *about_images,
    ]
    return ParsedTask(params, spec, generations, batch, followed, ignored[:_MOST_IGNORED], chosen.maps)


def expand_task(parsed: ParsedTask, context: DialectContext) -> ParsedTask:
    """Return a task with the wildcards in the prompts of each image expanded by its seed. Raises `InvalidInput`."""
    generations, expanded, ignored = [], {}, list[str]()
    for generation in parsed.generations:
        one, texts, sentences = with_wildcards(generation, parsed.params, parsed.spec, context)
        generations.append(one)
        expanded[generation.variation] = texts
        ignored += sentences
    about_all = [*dict.fromkeys([*parsed.ignored, *ignored])]
    return replace(parsed, generations=generations, expanded=expanded, ignored=about_all[:_MOST_IGNORED])


def _model(
    overridden: Mapping[str, object], named_model: str, options: Mapping[str, Option], context: DialectContext
) -> tuple[str | None, list[str]]:
    """Return the model of the settings, of the infotext (`named_model`) or of the options.

    The second value is a sentence if `named_model` is not here.
    """
    chosen = str(options.get("sd_model_checkpoint", ""))
    ignored = []
    named = _text(overridden, "sd_model_checkpoint")
    if named_model and not named:
        try:
            return model_named(named_model[:NAME_MAX], context), []
        except (InvalidInput, Forbidden):
            ignored.append(f"infotext: the model {named_model[:50]!r} is not here.")
    named = named or chosen
    return model_named(named, context) if named else None, ignored


def _words_and_numbers(
    params: Txt2Img, spec: ModelSpec, context: DialectContext, settings: Mapping[str, object]
) -> tuple[GenerationRequest, list[str]]:
    """Return the request for text to image, without its size, and sentences about ignored parts."""
    texts, wildcards = texts_of(params), False if context.expander.by_default else None
    if expands(params, context):  # they are read when the seeds are known
        words, about_words, wildcards = dict[str, Any](texts), list[str](), True
    else:
        words, about_words = read_texts(texts, params, spec, context)
    sampler = read_sampler(params, settings, spec)
    generation = GenerationRequest(
        task=Task.TEXT_TO_IMAGE,
        **words,
        wildcards=wildcards,
        seed=_seed(params.seed),
        num_inference_steps=params.steps,
        guidance_scale=params.cfg_scale,
        scheduler=sampler.scheduler,
        sampling=sampler.sampling,
        prompt_syntax=PromptSyntax.A1111 if spec.weighs_prompts else PromptSyntax.PLAIN,
        allow_empty_prompt=True,
        at_least_one_step=True,
    )
    return generation, [*sampler.ignored, *about_words]


def _seed(wanted: int | None) -> int | Literal["random"]:
    return "random" if wanted is None or wanted < 0 else wanted


def _clip_skip(settings: dict[str, object], spec: ModelSpec) -> tuple[int | None, dict[str, object]]:
    """Return how many layers more than usual are left out, and the other settings; those without effect stay in them.

    As in AUTOMATIC1111, models that read the layer before the last take no other.
    """
    layer = settings.get(_CLIP_SKIP)
    if layer is None or spec.usual_clip_skip != 1:
        return None, settings
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= _LAYERS:
        raise InvalidInput(f"{_CLIP_SKIP} must be between 1 and {_LAYERS}.", field="override_settings")
    return layer - 1, {name: value for name, value in settings.items() if name != _CLIP_SKIP}


def _pixels(params: Txt2Img, context: DialectContext) -> tuple[int, int]:
    """Return checked width and height; the size of the response depends on them. Raises `InvalidInput`."""
    sides = {
        "width": 512 if params.width is None else params.width,
        "height": 512 if params.height is None else params.height,
    }
    low, high = context.limits.bounds()["width"]
    faults = [(n, range_sentence(n, low, high)) for n, side in sides.items() if not low <= side <= high]
    if faults:
        raise InvalidInput.from_faults(faults)
    return sides["width"], sides["height"]


def _text(settings: Mapping[str, object], name: str) -> str:
    """Return a text option, an empty text if it is omitted or null. Raises `InvalidInput`."""
    value = settings.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= NAME_MAX):
        raise InvalidInput(f"{name} must be a text of up to {NAME_MAX} characters.", field="override_settings")
    return value or ""


def _format(settings: Mapping[str, object]) -> Format:
    wanted = (_text(settings, "samples_format") or "png").lower()
    if wanted not in FORMATS:
        raise InvalidInput("samples_format must be png, jpg or webp.", field="override_settings")
    return FORMATS[wanted]


def _ignored_parameters(params: Txt2Img, settings: Mapping[str, object]) -> list[str]:
    """Return sentences about parameters that this server ignores."""
    extra: dict[str, Any] = params.model_extra
    ignored = [
        f"{name[:50]} is not honoured."
        for name, value in extra.items()
        if value not in (None, "", [], {})
        and value not in _NEUTRAL.get(name, ())
        and not name.startswith(_SILENT)
        and name not in SAMPLING_PARAMETERS
        and not is_scheduler_parameter(name)
    ]
    return [
        *ignored,
        *(f"override_settings: {name[:50]} is not honoured." for name in settings if name not in _KNOWN_SETTINGS),
    ]
