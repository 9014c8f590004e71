"""The noise of graphics cards: known answers of Philox, known numbers of CUDA, and its use by requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import draw, draw_together, job_for, psnr

from stable_diffusion_server.pipelines.philox import gpu_noise, philox
from stable_diffusion_server.pipelines.starting_noise import starting_noise

pytestmark = pytest.mark.slow

GPU = ("noise_source", "gpu")


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    """Those that the authors of Philox publish with their code."""
    first, second, third, fourth = (np.array([word, word], np.uint32) for word in counter)
    words = philox((first, second, third, fourth), key)
    assert [[int(one) for one in word] for word in words] == [[word, word] for word in answer]


def test_numbers_of_a_card() -> None:
    """What `torch.manual_seed(0); torch.randn(12, device="cuda")` prints."""
    known = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564, -0.62285122, -0.32838709]
    known += [-1.07454231, -0.36314407, -1.67105067, 2.26550497]
    assert torch.allclose(gpu_noise(0, (3, 4)).flatten(), torch.tensor(known), atol=1e-6)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_has_its_noise(seed: int) -> None:
    """Of mean 0 and deviation 1, finite, and unlike its neighbour's."""
    noise = gpu_noise(seed, (1, 4, 128, 128))
    assert torch.isfinite(noise).all()
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert not torch.equal(noise, gpu_noise((seed + 1) % 2**64, (1, 4, 128, 128)))


@pytest.mark.parametrize("seed", [7, 7 + 2**40])
def test_a_request_starts_from_it(seed: int) -> None:
    """Its second pass from that of the seed after it; a subseed turns it as the CPU's."""
    shape = (1, 4, 8, 8)
    job = job_for("sdxl", seed=seed, sampling=(GPU,))
    for later in (0, 1):
        generator = torch.Generator().manual_seed((seed + later) % 2**32)
        assert torch.equal(starting_noise(job, shape, generator, torch.float32), gpu_noise(seed + later, shape))
    whole = replace(job, sampling=(GPU, ("subseed", 8), ("subseed_strength", 1.0)))
    found = starting_noise(whole, shape, torch.Generator().manual_seed(7), torch.float32)
    assert torch.allclose(found, gpu_noise(8, shape), atol=1e-5)


def test_requests_with_either_share_a_batch(sdxl: Any) -> None:
    """Each as if it were alone."""
    cpu, gpu = job_for("sdxl", seed=7), job_for("sdxl", seed=7, sampling=(GPU,))
    pictures = draw_together(sdxl, [cpu, gpu])
    assert psnr(*pictures) < 45
    for picture, job in zip(pictures, (cpu, gpu), strict=True):
        assert psnr(picture, draw(sdxl, job)) >= 45
