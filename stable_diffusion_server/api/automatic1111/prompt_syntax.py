"""Reads AUTOMATIC1111's prompt syntax: LoRA tags, AND, and for models that read no weights the words alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from stable_diffusion_server.parsing import LoraParts, lora_weight_of, read_lora_blocks

_TAG = re.compile(r"<([^<>]*)>")
# What the numbers after a LoRA's name are for, and the most arguments of a tag.
_PLACES = {0: "te", 1: "unet"}
_MOST_ARGUMENTS = 8
_OTHER_NETWORKS = ("lyco:", "hypernet:")
# Escaped characters, syntax, the words of syntax, and text between them.
_TOKEN = re.compile(r"\\.|[\\()\[\]:|]|\b(?:BREAK|AND)\b|\w+|[^\\()\[\]:|\w]+", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})")
_AND = re.compile(r"\bAND\b")
# Characters at the end of a part that AND divides, among which its weight is.
_WEIGHT_CHARACTERS = 30
_BLANKS = re.compile(r"\s{2,}")
_DEFAULT_STEPS = 20
_NUMBER_LENGTH = 20


class Lora(NamedTuple):
    """A LoRA's name, its weight, and its weights by parts of the model, as `read_lora_parts` reads them."""

    name: str
    weight: float
    parts: str = ""


@dataclass(frozen=True, slots=True)
class PlainPrompt:
    """A prompt for the model, its LoRAs, and sentences about syntax without effect. `parameter` names it in them."""

    words: str
    loras: tuple[Lora, ...]
    ignored: list[str]


def read_prompt(prompt: str, parameter: str, steps: int | None, *, weighted: bool = False) -> PlainPrompt:
    """Read a prompt with AUTOMATIC1111's syntax. Takes linear time for any text.

    If the model reads prompts that are `weighted`, they stay as they are, but for tags and AND. Otherwise the words
    stay: of `[a:b:when]` the part that is drawn in more of the `steps`, of `[a|b]` the first.
    """
    tagless, loras, others, ignored = _extract_tags(prompt)
    words, changed = (tagless, False) if weighted else _drop_syntax(tagless, steps or _DEFAULT_STEPS)
    if weighted and _AND.search(words):
        words = ", ".join(_without_weight(part) for part in _AND.split(words))
        ignored.append(f"{parameter}: prompts are not composed by AND here; its parts are one prompt.")
    if others:
        ignored.append(f"{parameter}: only <lora:…> is known here; other networks are left out.")
    if changed:
        ignored.append(f"{parameter}: weights and schedules in brackets, BREAK and AND are left out; the words stay.")
    words = _BLANKS.sub(" ", words)
    return PlainPrompt((words.replace(" ,", ",") if changed else words).strip(" ,"), tuple(loras), ignored)


def _without_weight(part: str) -> str:
    """A part of a prompt that AND divides, without its weight."""
    _, colon, number = part[-_WEIGHT_CHARACTERS:].rpartition(":")
    kept = part[: len(part) - len(number) - 1] if colon and _NUMBER.fullmatch(number.strip()) else part
    return kept.strip()


def resolve_loras(loras: Sequence[Lora], known: Callable[[], Sequence[str]]) -> tuple[tuple[Lora, ...], list[str]]:
    """Return the LoRAs by their names here, and sentences about unknown ones, which are left out.

    A name may have another case and the ending of its file. `known`, which may read a folder, is called if needed.
    """
    if not loras:
        return (), []
    names = {name.lower(): name for name in reversed(known())}
    found: list[Lora] = []
    ignored = []
    for name, weight, parts in loras:
        wanted = name.lower()
        here = names.get(wanted) or names.get(wanted.removesuffix(".safetensors"))
        if here is None:
            ignored.append(f"prompt: there is no adapter {name[:50]!r} here; it is left out.")
        else:
            found.append(Lora(here, weight, parts))
    return tuple(found), list(dict.fromkeys(ignored))


def _extract_tags(prompt: str) -> tuple[str, list[Lora], bool, list[str]]:
    """Return the prompt without tags of networks, the LoRAs, and whether there were networks of other kinds.

    The last value is sentences about what in the tags has no effect.
    """
    loras: list[Lora] = []
    ignored: list[str] = []
    others = False

    def extract(tag: re.Match[str]) -> str:
        nonlocal others
        if tag[1].startswith(_OTHER_NETWORKS):
            others = True
            return ""
        name, *given = tag[1].removeprefix("lora:").split(":", _MOST_ARGUMENTS)
        if not tag[1].startswith("lora:") or not name.strip():
            return tag[0]
        weight, parts, faults = _weights(given)
        loras.append(Lora(name.strip(), weight, parts))
        ignored.extend(f"prompt: of <lora:{name.strip()[:50]}:…> {fault}" for fault in faults)
        return ""

    return _TAG.sub(extract, prompt), loras, others, list(dict.fromkeys(ignored))


def _weights(given: Sequence[str]) -> tuple[float, str, list[str]]:
    """Return the weight in the denoiser, the text of weights by parts, and sentences on what has no effect.

    The first number is for the text encoders, by default 1, and for the denoiser if it has none of its own.
    """
    numbers: dict[str, float] = {}
    blocks: tuple[float, ...] = ()
    faults = []
    for place, text in enumerate(given):
        name, equals, value = text.strip().partition("=")
        name, value = (name, value) if equals else (_PLACES.get(place, ""), name)
        try:
            if name == "lbw" or (not equals and value and not _NUMBER.fullmatch(value)):
                blocks = read_lora_blocks(value)
            elif name in _PLACES.values():
                numbers |= {name: lora_weight_of(value)} if value else {}
            else:
                faults.append(f"{text[:50]!r} has no effect.")
        except ValueError:
            faults.append(f"{text[:50]!r} is not understood.")
    encoders = numbers.get("te", 1.0)
    weight = numbers.get("unet", encoders)
    parts = LoraParts(encoders if encoders != weight else None, blocks)
    return weight, str(parts), faults


