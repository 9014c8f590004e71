"""Strict, bounded parsing of untrusted JSON and Unicode text."""

from __future__ import annotations

from stable_diffusion_server.parsing.strict_json import JsonLimits, dumps, parse_object
from stable_diffusion_server.parsing.unicode_text import nfc, strip_marks

__all__ = [
    "JsonLimits",
    "dumps",
    "nfc",
    "parse_object",
    "strip_marks",
]
