"""Strict, bounded parsing of untrusted JSON, Unicode text and prompt syntax."""

from __future__ import annotations

from stable_diffusion_server.parsing.compel_prompts import from_compel, has_functions
from stable_diffusion_server.parsing.prompt_schedules import longest_text, scheduled_texts
from stable_diffusion_server.parsing.strict_json import JsonLimits, dumps, parse_object
from stable_diffusion_server.parsing.unicode_text import nfc, strip_marks
from stable_diffusion_server.parsing.weighted_prompts import (
    BREAK,
    WeightedText,
    has_weights,
    parse_weights,
    render_weights,
    without_weights,
)

__all__ = [
    "BREAK",
    "JsonLimits",
    "WeightedText",
    "dumps",
    "from_compel",
    "has_functions",
    "has_weights",
    "longest_text",
    "nfc",
    "parse_object",
    "parse_weights",
    "render_weights",
    "scheduled_texts",
    "strip_marks",
    "without_weights",
]
