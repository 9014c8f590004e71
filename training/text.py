"""Builds and trains the text encoders of both families; knows captions and facts, nothing of pixels.

Before any denoiser sees them, the encoders learn to *understand*: from a caption's embedding, linear
heads must read every fact of the scene, two objects by where they stand (top or left first) and not by
which was said first. This binds shapes to colours in minutes; the denoisers then only learn to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from training.grammar import Rng, draw_scene, pick, restyled, say_scene
from training.landscape import GROUNDS, TIMES, Landscape
from training.loop import RUNS, Plan, train
from training.tokenization import OUTSIDE, make_clip, make_t5
from training.world import COLOURS, POSITIONS, RADII, SHAPES, STYLES, Scene

WIDTH = 64
CLIP_LENGTH = 77
T5_LENGTH = 48
"""Tokens the Flux family reads; the pipeline's ``max_sequence_length``."""

COLOUR_NAMES = tuple(COLOURS)
SLOTS: dict[str, tuple[object, ...]] = {
    "kind": ("one", "two", "many", "placed", "free", "landscape"),
    "background": COLOUR_NAMES,
    "style": STYLES,
    "size": tuple(RADII),
    "count": (1, 2, 3),
    "position": tuple(POSITIONS),
    "layout": ("upright", "level"),
    "first shape": SHAPES,
    "first colour": COLOUR_NAMES,
    "second shape": SHAPES,
    "second colour": COLOUR_NAMES,
    "time": TIMES,
    "ground": GROUNDS,
    "house": COLOUR_NAMES,
    "tree": (True,),
    "boat": COLOUR_NAMES,
}
"""What is to be read from a caption, with the possible answers; class 0 is always "none of these"."""


def facts(scene: Scene | Landscape | None) -> list[int]:
    """Return the class of every slot; all 0 for a caption from outside the world (None)."""
    found: dict[str, object] = {}
    if isinstance(scene, Landscape):
        found = {"kind": "landscape", "time": scene.time, "ground": scene.ground}
        found |= {"house": scene.house, "tree": scene.tree, "boat": scene.boat}
    elif scene is not None:
        things = scene.things
        if scene.relation in ("below", "right of"):
            things = things[::-1]
        found = {"kind": scene.kind, "background": scene.background, "style": scene.style}
        found |= {"size": things[0].size, "count": things[0].count, "position": scene.position}
        found |= {"first shape": things[0].shape, "first colour": things[0].colour}
        if scene.kind == "two":
            found["layout"] = "upright" if scene.relation in ("above", "below") else "level"
            found |= {"second shape": things[1].shape, "second colour": things[1].colour}
    return [answers.index(found[slot]) + 1 if found.get(slot) in answers else 0 for slot, answers in SLOTS.items()]


