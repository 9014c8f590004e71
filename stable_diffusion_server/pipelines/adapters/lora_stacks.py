"""Factors of low rank of many rows, stacked so that one product serves a whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class FactorStack:
    """The factors of low rank of one layer, padded with zeros to the largest rank.

    `index` are the rows that have some, `None` for all. Each of the n entries is for `count` rows one after the other,
    such as the two of classifier-free guidance: a copy for each row would be read from memory in each pass, which took
    longer than the product. Of a linear layer `downs` is n × in × rank and `ups` n × rank × out, of a convolution n ×
    rank × in × k × k and n × out × rank. `others` are the rows of other sets.
    """

    index: torch.Tensor | None
    count: int
    downs: torch.Tensor | None
    ups: torch.Tensor | None
    others: list[tuple[int, torch.Tensor]]

    @classmethod
    def of(
        cls,
        factors: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        rows: Sequence[int],
        others: list[tuple[int, torch.Tensor]],
    ) -> FactorStack:
        """The stack of the sets with these `factors` (down and up, by place), in the order of their `rows`."""
        if not factors:
            return cls(None, 1, None, None, others)
        most = max(len(down) for down, _ in factors.values())
        down, up = next(iter(factors.values()))
        downs = down.new_zeros(len(factors), most, *down.shape[1:])
        ups = up.new_zeros(len(factors), len(up), most)
        for number, (down, up) in enumerate(factors.values()):
            downs[number, : len(down)], ups[number, :, : len(down)] = down, up
        if downs.ndim == 3:
            downs, ups = downs.transpose(1, 2).contiguous(), ups.transpose(1, 2).contiguous()
        numbers = {place: number for number, place in enumerate(factors)}
        own = [place for place in rows if place in numbers]
        count = gcd(*(len(list(run)) for _, run in groupby(own)))
        wanted = torch.tensor([numbers[place] for place in own[::count]], device=down.device)
        index = torch.tensor([number for number, place in enumerate(rows) if place in numbers], device=down.device)
        return cls(None if len(index) == len(rows) else index, count, downs[wanted], ups[wanted], others)

    def added_to(self, output: torch.Tensor, given: torch.Tensor, module: Any) -> torch.Tensor:
        """The output with the products of these rows."""
        if self.downs is None or self.ups is None:
            return output
        own = given if self.index is None else given[self.index]
        if self.downs.ndim == 5:
            made = _convolved(own, self.downs, self.ups, module, self.count)
        else:
            inner = torch.bmm(own.reshape(len(self.downs), -1, own.shape[-1]), self.downs)
            if self.index is None:
                flat = output.reshape(len(self.downs), -1, output.shape[-1])
                return torch.baddbmm(flat, inner, self.ups).view(output.shape)
            made = torch.bmm(inner, self.ups).view(len(own), *output.shape[1:])
        return output + made if self.index is None else output.index_add(0, self.index, made)


def _convolved(given: torch.Tensor, downs: torch.Tensor, ups: torch.Tensor, module: Any, count: int) -> torch.Tensor:
    """One grouped convolution for all entries, then a product for each."""
    entries, rank = downs.shape[:2]
    # count × (entries × in) × …: the entries are groups of channels.
    beside = given.unflatten(0, (entries, count)).transpose(0, 1).flatten(1, 2)
    padding = module.padding
    if module.padding_mode != "zeros":
        beside, padding = functional.pad(beside, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    inner = functional.conv2d(beside, downs.flatten(0, 1), None, module.stride, padding, module.dilation, entries)
    size = inner.shape[2:]
    inner = inner.view(count, entries, rank, -1).permute(1, 2, 0, 3).reshape(entries, rank, -1)
    made = torch.bmm(ups, inner).view(entries, ups.shape[1], count, -1).transpose(1, 2)
    return made.reshape(entries * count, ups.shape[1], *size)
