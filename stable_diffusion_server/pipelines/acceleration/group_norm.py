"""Triton kernels for group normalisation and sums of channels-last tensors.

PyTorch's own group normalisation starts one program per group and image, which is 32 of a GPU's hundreds, and converts
the memory layout before and after: half of the time of decoding 1024² on an H200. These kernels divide the pixels among
programs instead (benchmarks/results/). Adding a value per channel, such as a convolution's bias, costs nothing extra.
Importing this module requires Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

# Numbers per tile; tiles that a program reads at least; chunks per image at most; partial sums added at once.
_TILE, _TILES, _CHUNKS, _SUMS = 4096, 4, 512, 2048


class GroupNorm(torch.nn.GroupNorm):  # type: ignore[misc]  # torch is read without its types
    """Group normalisation that reads channels-last tensors directly; other layouts use PyTorch's implementation.

    For inference only: it has no gradients.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows × channels × height × width in and out, in the same memory layout."""
        return self._normed(input, None, activated=False)

    def activated(self, input: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise `input + shift`, then apply SiLU. `shift` has the shape channels or rows × channels."""
        return self._normed(input, shift, activated=True)

    def _normed(self, input: torch.Tensor, shift: torch.Tensor | None, *, activated: bool) -> torch.Tensor:
        if is_channels_last(input):
            return normed(input, shift, self.num_groups, self.weight, self.bias, self.eps, activated)
        made = super().forward(input if shift is None else input + shift[..., None, None])
        return functional.silu(made) if activated else made


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a tensor has the layout that these kernels read: four dimensions, channels last."""
    return tensor.dim() == 4 and bool(tensor.is_contiguous(memory_format=torch.channels_last))


def normed(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activated: bool,
) -> torch.Tensor:
    """Group normalisation (Wu & He 2018, arXiv 1803.08494) of a channels-last `x + shift`, in the dtype of `x`.

    `shift` has the shape channels or rows × channels. Sums are fp32.
    """
    if torch.compiler.is_compiling():
        made: torch.Tensor = _normed(x, shift, groups, weight, bias, eps, activated)
        return made
    return _launch_norm(x, shift, groups, weight, bias, eps, activated)


def _launch_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activated: bool,
) -> torch.Tensor:
    rows, channels, height, width = x.shape
    pixels = height * width
    padded = triton.next_power_of_2(channels)
    step = max(1, _TILE // padded)
    each = step * max(_TILES, triton.cdiv(triton.cdiv(pixels, step), _CHUNKS))
    chunks = triton.cdiv(pixels, each)
    sums = torch.empty((rows, chunks, 2, channels), device=x.device, dtype=torch.float32)
    factors = torch.empty((rows, 2, channels), device=x.device, dtype=torch.float32)
    made = torch.empty_like(x)
    _add_up[(chunks, rows)](x, sums, pixels, each, channels, padded, step, num_warps=8)
    size = channels // groups
    padded_size = triton.next_power_of_2(size)
    _conclude[(groups, rows)](
        sums,
        factors,
        weight,
        bias,
        x if shift is None else shift.contiguous(),
        0 if shift is None or shift.dim() == 1 else channels,
        pixels,
        chunks,
        eps,
        channels,
        size,
        padded_size,
        max(1, _SUMS // padded_size),
        shift is not None,
    )
    _apply[(triton.cdiv(pixels, step), rows)](x, made, factors, pixels, channels, padded, step, activated, num_warps=8)
    return made


# The compiler sees this operator instead of kernel launches. Eager calls skip it, because it adds 0.2 ms per call.
_normed = torch.library.custom_op("stable_diffusion_server::group_norm", _launch_norm, mutates_args=())


@_normed.register_fake  # type: ignore[untyped-decorator]  # torch is read without its types
def _(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activated: bool,
) -> torch.Tensor:
    return torch.empty_like(x)


def add_shifted(x: torch.Tensor, shift: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`x + shift + other` in one pass, in the dtype of `x`.

    `x` and `other` are channels last; `shift` has one value per channel.
    """
    if torch.compiler.is_compiling():
        made: torch.Tensor = _added(x, shift, other)
        return made
    return _launch_sum(x, shift, other)


