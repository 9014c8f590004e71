"""How much of everything is taken at the most."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from stable_diffusion_server.settings.base import Names, SettingsGroup


class LimitSettings(SettingsGroup):
    """Queue, sizes, bytes and seconds."""

    queue_limit: int = Field(32, ge=1, description="Jobs that may wait; one more is answered 429.")
    max_batch: int = Field(
        8,
        ge=1,
        le=64,
        description="Jobs that share a forward pass at the most; by shape it is as many as make pictures faster.",
    )
    engine_workers: int = Field(
        0,
        ge=0,
        le=64,
        description=(
            "Threads that draw side by side with the same weights: for several CPU cores. With more than one there "
            "are no adapters, and weights have to stay where they are. 0: two on a CPU of several cores where that "
            "is possible and LORA_DIR is empty, else one."
        ),
    )
    min_side: int = Field(64, ge=8, description="Smallest width and height in pixels.")
    max_side: int = Field(2048, ge=64, le=16383, description="Largest width and height in pixels.")
    max_steps: int = Field(100, ge=1, le=1000, description="Most denoising steps.")
    max_guidance: float = Field(20.0, ge=0, allow_inf_nan=False, description="Largest guidance scale.")
    max_prompt_characters: int = Field(4000, ge=1, le=10_000, description="Longest prompt in characters.")
    max_timeout: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest `timeout` in seconds, and the one of a request without.",
    )
    max_body_bytes: int = Field(1_048_576, ge=1024, description="Largest request body in bytes, but for multipart.")
    max_upload_bytes: int = Field(33_554_432, ge=1024, description="Largest multipart body, files and all, in bytes.")
    body_timeout: float = Field(
        15.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a body may stand still, or wait for room to be read into; then it is refused.",
    )
    body_min_rate: float = Field(
        16_384.0,
        ge=0,
        allow_inf_nan=False,
        description="Bytes a second a body arrives with at the least, measured over BODY_TIMEOUT.",
    )
    bodies_bytes: int = Field(
        268_435_456,
        ge=1_048_576,
        description=(
            "Bytes of bodies that are being received at a time, taken as they arrive; one caller has half, anonymous "
            "ones have half together, and the rest waits."
        ),
    )
    max_response_bytes: int = Field(
        67_108_864, ge=1024, description="Largest answer that holds pictures as text, in bytes; else ask for addresses."
    )
    max_image_bytes: int = Field(20_971_520, ge=1024, description="Largest picture file sent or fetched, in bytes.")
    max_image_pixels: int = Field(16_777_216, ge=4096, description="Largest area of a picture taken, in pixels.")
    max_image_side: int = Field(
        16_383, ge=64, le=16_383, description="Largest width and height of a picture taken; WebP holds no more."
    )
    extra_image_formats: Names = Field(
        (), description="Kinds of pictures taken beside PNG, JPEG and WebP, by their first frame: `avif`, `gif`."
    )
    decode_processes: int = Field(
        3,
        ge=1,
        le=64,
        description="Processes that decode pictures, each one at a time; one caller has half of them, rounded up.",
    )
    decode_timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Seconds to decode a picture at the most."
    )
    fetch_timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Seconds to fetch a picture by its URL at the most."
    )
    fetch_allow: Names = Field(
        (),
        description=(
            "Hosts and networks pictures may be fetched from although they are not public, separated by commas, "
            "with a port where it is not that of http or https: `images.internal`, `10.0.0.0/8`, `127.0.0.1:9000`."
        ),
    )
    bumpy_retries: Literal["auto", "0", "1", "2"] = Field(
        "auto",
        description=(
            "How often a picture that is too bumpy is drawn again, with ` detail` after its prompt and a step more: "
            "comics and ink are taken for faults too. `auto`: as the model's facts say, never for those known here."
        ),
    )

    @field_validator("extra_image_formats")
    @classmethod
    def _known_formats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in ("avif", "gif"):
                raise ValueError(f"{name!r} is neither avif nor gif")
        return tuple(dict.fromkeys(value))

    @field_validator("fetch_allow")
    @classmethod
    def _hosts_or_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
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
