"""Builds tokenizers: CLIP's from the package, T5's from a folder or from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPTokenizer, T5Tokenizer

from stable_diffusion_server.pipelines.library.gguf_header import GGUF
from stable_diffusion_server.pipelines.loading.checkpoint_configs import CONFIGS
from stable_diffusion_server.pipelines.loading.checkpoint_layout import TOKENIZERS
from stable_diffusion_server.pipelines.loading.checkpoint_tensors import read_gguf_file
from stable_diffusion_server.pipelines.loading.weight_files import INDEX, WeightFileError, shown

_MERGES = CONFIGS / "clip_tokenizer" / "merges.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# T5 adds words for gaps to the 32,000 of its vocabulary.
_GAPS = 100
_MAX_TOKENS = 512


def clip_tokenizer(pad: str = _END) -> Any:
    """CLIP's tokenizer: 49,408 words, 77 tokens. SDXL's second one pads with `!`."""
    lines = _MERGES.read_text("utf-8").split("\n")[1:]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines if line)]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=merges,
        pad_token=pad,
        model_max_length=77,
    )


def tokenizer_beside(place: Path) -> Path | None:
    """The tokenizer's folder of a text encoder in a diffusers folder; `None` for one that is elsewhere."""
    folder = place.parent / TOKENIZERS.get(place.name, "")
    return folder if place.name in TOKENIZERS and (place.parent / INDEX).is_file() and folder.is_dir() else None


def clip_tokenizer_of(encoder: Path, pad: str = _END) -> Any:
    """The tokenizer of a CLIP: that of the diffusers folder that it is in, else the package's.

    Raises `WeightFileError`.
    """
    folder = tokenizer_beside(encoder)
    return clip_tokenizer(pad) if folder is None else _tokenizer_in(CLIPTokenizer, folder)


def t5_tokenizer(place: Path) -> Any:
    """T5's tokenizer in a folder (tokenizer.json or spiece.model), or in a GGUF file of its encoder.

    Raises `WeightFileError`.
    """
    if place.suffix == GGUF and place.is_file():
        return _t5_in_gguf(place)
    return _tokenizer_in(AutoTokenizer, place)


def qwen3_tokenizer(place: Path) -> Any:
    """Qwen3's tokenizer in a folder, with its chat template. Raises `WeightFileError`."""
    tokenizer = _tokenizer_in(AutoTokenizer, place)
    if not tokenizer.chat_template:
        raise WeightFileError(f"{shown(place)} has no chat template (tokenizer_config.json or chat_template.jinja)")
    return tokenizer


def _tokenizer_in(tokenizer_class: Any, place: Path) -> Any:
    try:
        return tokenizer_class.from_pretrained(place, local_files_only=True)
    except Exception as error:  # the libraries have no class of their own for unreadable files
        raise WeightFileError(f"{shown(place)} holds no tokenizer that can be read ({type(error).__name__})") from error


def _t5_in_gguf(file: Path) -> Any:
    fields = read_gguf_file(file).fields
    words, scores = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.scores")
    if not isinstance(words, list) or not isinstance(scores, list) or len(words) != len(scores):
        raise WeightFileError(f"{shown(file)} holds no tokenizer")
    charsmap = fields.get("tokenizer.ggml.precompiled_charsmap")
    return T5Tokenizer(
        vocab=list(zip(words, scores, strict=True)),
        _spm_precompiled_charsmap=bytes(value & 255 for value in charsmap) if isinstance(charsmap, list) else None,
        extra_ids=_GAPS if f"<extra_id_{_GAPS - 1}>" in words else 0,
        model_max_length=_MAX_TOKENS,
    )


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in CLIP's order: printable bytes first, then the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
