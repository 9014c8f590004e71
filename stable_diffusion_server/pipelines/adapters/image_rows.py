"""Image prompts that were read, and which rows of a pass attend to which of them at a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from stable_diffusion_server.pipelines.adapters.image_attention import AttendedImages, ImageLayers


@dataclass(frozen=True, slots=True, eq=False)
class ReadImage:
    """An image prompt that was read: `tokens` are rows × tokens × channels, with the rows of its request.

    It counts by `weight` from the share `start` of the steps to the share `end`. `layers` attend to it, and stay loaded
    while `held` exists.
    """

    layers: ImageLayers = field(repr=False)
    tokens: torch.Tensor = field(repr=False)
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    held: object = field(default=None, repr=False)

    def counts_at(self, step: int, steps: int) -> bool:
        """Whether it counts at a step, from 0, of so many: those that lie within its range as a whole."""
        return self.weight != 0 and step / steps >= self.start and (step + 1) / steps <= self.end


def attended_by_row(images: Iterable[Sequence[ReadImage]], rows: Sequence[int]) -> list[AttendedImages]:
    """What the rows of a pass attend to: `rows[i]` rows of the pass, one after the other, to `images[i]`.

    Rows of one adapter and one number of tokens attend together; a row's second image by the same adapter after them.
    """
    groups: dict[tuple[int, tuple[int, ...], int], list[tuple[int, ReadImage]]] = {}
    first = 0
    for own, count in zip(images, rows, strict=True):
        used: dict[tuple[int, tuple[int, ...]], int] = {}
        for image in own:
            kind = (id(image.layers), tuple(image.tokens.shape[1:]))
            used[kind] = used.get(kind, 0) + 1
            groups.setdefault((*kind, used[kind]), []).append((first, image))
        first += count
    return [_together(group) for group in groups.values()]


def _together(group: Sequence[tuple[int, ReadImage]]) -> AttendedImages:
    like = group[0][1].tokens
    places = [first + row for first, image in group for row in range(len(image.tokens))]
    weights = [image.weight for _, image in group for _ in image.tokens]
    return AttendedImages(
        group[0][1].layers,
        torch.tensor(places, device=like.device),
        torch.cat([image.tokens for _, image in group]),
        torch.tensor(weights, device=like.device, dtype=like.dtype).reshape(-1, 1, 1),
    )
