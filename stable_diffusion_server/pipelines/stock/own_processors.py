"""Keeps the attention processors that a call puts into its denoiser out of the way of other calls.

Perturbed and self-attention guidance set processors of their own before the loop, and the plain ones after it. Calls
that wait between their steps share the denoiser, and one that is cancelled never gets to the end of its loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Seams(Protocol):
    """Where a call may hand control back."""

    def opened(self, steps: int, later: int) -> None:
        """Before the first step of a loop of so many steps; `later` is what other loops after it will take."""

    def stepped(self, index: int, latents: torch.Tensor | None) -> None:
        """After the step of this index in its loop."""


class OwnProcessors:
    """Seams at which the processors of a call leave the denoiser, and come back when the call goes on."""

    def __init__(self, seams: Seams, denoiser: Any) -> None:
        self._seams, self._denoiser = seams, denoiser
        self._plain = {**denoiser.attn_processors}
        self._running = True

    def opened(self, steps: int, later: int) -> None:
        """Before the first step."""
        with self._away():
            self._seams.opened(steps, later)

    def stepped(self, index: int, latents: torch.Tensor | None) -> None:
        """After a step."""
        with self._away():
            self._seams.stepped(index, latents)

    def end(self) -> None:
        """Put the plain processors back, unless another call may be running."""
        if self._running:
            self._denoiser.set_attn_processor({**self._plain})

    @contextmanager
    def _away(self) -> Iterator[None]:
        own = {**self._denoiser.attn_processors}
        self._denoiser.set_attn_processor({**self._plain})
        self._running = False
        yield  # a cancelled call does not come back
        self._denoiser.set_attn_processor(own)
        self._running = True
