"""Strict, bounded parsing of untrusted JSON, Unicode text and prompt syntax."""

from __future__ import annotations

from stable_diffusion_server.parsing.compel_prompts import from_compel, has_functions
from stable_diffusion_server.parsing.lora_parts import (
    LoraParts,
    canonical_lora_parts,
    lora_weight_of,
    read_lora_blocks,
    read_lora_parts,
)
from stable_diffusion_server.parsing.prompt_names import NamedText, NameIndex
from stable_diffusion_server.parsing.prompt_schedules import longest_text, scheduled_texts
from stable_diffusion_server.parsing.prompt_styles import PromptStyle, parse_styles, styled
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
from stable_diffusion_server.parsing.wildcards import (
    ExpandedText,
    TooManyWildcards,
    WildcardLimits,
    WildcardLines,
    expand_wildcards,
    has_wildcards,
    parse_wildcard_lines,
)

__all__ = [
    "BREAK",
    "ExpandedText",
    "JsonLimits",
    "LoraParts",
    "NameIndex",
    "NamedText",
    "PromptStyle",
    "TooManyWildcards",
    "WeightedText",
    "WildcardLimits",
    "WildcardLines",
    "canonical_lora_parts",
    "dumps",
    "expand_wildcards",
    "from_compel",
    "has_functions",
    "has_weights",
    "has_wildcards",
    "longest_text",
    "lora_weight_of",
    "nfc",
    "parse_object",
    "parse_styles",
    "parse_weights",
    "parse_wildcard_lines",
    "read_lora_blocks",
    "read_lora_parts",
    "render_weights",
    "scheduled_texts",
    "strip_marks",
    "styled",
    "without_weights",
]
