"""Parts of tiny pipelines: tokenizers made of a few lines, small text encoders, VAEs and schedulers."""

from __future__ import annotations

import json
import re
from typing import Any

import diffusers as d
import tokenizers as tk
import transformers as t

SIDE = 64
LINES = [
    "a red circle on a blue background",
    "a small house by the sea, oil painting, evening light",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships",
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment",
    "<Prompt Start> user assistant system make it green, turn the sky dark",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking|default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


# Tokenizers


def clip_tokenizer() -> Any:
    """Byte-level BPE with CLIP's two special tokens; they come last, as in the real vocabulary.

    Its merges are made here, since training with an end-of-word suffix comes out otherwise in every process.
    """
    alphabet = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word for line in LINES for word in re.findall("[a-z]+", line.lower())}):
        joined, *letters = [*word[:-1], word[-1] + "</w>"]
        for letter in letters:
            merges[joined, letter] = None
            joined += letter
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    return t.CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


def t5_tokenizer(length: int = 64) -> Any:
    """A unigram vocabulary of the words and the printable characters, T5's special tokens first.

    Not trained, since the trainer's scores differ in their last digits from process to process.
    """
    words = sorted({"\u2581" + word for line in LINES for word in re.findall("[A-Za-z]+", line)})
    letters = ["\u2581", *(chr(code) for code in range(33, 127))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(word, -5.0) for word in words] + [(letter, -12.0) for letter in letters]
    return t.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=length)


def qwen_tokenizer() -> Any:
    """Byte-level BPE with the chat tokens and a chat template like Qwen's."""
    model = tk.Tokenizer(tk.models.BPE())
    model.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        LINES, tk.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    vocab, merges = _bpe_parts(model)
    tokenizer = t.Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=2048)
    specials = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> Any:
    """BPE over words joined by the sentencepiece underscore, with byte fallback."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    model = tk.Tokenizer(tk.models.BPE(unk_token="<unk>"))  # noqa: S106  # no password
    model.normalizer = tk.normalizers.Replace(" ", "\u2581")
    model.train_from_iterator(
        LINES, tk.trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    vocab, merges = _bpe_parts(model)
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    return t.GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=300)


def _state(model: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(model.to_str())["model"]
    return state


def _bpe_parts(model: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    state = _state(model)
    return dict(state["vocab"]), [tuple(pair) for pair in state["merges"]]


# Text encoders


def clip_text(tokenizer: Any, hidden: int = 32, projected: bool = False) -> Any:
    """`eos_token_id` must be the tokenizer's: the pooled vector is read where it stands (2 means the old way)."""
    config = t.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (t.CLIPTextModelWithProjection if projected else t.CLIPTextModel)(config)


def t5_text(tokenizer: Any, hidden: int = 32) -> Any:
    """The encoder half alone."""
    return t.T5EncoderModel(
        t.T5Config(
            vocab_size=len(tokenizer),
            d_model=hidden,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            use_cache=False,
        )
    )


def qwen3_text(tokenizer: Any, layers: int, model: Any) -> Any:
    """Klein reads hidden states 9, 18 and 27 unless told otherwise, so it wants at least 27 layers."""
    return model(
        t.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def gemma_text(tokenizer: Any) -> Any:
    """Gemma 2 without its head."""
    return t.Gemma2Model(
        t.Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            query_pre_attn_scalar=16,
            sliding_window=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


# VAEs and schedulers


def kl_vae(channels: int, **changes: Any) -> Any:
    """Eight pixels to one, as the real ones."""
    given: dict[str, Any] = {
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 4,
        "sample_size": SIDE,
        "use_quant_conv": channels == 4,
        "use_post_quant_conv": channels == 4,
        "scaling_factor": 0.18215 if channels == 4 else 0.3611,
        "shift_factor": None if channels == 4 else 0.1159,
    }
    return d.AutoencoderKL(**{**given, **changes})


def flow(**changes: Any) -> Any:
    """The flow-matching schedule whose shift depends on the picture's size."""
    given = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    return d.FlowMatchEulerDiscreteScheduler(**{**given, **changes})
