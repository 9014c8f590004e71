"""Styles: named texts that are put around prompts, in AUTOMATIC1111's format, `styles.csv`."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

_PLACE = "{prompt}"
_MOST_STYLES, _NAME_LENGTH, _TEXT_LENGTH = 10_000, 200, 32_000


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """A style: what it makes of a prompt and of a negative prompt."""

    name: str
    prompt: str
    negative_prompt: str


def parse_styles(text: str) -> dict[str, PromptStyle]:
    """Return the styles in a CSV text by name, in its order; of several with one name the last.

    The first row names the columns `name`, `prompt` (in old files `text`) and `negative_prompt`. Rows without a name
    and rows whose name begins with # are skipped. Raises `ValueError`, with the end of a sentence about the text.
    """
    styles: dict[str, PromptStyle] = {}
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, restkey="", restval="")
    try:
        if "name" not in (reader.fieldnames or ()):
            raise ValueError("has no column called name")
        for row in reader:
            style = PromptStyle(row["name"], row.get("prompt", row.get("text", "")), row.get("negative_prompt", ""))
            if not style.name or style.name.startswith("#"):
                continue
            if len(style.name) > _NAME_LENGTH or max(len(style.prompt), len(style.negative_prompt)) > _TEXT_LENGTH:
                raise ValueError(f"has too long a text in the row that ends at line {reader.line_num}")
            styles[style.name] = style
            if len(styles) > _MOST_STYLES:
                raise ValueError(f"has more than {_MOST_STYLES} styles")
    except csv.Error as error:
        raise ValueError(f"is not valid at line {reader.line_num}: {error}") from error
    return styles


def styled(prompt: str, style: str, most: int) -> str:
    """Return a prompt in a style: in the place of each `{prompt}` in it, or before it.

    Raises `ValueError`, with the end of a sentence about the prompt, if the result has more than `most` characters.
    """
    places = style.count(_PLACE)
    if len(style) + places * (len(prompt) - len(_PLACE)) <= most:
        parts = [style.replace(_PLACE, prompt)] if places else [prompt.strip(), style.strip()]
        if len(text := ", ".join(part for part in parts if part)) <= most:
            return text
    raise ValueError(f"has more than {most} characters in its styles")
