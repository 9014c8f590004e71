"""Makes the change that the tensors of one layer mean, if they fit it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from stable_diffusion_server.pipelines.adapters.lora_deltas import (
    LayerChange,
    LoraMismatch,
    take_rows,
    weight_shape,
)
from stable_diffusion_server.pipelines.adapters.lora_layer_tensors import LayerTensors, Rows, Tensors, with_scalar
from stable_diffusion_server.pipelines.adapters.lora_products import loha_change, lokr_change


def change_of(
    tensors: Tensors, layer: Any, name: str, rows: Rows, whole: int, notes: Mapping[str, Any] | None
) -> LayerChange:
    """The change that a layer's tensors mean, by their kinds in `lora_names`.

    `name` is the layer in errors, `rows` are those of the trainer's layer of `whole` rows that this layer has, all of
    them if empty, and `notes` is what the trainer noted of the scale. Raises `LoraMismatch` with the reason.
    """
    if isinstance(layer, torch.nn.Conv2d) and layer.groups != 1:
        raise LoraMismatch(f"changes {name[:100]!a}, a convolution in groups, which takes no LoRA")
    own = weight_shape(layer)
    shape = (whole, *own[1:]) if rows else own
    checked = LayerTensors(tensors, shape, name)
    change = _method(checked, own, rows, notes)
    if change is None:
        if "diff_b" not in tensors:
            raise LoraMismatch(f"holds nothing that can be used for {name[:100]!a}")
        change = LayerChange(own)
    return _with_others(change, checked, rows)


def _method(
    checked: LayerTensors, own: tuple[int, ...], rows: Rows, notes: Mapping[str, Any] | None
) -> LayerChange | None:
    kinds = set(checked.tensors)
    if any(kind.startswith("hada_") for kind in kinds):
        return loha_change(checked, own, rows)
    if any(kind.startswith("lokr_") for kind in kinds):
        return lokr_change(checked, own, rows)
    if "diff" in kinds:
        return LayerChange(own, factors=with_scalar(checked, diff=checked.take("diff", checked.shape)),
                           whole=checked.shape, rows=rows)  # fmt: skip
    if kinds & {"down", "up", "mid"}:
        return _lora(checked, own, rows, notes)
    return None


def _lora(checked: LayerTensors, own: tuple[int, ...], rows: Rows, notes: Mapping[str, Any] | None) -> LayerChange:
    out, inner, kernel = checked.shape[0], checked.shape[1], checked.shape[2:]
    rank = checked.rank("down", 0)
    up = checked.take("up", (out, rank))
    scale = checked.alpha(rank) if notes is None else _noted_scale(notes, rank)
    if "mid" in checked:
        middle = checked.take("mid", (rank, rank, *kernel))
        factors = with_scalar(checked, up=up, down=checked.take("down", (rank, inner)), mid=middle)
        return LayerChange(own, scale, factors=factors, whole=checked.shape, rows=rows)
    down = checked.take("down", (rank, inner, *kernel))
    if "scalar" in checked:
        scale *= float(checked.take("scalar", ()).float().item())
    bias = checked.take("up_bias", (out,)) * scale if "up_bias" in checked else None
    bias = None if bias is None else take_rows(bias, rows)
    return LayerChange(own, scale, down=down, up=take_rows(up, rows), bias=bias)


def _noted_scale(notes: Mapping[str, Any], rank: int) -> float:
    alpha = float(notes.get("lora_alpha", rank))
    return alpha / math.sqrt(rank) if notes.get("use_rslora") else alpha / rank


def _with_others(change: LayerChange, checked: LayerTensors, rows: Rows) -> LayerChange:
    """The change with a difference of the bias and with magnitudes, if there are some."""
    if "diff_b" in checked:
        change = replace(change, bias=take_rows(checked.take("diff_b", (checked.shape[0],)), rows))
    kind = next((kind for kind in ("magnitude", "dora_scale") if kind in checked), None)
    if kind is None:
        return change
    magnitude, (out, inner) = checked.tensors[kind], checked.shape[:2]
    # LyCORIS has norms of rows as out × 1, of columns as 1 × in; PEFT has those of rows alone.
    by_column = kind == "dora_scale" and magnitude.ndim > 1 and magnitude.shape[:2] == (1, inner) and inner > 1
    if by_column and rows:
        raise LoraMismatch(f"is a DoRA with norms of columns for {checked.name[:100]!a}, which is several layers here")
    flat = checked.take(kind, magnitude.shape).reshape(-1)
    if len(flat) != (inner if by_column else out):
        raise checked.mismatch(kind)
    return replace(change, magnitude=flat if by_column else take_rows(flat, rows), by_column=by_column)
