"""Expands the prompts of txt2img and img2img: styles when the parameters are read, wildcards when the seeds are known.

LoRA tags and the rest of AUTOMATIC1111's syntax are read afterwards, because styles and wildcards contain them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from stable_diffusion_server.api.automatic1111.prompt_syntax import Lora, read_prompt, resolve_loras
from stable_diffusion_server.api.automatic1111.task_params import Img2Img, Txt2Img
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import STYLES_MAX, PromptExpander, image_seed
from stable_diffusion_server.parsing import has_wildcards
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import GenerationRequest

P = TypeVar("P", bound=Txt2Img)

# Maximum characters of tags in a prompt, in addition to MAX_PROMPT_CHARACTERS of text.
TAGS_MAX = 1000


def check_length(params: Txt2Img, context: DialectContext) -> None:
    """Raise `InvalidInput` for a prompt that is too long, before it is read."""
    longest = context.limits.max_prompt_characters + TAGS_MAX
    for name, text in texts_of(params).items():
        if len(text) > longest:
            raise InvalidInput(f"{name} must not be longer than {longest} characters, tags included.", field=name)


def has_hires(params: Txt2Img) -> bool:
    """Return whether hires fix is asked for, which image to image does not have."""
    return bool(params.enable_hr) and not isinstance(params, Img2Img)


def texts_of(params: Txt2Img) -> dict[str, str]:
    """Return the prompts, by the names of their parameters; those of hires fix only if they are other ones."""
    texts = {"prompt": params.prompt, "negative_prompt": params.negative_prompt or ""}
    if not has_hires(params):
        return texts
    hires = {"hr_prompt": params.hr_prompt, "hr_negative_prompt": params.hr_negative_prompt}
    return texts | {name: text for name, text in hires.items() if text and text != texts[name.removeprefix("hr_")]}


def with_styles(params: P, context: DialectContext) -> tuple[P, list[str]]:
    """Return the parameters with the prompts in their styles, and sentences about unknown styles, which are left out.

    Raises `InvalidInput` for too many styles, and for a prompt that becomes too long.
    """
    if not params.styles:
        return params, []
    there = context.expander.files.styles()
    known = [name for name in params.styles if name in there]
    if len(known) > STYLES_MAX:
        raise InvalidInput(f"styles must not name more than {STYLES_MAX}.", field="styles")
    unknown = dict.fromkeys(name for name in params.styles if name not in there)
    ignored = [f"styles: there is no style {name[:50]!r} here; it is left out." for name in unknown]
    return params.model_copy(update=_expander(context).with_styles(texts_of(params), known)), ignored


def expands(params: Txt2Img, context: DialectContext) -> bool:
    """Return whether `with_wildcards` may change the prompts."""
    return context.expander.expands_wildcards(params.wildcards) and any(map(has_wildcards, texts_of(params).values()))


def with_wildcards(
    generation: GenerationRequest, params: Txt2Img, spec: ModelSpec, context: DialectContext
) -> tuple[GenerationRequest, dict[str, str], list[str]]:
    """Return the request of an image with its prompts expanded by its seed, and these texts with their syntax.

    The last value is sentences about ignored parts; unknown wildcards stay in the text. Raises `InvalidInput`.
    """
    seed = generation.seed if isinstance(generation.seed, int) else 0
    expanded = _expander(context).with_wildcards(texts_of(params), image_seed(generation, seed))
    ignored = [
        f"{parameter}: there is no wildcard {name[:50]!r} here; it stays as it is."
        for parameter, one in expanded.items()
        for name in one.unknown
    ]
    texts = {parameter: one.text for parameter, one in expanded.items()}
    fields, about_syntax = read_texts(texts, params, spec, context)
    return replace(generation, **fields, wildcards=False, expanded=True), texts, [*ignored, *about_syntax]


def read_texts(
    texts: Mapping[str, str], params: Txt2Img, spec: ModelSpec, context: DialectContext
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a request for its prompts, and sentences about ignored parts."""
    steps = spec.default_steps if params.steps is None else params.steps
    positive, negative = (
        read_prompt(texts[name], name, steps, weighted=spec.weighs_prompts) for name in ("prompt", "negative_prompt")
    )
    loras, about_loras = resolve_loras(positive.loras, lambda: list(context.loras()))
    second, about_second = _read_hires(texts, params, spec, context)
    ignored = [*positive.ignored, *about_loras, *negative.ignored, *about_second]
    if negative.loras:
        ignored.append("negative_prompt: <lora:…> has no effect there.")
    fields = {
        "prompt": positive.words,
        "negative_prompt": negative.words or None,
        "loras": tuple((lora.name, lora.weight) for lora in loras),
        "lora_parts": tuple({lora.name: lora.parts for lora in (*second.loras, *loras) if lora.parts}.items()),
    }
    return {**fields, **second.fields}, ignored


class _HiresWords(NamedTuple):
    """The fields of a request for the words of its second pass, and the LoRAs among them."""

    fields: dict[str, Any]
    loras: tuple[Lora, ...] = ()


def _read_hires(
    texts: Mapping[str, str], params: Txt2Img, spec: ModelSpec, context: DialectContext
) -> tuple[_HiresWords, list[str]]:
    """Return the words of the second pass, which has the LoRAs of its own prompt only, and sentences."""
    fields, loras, ignored = dict[str, Any](), tuple[Lora, ...](), list[str]()
    steps = params.hr_second_pass_steps or params.steps or spec.default_steps
    if "hr_prompt" in texts:
        read = read_prompt(texts["hr_prompt"], "hr_prompt", steps, weighted=spec.weighs_prompts)
        loras, about_loras = resolve_loras(read.loras, lambda: list(context.loras()))
        fields = {"hires_prompt": read.words, "hires_loras": tuple((lora.name, lora.weight) for lora in loras)}
        ignored = [*read.ignored, *about_loras]
    if "hr_negative_prompt" in texts:
        read = read_prompt(texts["hr_negative_prompt"], "hr_negative_prompt", steps, weighted=spec.weighs_prompts)
        fields["hires_negative_prompt"] = read.words
        ignored += read.ignored
    return _HiresWords(fields, loras), ignored


def _expander(context: DialectContext) -> PromptExpander:
    return replace(context.expander, longest=context.limits.max_prompt_characters + TAGS_MAX)