def _launch_sum(x: torch.Tensor, shift: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    made = torch.empty_like(x)
    _add_shifted[(triton.cdiv(x.numel(), _TILE),)](x, shift, other, made, x.numel(), x.shape[1], _TILE, num_warps=8)
    return made


_added = torch.library.custom_op("stable_diffusion_server::add_shifted", _launch_sum, mutates_args=())


@_added.register_fake  # type: ignore[untyped-decorator]  # as above
def _(x: torch.Tensor, shift: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@triton.jit  # type: ignore[untyped-decorator]  # Triton is read without its types
def _add_up(x, sums, pixels, each, channels: tl.constexpr, padded: tl.constexpr, step: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Sum and sum of squares of each channel over `each` pixels: one program per chunk and image."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, padded)
    total = tl.zeros([step, padded], dtype=tl.float32)
    squares = tl.zeros([step, padded], dtype=tl.float32)
    first = chunk * each
    for start in range(first, first + each, step):
        pixel = start + tl.arange(0, step)
        inside = (pixel[:, None] < pixels) & (channel[None, :] < channels)
        at = (row.to(tl.int64) * pixels + pixel[:, None]) * channels + channel[None, :]
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += tile
        squares += tile * tile
    place = sums + (row * tl.num_programs(0) + chunk) * 2 * channels + channel
    tl.store(place, tl.sum(total, axis=0), mask=channel < channels)
    tl.store(place + channels, tl.sum(squares, axis=0), mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _conclude(  # type: ignore[no-untyped-def]  # as above
    sums,
    factors,
    weight,
    bias,
    shifts,
    shifts_of_a_row,
    pixels,
    chunks,
    eps,
    channels: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    at_once: tl.constexpr,
    shifted: tl.constexpr,
):
    """Factor and offset of each channel of a group: one program per group and image."""
    group, row = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, padded)
    channel = group * size + column
    total = tl.zeros([at_once, padded], dtype=tl.float32)
    squares = tl.zeros([at_once, padded], dtype=tl.float32)
    for start in range(0, chunks, at_once):
        chunk = start + tl.arange(0, at_once)
        inside = (chunk[:, None] < chunks) & (column[None, :] < size)
        at = (row * chunks + chunk[:, None]) * 2 * channels + channel[None, :]
        total += tl.load(sums + at, mask=inside, other=0.0)
        squares += tl.load(sums + at + channels, mask=inside, other=0.0)
    means = tl.sum(total, axis=0) / pixels
    mean_squares = tl.sum(squares, axis=0) / pixels
    if shifted:
        shift = tl.load(shifts + row * shifts_of_a_row + channel, mask=column < size, other=0.0).to(tl.float32)
        mean_squares += 2 * shift * means + shift * shift
        means += shift
    mean = tl.sum(means) / size
    variance = tl.maximum(tl.sum(mean_squares) / size - mean * mean, 0.0)
    factor = tl.load(weight + channel, mask=column < size, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    offset = tl.load(bias + channel, mask=column < size, other=0.0).to(tl.float32) - mean * factor
    if shifted:
        offset += shift * factor
    tl.store(factors + row * 2 * channels + channel, factor, mask=column < size)
    tl.store(factors + (row * 2 + 1) * channels + channel, offset, mask=column < size)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _apply(  # type: ignore[no-untyped-def]  # as above
    x, made, factors, pixels, channels: tl.constexpr, padded: tl.constexpr, step: tl.constexpr, activated: tl.constexpr
):
    """Apply factor, offset and SiLU: one program per `step` pixels of an image."""
    row = tl.program_id(1)
    pixel = tl.program_id(0) * step + tl.arange(0, step)
    channel = tl.arange(0, padded)
    inside = (pixel[:, None] < pixels) & (channel[None, :] < channels)
    at = (row.to(tl.int64) * pixels + pixel[:, None]) * channels + channel[None, :]
    factor = tl.load(factors + row * 2 * channels + channel, mask=channel < channels, other=0.0)
    offset = tl.load(factors + (row * 2 + 1) * channels + channel, mask=channel < channels, other=0.0)
    tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if activated:
        tile = tile * tl.sigmoid(tile)
    tl.store(made + at, tile.to(made.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _add_shifted(x, shifts, other, made, numbers, channels: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = at < numbers
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(shifts + at % channels, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(made + at, added.to(made.dtype.element_ty), mask=inside)
