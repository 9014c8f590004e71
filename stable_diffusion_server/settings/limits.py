"""Settings of the request limits: queue, image sizes, seconds."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from stable_diffusion_server.settings.base import Names, SettingsGroup


class LimitSettings(SettingsGroup):
    """Upper bounds of a request, and of the work done for it."""

    queue_limit: int = Field(
        32, ge=1, description="Maximum number of requests in the engine's queue; further ones get 429."
    )
    max_batch: int = Field(
        8,
        ge=1,
        le=64,
        description="Maximum number of requests per forward pass; the batch size that is fastest is measured per size.",
    )
    engine_workers: int = Field(
        0,
        ge=0,
        le=64,
        description=(
            "Worker threads that share the weights, for several CPU cores. With more than one, weights are not moved. "
            "0: two on a CPU of several cores where that is possible, otherwise one; long steps then run one at a time "
            "on all cores, short ones side by side."
        ),
    )
    min_side: int = Field(64, ge=8, description="Minimum width and height in pixels.")
    max_side: int = Field(2048, ge=64, le=16383, description="Maximum width and height in pixels.")
    max_steps: int = Field(150, ge=1, le=1000, description="Maximum number of denoising steps.")
    max_guidance: float = Field(30.0, ge=0, allow_inf_nan=False, description="Maximum guidance scale.")
    max_prompt_characters: int = Field(32_000, ge=1, le=32_000, description="Maximum length of a prompt in characters.")
    stop_words: Literal["builtin", "nltk"] = Field(
        "builtin",
        description=(
            "English words removed first from a prompt that exceeds its model's tokens; negations such as `not` and "
            "`without` are always kept. `nltk` uses NLTK's list, which has to be on the disk: `pip install nltk`, then "
            "`python -m nltk.downloader stopwords`. Part of an image's digest."
        ),
    )
    max_timeout: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="Maximum `timeout` of a request in seconds, and the default.",
    )
    max_image_bytes: int = Field(
        20_971_520, ge=1024, description="Maximum size of an image file, uploaded or fetched, in bytes."
    )
    max_image_pixels: int = Field(16_777_216, ge=4096, description="Maximum area of an input image in pixels.")
    max_image_side: int = Field(
        16_383, ge=64, le=16_383, description="Maximum width and height of an input image; WebP cannot hold more."
    )
    max_upscaled_side: int = Field(
        8192, ge=64, le=16_383, description="Maximum width and height of an enlarged image in pixels."
    )
    max_upscaled_pixels: int = Field(
        33_554_432,
        ge=4096,
        le=268_435_456,
        description="Maximum area of an enlarged image in pixels; each takes 3 bytes of memory.",
    )
    max_references: int = Field(
        4,
        ge=1,
        le=16,
        description="Maximum number of reference images in an edit; each takes about the memory and time of an image.",
    )
    max_controls: int = Field(
        4,
        ge=1,
        le=16,
        description="Maximum number of control images of a request; each adds the work of a ControlNet to its steps.",
    )
    max_image_prompts: int = Field(
        4,
        ge=1,
        le=16,
        description="Maximum number of image prompts of a request; each is attended to at every step.",
    )
    extra_image_formats: Names = Field(
        (),
        description="Input formats besides PNG, JPEG and WebP: `avif`, `bmp`, `gif`, `tiff`. The first frame is used.",
    )
    decode_processes: int = Field(
        3,
        ge=1,
        le=64,
        description="Processes that decode images, one at a time each; one caller gets at most half, rounded up.",
    )
    decode_timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Maximum seconds to decode an input image."
    )
    fetch_timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Maximum seconds to fetch an input image by its URL."
    )
    fetch_allow: Names = Field(
        (),
        description=(
            "Hosts and networks that images may be fetched from, and that `models fetch` may be redirected to, "
            "although they are not public, separated by commas, with the port if it is not 80 or 443: "
            "`images.internal`, `10.0.0.0/8`, `127.0.0.1:9000`."
        ),
    )
    bumpy_retries: Literal["auto", "0", "1", "2"] = Field(
        "auto",
        description=(
            "How often a too bumpy image is generated again, with ` detail` added to the prompt and one more step. "
            "Comics and ink drawings also count as bumpy. `auto`: as the model's spec says, which is never for all "
            "models known here."
        ),
    )

    @field_validator("extra_image_formats")
    @classmethod
    def _are_known_formats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in ("avif", "bmp", "gif", "tiff"):
                raise ValueError(f"{name!r} is none of avif, bmp, gif and tiff")
        return tuple(dict.fromkeys(value))

    @field_validator("fetch_allow")
    @classmethod
    def _are_hosts_or_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not _is_host_or_network(entry):
                raise ValueError(f"{entry!r} is not a host or a network, such as 10.0.0.0/8 or 127.0.0.1:9000")
        return value


def _is_host_or_network(entry: str) -> bool:
    try:
        ip_network(entry)
    except ValueError:
        pass  # not a bare network, so a host, perhaps with a port
    else:
        return True
    try:
        parts = urlsplit(f"//{entry}")
        return bool(parts.hostname) and parts.netloc == entry and "@" not in entry and parts.port != 0
    except ValueError:
        return False
