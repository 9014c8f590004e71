"""Builds and trains the text encoders of both families.

The encoders learn before any denoiser does: from a caption's embedding, linear heads must predict every fact of the
scene. Two objects are identified by position (top or left first), not by their order in the caption. This binds shapes
to colours in minutes. The encoders are then frozen, and the denoisers only learn to generate images. One CLIP encoder
serves both families and both of SDXL's encoder slots.
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

from training.captions import Rng, draw_scene, pick, restyled, say_scene
from training.loop import RUNS, Plan, train
from training.synthetic_landscapes import GROUNDS, TIMES, Landscape
from training.synthetic_shapes import COLOURS, POSITIONS, RADII, SHAPES, STYLES, Scene
from training.tokenization import OUTSIDE, make_clip, make_t5

WIDTH = 96
"""Numbers in an embedding, of every encoder."""
CLIP_LENGTH = 77
T5_LENGTH = 32
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
    """Return the class of every slot; all 0 for a caption of unknown words (None)."""
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


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder of 3 layers."""
    torch.manual_seed(7)
    return CLIPTextModel(clip_config(tokenizer))


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Return the configuration of both CLIP text encoders."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=WIDTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def projected(clip: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return the same encoder as the class of SDXL's second one, with an identity projection."""
    twin = CLIPTextModelWithProjection(clip.config)
    twin.text_model.load_state_dict(clip.state_dict())
    with torch.no_grad():
        twin.text_projection.weight.copy_(torch.eye(WIDTH))
    return twin.eval().requires_grad_(False)


def build_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Return an untrained T5 encoder of 3 layers; three heads of the first one initially attend to neighbours."""
    torch.manual_seed(9)
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // 4,
            d_ff=2 * WIDTH,
            num_layers=3,
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
    nearness = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        model.shared.weight.mul_(0.1)
        for head, buckets in enumerate(((17,), (1,), (18, 19))):
            nearness[list(buckets), head] += 3.0
    return model


class Reader(nn.Module):
    """Linear heads that predict every slot from an embedding of ``WIDTH`` numbers."""

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
        """Return the share (0–1) of embeddings for which all slots are predicted correctly."""
        parts = self.heads(embedding).split(self.sizes, -1)
        read = torch.stack([part.argmax(-1) for part in parts], -1)
        return float((read == classes).all(-1).float().mean())


def draw_captions(count: int, rng: Rng) -> tuple[list[str], Tensor]:
    """Return captions with their facts; 3 % consist of unknown words."""
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
    """Return n × length token ids, padded and truncated as in the pipelines."""
    made = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return made.input_ids


def views(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a denoiser reads of captions: a pooled vector, n × WIDTH, and three tokens, n × 3 × WIDTH.

    The pooled vector is CLIP's pooled embedding or the mean of T5's tokens. For T5 the tokens are the first one,
    the end token and a random one. For CLIP they are padding tokens of the last layer but one, which have attended
    to all others.
    """
    if isinstance(encoder, T5EncoderModel):
        tokens = encoder(ids).last_hidden_state
        rows = torch.arange(len(ids))
        chosen = [torch.zeros_like(rows), (ids == 1).int().argmax(1).cpu(), torch.randint(0, ids.shape[1], (len(ids),))]
        return tokens.mean(1), torch.stack([tokens[rows, places] for places in chosen], 1)
    out = encoder(ids, output_hidden_states=True)
    return out.pooler_output, out.hidden_states[-2][:, [-1, -4, -8]]


def reading_loss(encoder: nn.Module, readers: nn.ModuleDict, ids: Tensor, classes: Tensor) -> Tensor:
    """Return the cross-entropy of predicting every fact from the pooled vector and from single tokens."""
    whole, tokens = views(encoder, ids)
    several = classes.repeat_interleave(tokens.shape[1], 0)
    return readers["whole"].loss(whole, classes) + readers["tokens"].loss(tokens.flatten(0, 1), several)


@torch.no_grad()
def reading_rate(
    encoder: nn.Module, readers: nn.ModuleDict, tokenizer: CLIPTokenizer | PreTrainedTokenizerFast, length: int
) -> tuple[float, float]:
    """Return the shares (0–1) of held-out captions predicted without error, from the pooled vector and from a token."""
    said, classes = draw_captions(400, np.random.default_rng(91_001))
    device = next(readers.parameters()).device
    whole, tokens = views(encoder, token_ids(tokenizer, said, length).to(device))
    classes = classes.to(device)
    return readers["whole"].right(whole, classes), readers["tokens"].right(tokens[:, 1], classes)


def run(plan: Plan, fresh: bool = False) -> Path:
    """Train the encoder that the plan is named after, ``clip`` or ``t5``; save it and its tokenizer as ``out``."""
    out = RUNS / plan.name / "out"
    tokenizer = make_clip(out / "tokenizer") if plan.name == "clip" else make_t5(out / "tokenizer")
    encoder: nn.Module = (build_clip if plan.name == "clip" else build_t5)(tokenizer).to(plan.device)
    readers = nn.ModuleDict({part: Reader() for part in ("whole", "tokens")}).to(plan.device)
    full = CLIP_LENGTH if plan.name == "clip" else T5_LENGTH

    def step_loss(step: int, rng: Rng) -> Tensor:
        said, classes = draw_captions(64, rng)
        length = 44 if plan.name == "clip" and rng.random() < 0.85 else full
        ids = token_ids(tokenizer, said, length).to(plan.device)
        return reading_loss(encoder, readers, ids, classes.to(plan.device))

    def show(folder: Path) -> None:
        whole, token = reading_rate(encoder, readers, tokenizer, full)
        with (folder / "figures.txt").open("a") as file:
            file.write(f"all facts read rightly off the whole {whole:.3f}, off a token {token:.3f}\n")
        encoder.save_pretrained(out / "encoder")

    train(plan, {"encoder": encoder, "readers": readers}, step_loss, show, fresh)
    return out
