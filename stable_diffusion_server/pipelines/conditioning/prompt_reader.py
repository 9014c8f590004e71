"""Reads the prompts of a request for CLIP: weights, chunks of equal number for both, and texts that change by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from stable_diffusion_server.parsing import longest_text, scheduled_texts
from stable_diffusion_server.pipelines.catalog import steps_skipped
from stable_diffusion_server.pipelines.conditioning.clip_prompts import ClipEncoder, ClipText, encode_text, padded
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, digests_and_weights
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.conditioning.prompt_embeddings import PromptEmbeddings
from stable_diffusion_server.pipelines.model_spec import MOST_CHUNKS, ModelSpec
from stable_diffusion_server.types import DiffusionRequest

T = TypeVar("T")

# Texts that one request may change between: each takes memory on the device.
_MOST_TEXTS = 16


@dataclass(frozen=True, slots=True)
class StepPrompts:
    """The texts that count from step `start` (from 0): [negative, positive] with guidance, [positive] without."""

    start: int
    rows: tuple[ClipText, ...]
    warnings: tuple[str, ...] = ()

    def without_negative(self) -> StepPrompts:
        """The same with zeros in place of the negative text, as some pipelines read an empty one."""
        if len(self.rows) == 1:
            return self
        negative, positive = self.rows
        pooled = None if negative.pooled is None else torch.zeros_like(negative.pooled)
        return replace(self, rows=(ClipText(torch.zeros_like(negative.embeds), pooled), positive))


def read_prompts(
    request: DiffusionRequest,
    spec: ModelSpec,
    encoders: Sequence[ClipEncoder],
    cache: PromptCache,
    loras: ActiveLoras,
    device: torch.device,
    embeddings: PromptEmbeddings,
) -> list[StepPrompts]:
    """Encode the prompts for each range of steps, the first from 0, all with chunks of equal number.

    The last of several encoders reads `prompt_2`, if there is one.
    """
    skip = spec.clip_skip if request.clip_skip is None else request.clip_skip
    skipped = steps_skipped(spec, request.num_inference_steps, request.strength) if request.starts_from_image else 0
    steps = request.num_inference_steps - skipped

    def encoded(texts: tuple[str, ...]) -> ClipText:
        key = ("weighted", texts, skip, digests_and_weights(loras), embeddings.used)
        value = cache.get_or_create(key, lambda: _as_entry(encode_text(texts, encoders, skip, device, embeddings)))
        return ClipText(value[0], value[1], is_cut=value[2] is not None)

    second = request.prompt if request.prompt_2 is None else request.prompt_2
    rows = [(request.prompt, second)[-len(encoders) :]]
    if request.guidance_scale > 1:
        rows.insert(0, (request.negative_prompt or "",) * len(encoders))
    schedules, warnings = [], [*embeddings.warnings]
    for texts in rows:
        schedule = _scheduled(texts, steps)
        if len({part for _, part in schedule}) > _MOST_TEXTS:
            warnings.append(f"A prompt changes to more than {_MOST_TEXTS} texts; the one of the most steps is drawn.")
            schedule = [(0, tuple(longest_text(text, steps) for text in texts))]
        schedules.append([(start, encoded(part)) for start, part in schedule])
    if any(text.is_cut for schedule in schedules for _, text in schedule):
        warnings.append(f"A prompt has more than {MOST_CHUNKS} chunks of 75 tokens; the rest is not read.")
    tokens = max(text.embeds.shape[1] for schedule in schedules for _, text in schedule)
    starts = sorted({start for schedule in schedules for start, _ in schedule})
    empty = encoded(("",) * len(encoders))
    return [
        StepPrompts(
            start, tuple(padded(_at(schedule, start), empty, tokens) for schedule in schedules), tuple(warnings)
        )
        for start in starts
    ]


def _scheduled(texts: tuple[str, ...], steps: int) -> list[tuple[int, tuple[str, ...]]]:
    """What the encoders read from each step on at which one of their texts changes."""
    each = {text: scheduled_texts(text, steps) for text in texts}
    starts = sorted({start for schedule in each.values() for start, _ in schedule})
    return [(start, tuple(_at(each[text], start) for text in texts)) for start in starts]


def _as_entry(text: ClipText) -> tuple[torch.Tensor | None, ...]:
    """The text as the cache holds it; a third tensor says that it was cut."""
    return text.embeds, text.pooled, torch.ones(1) if text.is_cut else None


def _at(schedule: Sequence[tuple[int, T]], step: int) -> T:
    return next(text for start, text in reversed(schedule) if start <= step)
