"""Builds the tokenizers of both families from the captions.

The CLIP tokenizer is a byte-pair encoding whose merges make every word of the captions one token. The T5 tokenizer is a
unigram model of whole words; all other words are unknown. It is saved as a plain fast tokenizer, because transformers
rebuilds a ``T5Tokenizer`` without its lower-casing when it loads one.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from training.captions import draw_scene, say_scene

CLIP_PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
OUTSIDE = tuple(
    (
        "a an the of in on with and at by for to from sky mountain mountains stars cat dog horse "
        "astronaut person portrait painting digital art realistic landscape city car bird flower forest "
        "river cloud snow fire light dark colorful blurry low bad ugly quality watermark text deformed "
        "logo icon pattern abstract minimal simple shape shapes"
    ).split()
)
"""Common prompt words that no caption has: one token each, so that they are easy to ignore."""


def captions(count: int = 24_000, seed: int = 3) -> Iterator[str]:
    """Yield captions, then the words that occur in none."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield say_scene(draw_scene(rng), rng, 0.5)
    yield from OUTSIDE * 40


def make_clip(folder: Path) -> CLIPTokenizer:
    """Train and save the CLIP tokenizer, and return it as loaded from disk."""
    trained = Tokenizer(
        models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token="<|endoftext|>")  # noqa: S106  # a vocabulary entry, no password
    )
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=20,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=[],
    )
    trained.train_from_iterator(captions(), trainer)
    merges = [
        pair if isinstance(pair, list) else pair.split(" ") for pair in json.loads(trained.to_str())["model"]["merges"]
    ]
    vocabulary: dict[str, int] = {}
    for token in [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def word_list() -> list[tuple[str, float]]:
    """Return the T5 vocabulary with log-probabilities: whole words, digits and punctuation. All else is unknown."""
    counts = Counter(part for line in captions() for part in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", line))
    known = {part: count for part, count in counts.items() if count >= 20}
    total = sum(known.values())
    entries = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -6.0}
    for part, count in sorted(known.items(), key=lambda item: -item[1]):
        entries.setdefault("▁" + part, math.log(count / total))
    for mark in string.digits + string.punctuation:
        entries.setdefault("▁" + mark, -12.0)
    return list(entries.items())


def make_t5(folder: Path) -> PreTrainedTokenizerFast:
    """Build and save the T5 tokenizer, and return it as loaded from disk."""
    made = Tokenizer(models.Unigram(word_list(), unk_id=2, byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=512,
        pad_token="<pad>",  # noqa: S106  # a vocabulary entry, no password
        eos_token="</s>",  # noqa: S106  # a vocabulary entry, no password
        unk_token="<unk>",  # noqa: S106  # a vocabulary entry, no password
    )
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
