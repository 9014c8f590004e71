"""Expands the prompts of a request before its key is made: first its styles, then its wildcards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from secrets import randbelow

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import TEXT_MAX
from stable_diffusion_server.generation.prompt_files import PromptFiles
from stable_diffusion_server.generation.seeds import SUBSEED_STRENGTH, wrapped
from stable_diffusion_server.parsing import (
    ExpandedText,
    TooManyWildcards,
    WildcardLimits,
    expand_wildcards,
    has_wildcards,
    styled,
)
from stable_diffusion_server.types import NOISE_SEEDS, GenerationRequest, digest

# Maximum styles of a request.
STYLES_MAX = 16
_FIELDS = ("prompt", "negative_prompt", "prompt_2", "hires_prompt", "hires_negative_prompt")
# Prompts of a second pass, by the names of both APIs: styles are put around those that are there.
_SECOND = {"hires_prompt": "prompt", "hr_prompt": "prompt"}
_SECOND |= {"hires_negative_prompt": "negative_prompt", "hr_negative_prompt": "negative_prompt"}


@dataclass(frozen=True, slots=True)
class PromptExpander:
    """Expands styles and wildcards with the operator's `files`, to at most `longest` characters.

    `by_default`: wildcards are expanded in requests that do not say whether. Its methods read files.
    """

    files: PromptFiles = field(default_factory=PromptFiles)
    longest: int = TEXT_MAX
    by_default: bool = False

    def changes(self, request: GenerationRequest) -> bool:
        """Whether `expand` may change the prompts of a request. Reads no file."""
        return bool(request.styles) or (
            self.expands_wildcards(request.wildcards) and any(map(has_wildcards, _texts_of(request).values()))
        )

    def expands_wildcards(self, asked: bool | None) -> bool:
        """Whether wildcards are expanded in a request with this value of `wildcards`."""
        return self.by_default if asked is None else asked

    def expand(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with its prompts expanded, so that expanding it again changes nothing.

        The prompts depend on the seed of the image. With wildcards a request without a seed gets one: a random one if
        it asks for that, else one derived from its prompts. Raises `InvalidInput` for names that are not here, and for
        more than the limits allow.
        """
        if not self.changes(request):
            return request
        before = _texts_of(request)
        after = self.with_styles(before, request.styles) if request.styles else before
        seed = request.seed
        if self.expands_wildcards(request.wildcards) and any(map(has_wildcards, after.values())):
            own_seed = _seed_of(request, after)
            expanded = self.with_wildcards(after, image_seed(request, own_seed))
            for name, one in expanded.items():
                if one.unknown:
                    raise InvalidInput(f"{name} names the wildcard {one.unknown[0]!r}, which is not here.", field=name)
            texts = {name: one.text for name, one in expanded.items()}
            after, seed = (after, seed) if texts == after else (texts, own_seed)
        return replace(
            request,
            prompt=after["prompt"],
            negative_prompt=after.get("negative_prompt"),
            prompt_2=after.get("prompt_2"),
            hires_prompt=after.get("hires_prompt"),
            hires_negative_prompt=after.get("hires_negative_prompt"),
            seed=seed,
            styles=(),
            wildcards=False,
            expanded=request.expanded or after != before,
        )

    def with_styles(self, texts: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
        """Return prompts, by the name of their parameter, in styles, one after the other.

        Raises `InvalidInput` for an unknown style, and for a text that becomes too long.
        """
        there = self.files.styles()
        unknown = next((name for name in names if name not in there), None)
        if unknown is not None:
            raise InvalidInput(f"{unknown[:100]!r} is not a style here.", field="styles")
        result = dict(texts)
        for style in map(there.__getitem__, names):
            own = {"prompt": style.prompt, "negative_prompt": style.negative_prompt}
            own |= {name: own[like] for name, like in _SECOND.items() if name in texts}
            for parameter, text in own.items():
                before = result.get(parameter, "")
                if text or before:
                    try:
                        result[parameter] = styled(before, text, self.longest)
                    except ValueError as error:
                        raise InvalidInput(f"{parameter} {error}.", field=parameter) from error
        return result

    def with_wildcards(self, texts: Mapping[str, str], seed: int) -> dict[str, ExpandedText]:
        """Return prompts, by the name of their parameter, with their wildcards expanded.

        Equal texts of equal parameters are equal for one seed, while the lists do not change. Raises `InvalidInput`.
        """
        list_of, limits = self.files.lists(), WildcardLimits(self.longest)
        result = {}
        for name, text in texts.items():
            numbers = Random(int(digest({"seed": seed, "parameter": name, "text": text}), 16))  # noqa: S311  # repeatable
            try:
                result[name] = expand_wildcards(text, numbers.random, list_of, limits)
            except TooManyWildcards as error:
                raise InvalidInput(f"{name} {error}.", field=name) from error
        return result


def image_seed(request: GenerationRequest, seed: int) -> int:
    """Return the seed of an image in a batch with this seed: with subseeds, all its images have the same one."""
    return wrapped(seed + (0 if SUBSEED_STRENGTH in dict(request.sampling) else request.variation))


def _seed_of(request: GenerationRequest, texts: Mapping[str, str]) -> int:
    """Return the seed of a request, a random one, or one derived from its prompts."""
    if request.seed == "random":
        return randbelow(NOISE_SEEDS)
    return int(digest({**texts})[:8], 16) if request.seed is None else request.seed


def _texts_of(request: GenerationRequest) -> dict[str, str]:
    """Return the prompts that a request has."""
    texts = {name: getattr(request, name) for name in _FIELDS}
    return {name: text for name, text in texts.items() if text is not None}