def build_clip(tokenizer: CLIPTokenizer, projected: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return an untrained CLIP text encoder of 2 layers, or of 3 with a projection."""
    torch.manual_seed(7 + projected)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3 if projected else 2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=WIDTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def build_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Return an untrained T5 encoder of 2 layers."""
    torch.manual_seed(9)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // 4,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


class Reader(nn.Module):
    """Linear heads that read every slot from an embedding of ``WIDTH`` numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [len(answers) + 1 for answers in SLOTS.values()]
        self.heads = nn.Linear(WIDTH, sum(self.sizes))

    def loss(self, embedding: Tensor, classes: Tensor) -> Tensor:
        """Return the mean cross-entropy over slots; embedding n × WIDTH, classes n × slots."""
        parts = self.heads(embedding).split(self.sizes, -1)
        return torch.stack([F.cross_entropy(part, classes[:, i]) for i, part in enumerate(parts)]).mean()

    @torch.no_grad()
    def right(self, embedding: Tensor, classes: Tensor) -> float:
        """Return the share (0–1) of embeddings from which every slot is read rightly."""
        parts = self.heads(embedding).split(self.sizes, -1)
        read = torch.stack([part.argmax(-1) for part in parts], -1)
        return float((read == classes).all(-1).float().mean())


def draw_captions(count: int, rng: Rng) -> tuple[list[str], Tensor]:
    """Return captions with their facts, 3 % of them from outside the world."""
    said, classes = [], []
    for _ in range(count):
        if rng.random() < 0.03:
            said.append(" ".join(pick(rng, OUTSIDE) for _ in range(int(rng.integers(1, 9)))))
            classes.append(facts(None))
            continue
        scene = draw_scene(rng)
        caption = say_scene(scene, rng, pick(rng, (0.0, 0.25, 0.5)))
        said.append(restyled(caption, rng) if rng.random() < 0.2 else caption)
        classes.append(facts(scene))
    return said, torch.tensor(classes)


def token_ids(
    tokenizer: CLIPTokenizer | PreTrainedTokenizerFast, captions: Sequence[str], length: int = CLIP_LENGTH
) -> Tensor:
    """Return n × length token ids, padded and cut as the pipelines do."""
    made = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return made.input_ids


def build_readers(names: Sequence[str]) -> nn.ModuleDict:
    """Return two readers for every named encoder (of clip, clip_2, t5): of its whole and of its tokens."""
    return nn.ModuleDict({f"{name}_{part}": Reader() for name in names for part in ("whole", "tokens")})


def views(name: str, encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a denoiser sees of captions: the whole, n × WIDTH, and the tokens, n × length × WIDTH."""
    if name == "t5":
        tokens = encoder(ids).last_hidden_state
        return tokens.mean(1), tokens
    out = encoder(ids, output_hidden_states=True)
    return (out.text_embeds if name == "clip_2" else out.pooler_output), out.hidden_states[-2]


def reading_loss(
    encoders: dict[str, nn.Module], readers: nn.ModuleDict, ids: dict[str, Tensor], classes: Tensor
) -> Tensor:
    """Return the summed cross-entropy of reading every fact off every encoder; ids are by tokenizer."""
    losses = []
    for name, encoder in encoders.items():
        whole, tokens = views(name, encoder, ids["t5" if name == "t5" else "clip"])
        losses.append(readers[f"{name}_whole"].loss(whole, classes))
        few = [-1, -4, -8] if name != "t5" else torch.randint(0, tokens.shape[1], (4,)).tolist()
        some = tokens[:, few].flatten(0, 1)
        losses.append(readers[f"{name}_tokens"].loss(some, classes.repeat_interleave(len(few), 0)))
    return torch.stack(losses).sum()


@torch.no_grad()
def reading_rates(
    encoders: dict[str, nn.Module],
    readers: nn.ModuleDict,
    tokenizers: dict[str, CLIPTokenizer | PreTrainedTokenizerFast],
) -> dict[str, float]:
    """Return how often all facts of held-out captions are read rightly off each encoder's whole (0–1)."""
    said, classes = draw_captions(300, np.random.default_rng(91_001))
    device = next(readers.parameters()).device
    found = {}
    for name, encoder in encoders.items():
        ids = ids_for(name, tokenizers, said).to(device)
        whole, _ = views(name, encoder, ids)
        found[name] = round(readers[f"{name}_whole"].right(whole, classes.to(device)), 3)
    return found


def ids_for(
    name: str, tokenizers: dict[str, CLIPTokenizer | PreTrainedTokenizerFast], captions: Sequence[str]
) -> Tensor:
    """Return the token ids that an encoder (clip, clip_2 or t5) reads, at the pipelines' length."""
    kind = "t5" if name == "t5" else "clip"
    return token_ids(tokenizers[kind], captions, T5_LENGTH if kind == "t5" else CLIP_LENGTH)


class Lessons:
    """Reading practice beside a denoiser's training: captions alone, which cost little."""

    def __init__(
        self,
        encoders: dict[str, nn.Module],
        tokenizers: dict[str, CLIPTokenizer | PreTrainedTokenizerFast],
        device: str,
    ) -> None:
        self.encoders, self.tokenizers, self.device = encoders, tokenizers, device
        self.readers = build_readers(list(encoders)).to(device)

    def loss(self, count: int, rng: Rng) -> Tensor:
        """Return the reading loss of fresh captions; CLIP is mostly cut to 44 tokens."""
        said, classes = draw_captions(count, rng)
        lengths = {"clip": 44 if rng.random() < 0.8 else CLIP_LENGTH, "t5": T5_LENGTH}
        ids = {kind: token_ids(t, said, lengths[kind]).to(self.device) for kind, t in self.tokenizers.items()}
        return reading_loss(self.encoders, self.readers, ids, classes.to(self.device))

    def rates(self) -> dict[str, float]:
        """Return ``reading_rates`` of the encoders as they are."""
        return reading_rates(self.encoders, self.readers, self.tokenizers)


def run(plan: Plan, fresh: bool = False) -> Path:
    """Make the tokenizers, train the three encoders together, save all under ``out``; return that path."""
    out = RUNS / plan.name / "out"
    tokenizers = {"clip": make_clip(out / "tokenizer"), "t5": make_t5(out / "tokenizer_t5")}
    encoders: dict[str, nn.Module] = {
        "clip": build_clip(tokenizers["clip"], projected=False).to(plan.device),
        "clip_2": build_clip(tokenizers["clip"], projected=True).to(plan.device),
        "t5": build_t5(tokenizers["t5"]).to(plan.device),
    }
    lessons = Lessons(encoders, tokenizers, plan.device)

    def show(folder: Path) -> None:
        with (folder / "figures.txt").open("a") as file:
            file.write(f"all facts read rightly: {lessons.rates()}\n")
        for name, encoder in encoders.items():
            encoder.save_pretrained(out / name)

    modules = encoders | {"readers": lessons.readers}
    train(plan, modules, lambda step, rng: lessons.loss(96, rng), show, fresh)
    return out
