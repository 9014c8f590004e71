"""The untrained autoencoder: the mean of every cell, enlarged."""

from __future__ import annotations

import pytest
import torch

from training import vae

pytestmark = pytest.mark.slow


def test_untrained_it_brings_plain_colours_back() -> None:
    """An image of one colour is restored within a twentieth of the whole range."""
    model = vae.build()
    for colour in ((0.8, -0.6, 0.1), (-0.9, -0.9, -0.9), (1.0, 1.0, 1.0)):
        picture = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 128, 128)
        drawn = vae.round_trip(model, picture)
        assert (drawn - picture)[..., 16:-16, 16:-16].abs().max() < 0.1
