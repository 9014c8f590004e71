"""Pictures that come as text: base64, bare or in a data URL. Knows no formats."""

from __future__ import annotations

import base64
import binascii
import re

from stable_diffusion_server.errors import InvalidInput

# What stands before the comma of a data URL; no media type needs as much.
_LONGEST_HEAD = 300
_HEAD = re.compile(r"data:[a-z]+/[a-z0-9.+-]+(;[^;]*)*;base64", re.IGNORECASE)


def is_data_url(text: str) -> bool:
    """Whether a picture's address is the picture itself."""
    return text[:5].lower() == "data:"


def bytes_of(text: str, field: str) -> bytes:
    """The bytes of a picture in base64, with or without a data URL's beginning. Raises `InvalidInput`."""
    head, comma, rest = text[:_LONGEST_HEAD].partition(",")
    if comma and _HEAD.fullmatch(head):
        text = rest + text[_LONGEST_HEAD:]
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        # Most come without line breaks, and taking them out of a long text takes its time.
        data = _without_blanks(text)
    if data:
        return data
    raise InvalidInput(f"{field} is not a picture in base64.", field=field)


def text_of(data: bytes) -> str:
    """Bytes in base64."""
    return base64.b64encode(data).decode("ascii")


def _without_blanks(text: str) -> bytes:
    try:
        return binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError:
        return b""
