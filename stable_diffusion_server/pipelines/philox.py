"""Normal noise as graphics cards draw it, computed on the CPU.

Philox 4×32 with ten rounds (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), then the first number
of each Box-Muller pair, as CUDA's randn takes them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint32]

_ROUNDS = 10
_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Return four random words for each counter, arrays of one length; the key is two words."""
    first, second, third, fourth = counter
    for number in range(_ROUNDS):
        low, high = (np.uint32((word + number * step) & _WORD) for word, step in zip(key, _KEY_STEPS, strict=True))
        products = first * _FACTORS[0], third * _FACTORS[1]  # of 64 bits
        (upper, lower), (upper_2, lower_2) = (
            ((one >> np.uint64(32)).astype(np.uint32), one.astype(np.uint32)) for one in products
        )
        first, second, third, fourth = upper_2 ^ second ^ low, lower_2, upper ^ fourth ^ high, lower
    return first, second, third, fourth


def gpu_noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal noise of a seed of 64 bits, float32 on the CPU: that of AUTOMATIC1111's random source NV.

    Equals `torch.randn` on a CUDA device to rounding, as long as the card has a thread for each number.
    """
    count = math.prod(shape)
    nothing = np.zeros(count, np.uint32)
    index = np.arange(count, dtype=np.uint32)
    one, two, *_ = philox((nothing, nothing, index, nothing), (seed & _WORD, (seed >> 32) & _WORD))
    radius = np.sqrt(-2 * np.log((one + 0.5) * 2.0**-32))
    noise = radius * np.sin((two + 0.5) * (2 * math.pi * 2.0**-32))
    return torch.from_numpy(noise.astype(np.float32)).reshape(shape)
