"""Subseeds: the seed of another noise that the starting noise is turned to, and those of batches and second passes."""

from __future__ import annotations

from dataclasses import replace

from stable_diffusion_server.types import SEED_MAX, ExtraValue, GenerationRequest

Sampling = tuple[tuple[str, ExtraValue], ...]

SUBSEED, SUBSEED_STRENGTH = "subseed", "subseed_strength"


def with_subseed(
    request: GenerationRequest, sampling: Sampling, request_digest: str
) -> tuple[GenerationRequest, Sampling]:
    """Return the request and its options with the subseed of this image, if they have a strength of it.

    All images of a batch then have one seed, and image i has `subseed + i`, as in AUTOMATIC1111. A subseed that is not
    sent is derived from the digest, so that equal requests get equal images.

    Two seeds that differ in their upper 32 bits only have the same noise, which is so for subseeds too.
    """
    options = dict(sampling)
    if SUBSEED_STRENGTH not in options:
        return request, sampling
    subseed = options.get(SUBSEED, int(request_digest[8:16], 16))
    options[SUBSEED] = wrapped(int(subseed) + (request.variation if SUBSEED in options else 0))
    request = replace(request, variation=0 if isinstance(request.seed, int) else request.variation)
    return request, tuple(sorted(options.items()))


def one_later(sampling: Sampling) -> Sampling:
    """Return the options of a second pass, whose noise must not be that of the first."""
    return tuple((name, wrapped(int(value) + 1) if name == SUBSEED else value) for name, value in sampling)


def wrapped(seed: int) -> int:
    """Return a seed within its range."""
    return seed % (SEED_MAX + 1)
