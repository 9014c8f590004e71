"""The tensors of one layer in a LoRA file, which must have the shapes that the layer asks for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stable_diffusion_server.pipelines.adapters.lora_deltas import LoraMismatch

Tensors = Mapping[str, torch.Tensor]
Rows = tuple[tuple[int, int], ...]

# Trainers offer at most a few hundred; stacks of a batch are padded to the largest.
LARGEST_RANK = 4096


class LayerTensors:
    """The tensors of one layer; shapes are checked when one is asked for."""

    def __init__(self, tensors: Tensors, shape: tuple[int, ...], name: str) -> None:
        self.tensors = tensors
        self.shape = shape
        self.name = name

    def __contains__(self, kind: str) -> bool:
        return kind in self.tensors

    def take(self, kind: str, *wanted: tuple[int, ...]) -> torch.Tensor:
        """A tensor, as one of these shapes of as many numbers and the same first side."""
        if kind not in self.tensors:
            lacking = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(kind, kind)
            raise LoraMismatch(f"lacks {f'{self.name}.{lacking}'[:100]!a}")
        tensor = self.tensors[kind]
        for shape in wanted:
            ones = [side for side in tensor.shape if side != 1] == [side for side in shape if side != 1]
            if tuple(tensor.shape) == shape or (ones and tensor.numel()):
                return tensor.reshape(shape)
        raise self.mismatch(kind)

    def rank(self, kind: str, side: int) -> int:
        """A rank: a side of a tensor."""
        if kind not in self.tensors:
            self.take(kind)
        tensor = self.tensors[kind]
        if tensor.ndim < 2:
            raise self.mismatch(kind)
        if tensor.shape[side] > LARGEST_RANK:
            raise LoraMismatch(
                f"has a rank of {tensor.shape[side]} for {self.name[:100]!a}, and {LARGEST_RANK} are taken"
            )
        return int(tensor.shape[side])

    def mismatch(self, kind: str) -> LoraMismatch:
        """Why a tensor does not fit."""
        shape = list(self.tensors[kind].shape)
        return LoraMismatch(
            f"is for another model: {f'{self.name}.{kind}'[:100]!a} is {shape[:6]}, and the layer "
            f"{self.shape[0]} × {self.shape[1]}"
        )

    def alpha(self, rank: int) -> float:
        """The scale: alpha by rank, 1 without an alpha."""
        return float(self.tensors["alpha"].float().item()) / rank if "alpha" in self else 1.0


def with_scalar(checked: LayerTensors, **factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The factors, with the number that multiplies them if there is one."""
    return {**factors, "scalar": checked.take("scalar", ())} if "scalar" in checked else factors
