"""Weights of a LoRA by parts of the model, as text: `te=0.5` in the text encoders, `lbw=1,0,0.5` by block.

Names and numbers of blocks are those of the extension sd-webui-lora-block-weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

# Characters of a text, and weights by block: FLUX.1 has 61.
_LONGEST, _MOST_BLOCKS = 1000, 100
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:\.[0-9]{0,6})?|\.[0-9]{1,6})")
# The extension's lists for the 17 blocks of SD 1.5; these three fit every model.
_PRESETS: Mapping[str, tuple[float, ...]] = {
    "NONE": (0,),
    "ALL": (1,),
    "ALL0.5": (0.5,),
    "INS": (1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "IND": (1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "INALL": (1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "MIDD": (1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0),
    "OUTD": (1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0),
    "OUTS": (1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "OUTALL": (1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
}


class LoraParts(NamedTuple):
    """Weights by parts: `encoders` replaces the LoRA's weight in the text encoders, `blocks` multiply it.

    They are one for all blocks, or one for each; without any the weight stays.
    """

    encoders: float | None = None
    blocks: tuple[float, ...] = ()

    def __str__(self) -> str:
        """The text, which is one for equal weights; empty if nothing differs from the LoRA's weight."""
        parts = [] if self.encoders is None else [f"te={self.encoders:g}"]
        if any(weight != 1 for weight in self.blocks):
            parts.append("lbw=" + ",".join(f"{weight:g}" for weight in self.blocks))
        return ":".join(parts)


def read_lora_parts(text: str) -> LoraParts:
    """Read the text. Raises `ValueError` with a sentence for what is none. Takes linear time."""
    if len(text) > _LONGEST:
        raise ValueError(f"weights by parts may have {_LONGEST} characters.")
    parts = LoraParts()
    for part in text.split(":") if text else ():
        name, _, value = part.partition("=")
        if name == "te":
            parts = parts._replace(encoders=lora_weight_of(value))
        elif name == "lbw":
            parts = parts._replace(blocks=read_lora_blocks(value))
        else:
            raise ValueError(f"{part[:50]!r} is no weight by parts; there are te= and lbw=.")
    return parts


def read_lora_blocks(text: str) -> tuple[float, ...]:
    """Read weights by block: the name of a preset, or numbers with commas or slashes. Raises `ValueError`."""
    if text.strip().upper() in _PRESETS:
        return _PRESETS[text.strip().upper()]
    blocks = tuple(lora_weight_of(weight) for weight in text.replace("/", ",").split(",", _MOST_BLOCKS))
    if len(blocks) > _MOST_BLOCKS:
        raise ValueError(f"at most {_MOST_BLOCKS} blocks have a weight.")
    return blocks


def lora_weight_of(text: str) -> float:
    """Read a weight. Raises `ValueError` with a sentence."""
    if not _NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{text[:50]!r} is no weight.")
    return float(text)


def canonical_lora_parts(text: str) -> str:
    """Return the one text of equal weights; a text that is none as it is, for what checks it to name it."""
    try:
        return str(read_lora_parts(text))
    except ValueError:
        return text
