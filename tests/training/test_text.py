"""The text encoders: the facts they must read, and that SDXL's two encoders agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from training import sdxl, text
from training.captions import draw_scene
from training.synthetic_shapes import Scene, Thing
from training.tokenization import make_clip, make_t5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """The CLIP tokenizer, made from the grammar."""
    return make_clip(tmp_path_factory.mktemp("clip"))


def test_two_objects_are_described_by_where_they_stand() -> None:
    """One relation has two captions: "A above B" and "B below A" are the same facts."""
    star, heart = Thing("star", "red"), Thing("heart", "blue")
    above = Scene("two", "white", (star, heart), relation="above")
    below = Scene("two", "white", (heart, star), relation="below")
    assert text.facts(above) == text.facts(below)
    assert text.facts(above) != text.facts(Scene("two", "white", (heart, star), relation="above"))


def test_captions_from_outside_have_no_facts() -> None:
    """Every slot then has the class "none"."""
    assert set(text.facts(None)) == {0}
    rng = np.random.default_rng(0)
    assert all(any(text.facts(draw_scene(rng, kind))) for kind in ("one", "two", "landscape"))


def test_the_projected_twin_pools_the_same(clip_tokenizer: CLIPTokenizer) -> None:
    """So training can use one encoder where the pipeline uses two."""
    clip = text.build_clip(clip_tokenizer).eval()
    words = sdxl.Words(clip_tokenizer, clip, text.projected(clip))
    tokens, pooled = words.embed(["a red circle", "TWO stars, please!"])
    ids = text.token_ids(clip_tokenizer, ["a red circle", "TWO stars, please!"])
    with torch.no_grad():
        twin = words.second(ids, output_hidden_states=True)
    assert torch.allclose(twin.text_embeds, pooled, atol=1e-5)
    assert torch.allclose(twin.hidden_states[-2], tokens[..., text.WIDTH :], atol=1e-5)


def test_both_tokenizers_lower_case_by_themselves(clip_tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """They still do after saving and loading, so prompts need no preprocessing."""
    t5 = make_t5(tmp_path / "t5")
    for tokenizer in (clip_tokenizer, t5):
        assert tokenizer("A Red CIRCLE").input_ids == tokenizer("a red circle").input_ids
    assert text.token_ids(t5, ["a red circle"], text.T5_LENGTH).shape == (1, text.T5_LENGTH)