@dataclass(slots=True)
class _Group:
    """An open bracket: its token's index, its kind, and the indices of the separators directly inside it."""

    start: int
    kind: str
    colons: list[int] = field(default_factory=list)
    bars: list[int] = field(default_factory=list)


def _drop_syntax(prompt: str, steps: int) -> tuple[str, bool]:
    """Return the words of a prompt without syntax, and whether there was any."""
    tokens = _TOKEN.findall(prompt)
    reader = _SyntaxReader(tokens, steps)
    for index, token in enumerate(tokens):
        reader.read(index, token)
    return reader.words()


class _SyntaxReader:
    """Finds the tokens to drop. Ranges are counted as +1 and -1 at their ends, so that nesting costs no copies."""

    def __init__(self, tokens: list[str], steps: int) -> None:
        self._tokens = tokens
        self._steps = steps
        self._depth_changes = [0] * (len(tokens) + 1)
        self._groups = [_Group(-1, "")]
        self._open = {"(": 0, "[": 0}
        self._replaced: dict[int, str] = {}

    def read(self, index: int, part: str) -> None:
        """Take in the next token."""
        match part:
            case "(" | "[":
                self._groups.append(_Group(index, part))
                self._open[part] += 1
                self._drop(index, index + 1)
            case ")" | "]":
                self._drop(index, index + 1)
                self._close("(" if part == ")" else "[", index)
            case ":":
                self._groups[-1].colons.append(index)
            case "|":
                self._groups[-1].bars.append(index)
            case "BREAK":
                self._replaced[index] = " "
            case "AND":
                self._replaced[index] = ","
                self._drop_weight(self._groups[-1], index)
            case _ if part.startswith("\\"):
                self._replaced[index] = part[1:]

    def words(self) -> tuple[str, bool]:
        """Return the remaining text, and whether anything was dropped or replaced."""
        end = len(self._tokens)
        divided = "," in self._replaced.values()
        while len(self._groups) > 1:
            self._end(self._groups.pop(), end)
        self._drop_weight(self._groups[0], end, whole=divided)
        depths = list(accumulate(self._depth_changes))
        kept = [self._replaced.get(i, token) for i, token in enumerate(self._tokens) if depths[i] == 0]
        return "".join(kept), bool(self._replaced) or any(depths)

    def _drop(self, start: int, end: int) -> None:
        self._depth_changes[start] += 1
        self._depth_changes[end] -= 1

    def _close(self, kind: str, index: int) -> None:
        """End the innermost group of a kind, and those inside it. Without one, `:1.2)` is dropped all the same."""
        if not self._open[kind]:
            self._drop_weight(self._groups[-1], index)
            return
        while True:
            group = self._groups.pop()
            self._open[group.kind] -= 1
            self._end(group, index)
            if group.kind == kind:
                return

    def _end(self, group: _Group, end: int) -> None:
        """Drop what is not drawn of a group that ends before the token `end`."""
        if group.kind == "(":
            self._drop_weight(group, end)
            return
        start, colons = group.start + 1, group.colons
        when = self._number(colons[-1] + 1, end) if colons else None
        if when is not None:
            first_end, last_end = colons[0], colons[-1]
            self._drop(last_end, end)
            if len(colons) > 1:
                start, end = self._longer(start, first_end, last_end, when)
            else:
                end = last_end
        if bars := [bar for bar in group.bars if start <= bar < end]:
            self._keep_one(start, [*bars, end])

    def _longer(self, start: int, first_end: int, last_end: int, when: float) -> tuple[int, int]:
        """Keep the part of `from:to` that is drawn longer; at a tie the first, since early steps compose the image."""
        share = when if when < 1 else when / self._steps
        before, after = self._has_words(start, first_end), self._has_words(first_end + 1, last_end)
        if after and (share < 0.5 or not before):
            self._drop(start, first_end + 1)
            return first_end + 1, last_end
        self._drop(first_end, last_end)
        return start, first_end

    def _keep_one(self, start: int, ends: list[int]) -> None:
        """Keep the first alternative with words of those that end at `ends`."""
        starts = [start, *(end + 1 for end in ends[:-1])]
        kept = next((i for i, pair in enumerate(zip(starts, ends, strict=True)) if self._has_words(*pair)), 0)
        self._drop(start, starts[kept])
        self._drop(ends[kept], ends[-1])

    def _drop_weight(self, group: _Group, end: int, *, whole: bool = True) -> None:
        """Drop a weight such as `:1.2` at the end of a group; without `whole` not `:9`, which may be part of 16:9."""
        if not group.colons or self._number(group.colons[-1] + 1, end) is None:
            return
        if whole or "." in self._tokens[group.colons[-1] + 1 : end]:
            self._drop(group.colons.pop(), end)

    def _number(self, start: int, end: int) -> float | None:
        """Return the number that the tokens form; `None` for other text."""
        if not 0 < end - start <= _NUMBER_LENGTH:
            return None
        text = "".join(self._tokens[start:end]).strip()
        return float(text) if _NUMBER.fullmatch(text) else None

    def _has_words(self, start: int, end: int) -> bool:
        return any(token.strip() for token in self._tokens[start : min(end, start + _NUMBER_LENGTH)])
