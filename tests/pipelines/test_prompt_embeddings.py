"""Textual inversion: equals the stock pipelines' `load_textual_inversion`, and leaves other requests alone."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_stand_ins import sd15_pipeline, sdxl_pipeline
from drawing import draw, draw_together, largest_difference
from embedding_makers import embedding_file, vectors
from single_file_specs import sd15_spec, sdxl_spec
from tiny_oracles import TinyCase, request_for, stock_picture

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines import EmbeddingFolder
from stable_diffusion_server.pipelines.families.sd15 import Sd15
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.types import DiffusionRequest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

SD15, SDXL = sd15_spec(("denoiser", "model.safetensors")), sdxl_spec(("denoiser", "model.safetensors"))
TEXTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
NO_CHECKER = {"requires_safety_checker": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One vector, three vectors, a pair, for CLIPs 64 and 128 wide; and 70 vectors."""
    place = tmp_path_factory.mktemp("embeddings")
    embedding_file(place / "inkblot.safetensors", {"emb_params": vectors(3, 64)})
    embedding_file(place / "onevecx.safetensors", {"<lonely>": vectors(1, 64, 2)})
    embedding_file(place / "wide.safetensors", {"emb_params": vectors(70, 64, 3)})
    embedding_file(place / "twinvec.safetensors", {"clip_l": vectors(2, 64, 4), "clip_g": vectors(2, 128, 5)})
    return place


@pytest.fixture(scope="module")
def small(folder: Path) -> Any:
    """A small SD 1.5 with the folder."""
    family = Sd15(sd15_pipeline(), SD15)
    family.offer_embeddings(EmbeddingFolder(folder))
    return family


@pytest.fixture(scope="module")
def large(folder: Path) -> Any:
    """A small SDXL with the folder."""
    family = Sdxl(sdxl_pipeline(), SDXL)
    family.offer_embeddings(EmbeddingFolder(folder))
    return family


def naming(family: Any, folder: Path, *names: str, **changes: Any) -> DiffusionRequest:
    """A request with the digests of some embeddings."""
    offered = EmbeddingFolder(folder)
    used = tuple((name, offered.read(name).digest) for name in names)
    return request_for(family.spec, weighted=True, embeddings=used, **changes)


def stock_of(family: Any, folder: Path, *names: str) -> Any:
    """The stock pipeline with copies of the text encoders, which its own loader makes larger."""
    parts = {**family.pipeline.components}
    parts |= {name: copy.deepcopy(parts[name]) for name in TEXTS if name in parts}
    extra = NO_CHECKER if "safety_checker" in parts else {"add_watermarker": False}
    stock = type(family.pipeline)(**parts, **extra)
    offered = EmbeddingFolder(folder)
    for name in names:
        found = offered.read(name).vectors
        for part, suffix in (("clip_l", ""), ("clip_g", "_2")):
            if part in found:
                tokenizer, encoder = getattr(stock, f"tokenizer{suffix}"), getattr(stock, f"text_encoder{suffix}")
                tensors = {name: torch.from_numpy(found[part])}
                stock.load_textual_inversion(tensors, token=name, tokenizer=tokenizer, text_encoder=encoder)
                # As published, SDXL's configuration has 2, which stands for the largest token: that of an embedding.
                getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
    return stock


@pytest.mark.parametrize("name", ["inkblot", "onevecx"])
@pytest.mark.parametrize("where", ["prompt", "negative_prompt"])
def test_an_sd15_embedding_draws_as_stock(small: Any, folder: Path, name: str, where: str) -> None:
    """In the prompt and in the negative one."""
    words = f"a red circle by {name}, on white"
    request = naming(small, folder, name, **{"negative_prompt": "sea", where: words})
    stock = stock_of(small, folder, name)
    drawn = draw(small, request)
    case = TinyCase("text", "sd15", "StableDiffusionPipeline")
    assert largest_difference(drawn, stock_picture(Sd15(stock, SD15), case, request)) <= 2
    assert largest_difference(drawn, draw(small, replace(request, embeddings=()))) > 2
    with torch.inference_mode():
        ours = small._encode(replace(request, guidance_scale=1.0, prompt=words)).embeds
        theirs, _ = stock.encode_prompt(words, "cpu", 1, do_classifier_free_guidance=False)
    assert float((ours - theirs).abs().max()) < 1e-4


def test_an_sdxl_pair_draws_as_stock(large: Any, folder: Path) -> None:
    """Each encoder has its own vectors, and the pooled vector is found behind them."""
    words = "a red circle by twinvec, on white"
    request = naming(large, folder, "twinvec", prompt=words, negative_prompt="sea")
    stock = stock_of(large, folder, "twinvec")
    case = TinyCase("text", "sdxl", "StableDiffusionXLPipeline")
    assert largest_difference(draw(large, request), stock_picture(Sdxl(stock, SDXL), case, request)) <= 2
    with torch.inference_mode():
        ours = large._encode(replace(request, guidance_scale=1.0))
        theirs, _, pooled, _ = stock.encode_prompt(words, device="cpu", do_classifier_free_guidance=False)
    assert float((ours.embeds - theirs).abs().max()) < 1e-4
    assert float((ours.added["text_embeds"] - pooled).abs().max()) < 1e-4
    assert largest_difference(draw(large, request), draw(large, replace(request, embeddings=()))) > 2


def test_prompt_2_may_name_an_embedding(large: Any, folder: Path) -> None:
    """Only the second encoder then reads it."""
    request = naming(large, folder, "twinvec", prompt="a circle", prompt_2="a circle by twinvec", guidance_scale=1.0)
    with torch.inference_mode():
        with_it, without = large._encode(request), large._encode(replace(request, embeddings=()))
    assert torch.equal(with_it.embeds[..., :64], without.embeds[..., :64])
    assert not torch.equal(with_it.embeds[..., 64:], without.embeds[..., 64:])


def test_all_vectors_have_the_weight_of_their_place(small: Any, folder: Path) -> None:
    """`(name:1.3)` multiplies what the encoder made of them, as of words, and keeps the mean."""
    plain = naming(small, folder, "inkblot", prompt="a inkblot circle", guidance_scale=1.0)
    with torch.inference_mode():
        one = small._encode(plain).embeds[0]
        heavy = small._encode(replace(plain, prompt="a (inkblot:1.3) circle")).embeds[0]
    wanted = one.clone()
    wanted[2:5] *= 1.3
    factor = float(one.mean() / wanted.mean())
    wanted = wanted * (factor if 0.5 <= factor <= 2 else 1)
    assert float((heavy - wanted).abs().max()) < 1e-4


def test_an_embedding_is_never_divided(small: Any, folder: Path) -> None:
    """70 vectors do not fit behind ten words, so the next chunk begins with them; behind five they fit."""
    with torch.inference_mode():
        for words, chunks in ((5, 1), (6, 2), (10, 2)):
            request = naming(small, folder, "wide", prompt="red " * words + "wide", guidance_scale=1.0)
            embeds = small._encode(request).embeds
            assert embeds.shape[1] == 77 * chunks, words
            if chunks == 2:
                alone = small._encode(replace(request, prompt="wide")).embeds
                assert torch.equal(embeds[:, 77:], alone)


def test_other_requests_stay_as_they_are(small: Any, folder: Path) -> None:
    """Weights, tokenizer, cache and batches: a request without the embedding equals its lone run before."""
    fresh = Sd15(sd15_pipeline(), SD15)
    without = request_for(SD15, prompt="a circle by inkblot", weighted=True, negative_prompt="onevecx")
    with_it = naming(small, folder, "inkblot", prompt="a circle by inkblot", negative_prompt="onevecx")
    before = draw(fresh, without)
    size = small.pipeline.text_encoder.get_input_embeddings().weight.shape
    assert np.array_equal(draw(small, without), before)
    alone = draw(small, with_it)
    assert np.array_equal(draw(small, without), before)
    one, other = draw_together(small, [with_it, without])
    assert largest_difference(one, alone) <= 2
    assert largest_difference(other, before) <= 2
    assert largest_difference(alone, before) > 2
    assert small.pipeline.text_encoder.get_input_embeddings().weight.shape == size


def test_two_threads_do_not_meet(small: Any, folder: Path) -> None:
    """Passes of one module in several threads: each has the vectors of its own request."""
    requests = [
        naming(small, folder, "inkblot", prompt="a circle by inkblot", guidance_scale=1.0),
        naming(small, folder, "onevecx", prompt="a circle by onevecx", guidance_scale=1.0),
        request_for(SD15, prompt="a circle by inkblot", weighted=True, guidance_scale=1.0),
    ]
    with torch.inference_mode():
        wanted = [small._encode(request).embeds for request in requests]
    found: list[list[torch.Tensor]] = [[], [], []]
    families = [Sd15(small.pipeline, SD15) for _ in requests]
    for family in families:
        family.prompt_cache.limit_bytes = 0
        family.offer_embeddings(EmbeddingFolder(folder))

    def run(number: int) -> None:
        with torch.inference_mode():
            for _ in range(10):
                found[number].append(families[number]._encode(requests[number]).embeds)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert len(found[number]) == 10
        assert all(float((embeds - wanted[number]).abs().max()) < 1e-5 for embeds in found[number])


def test_what_does_not_fit_is_words_with_a_warning(small: Any, large: Any, folder: Path) -> None:
    """An SDXL pair on SD 1.5, and one CLIP's vectors on SDXL."""
    for family, name in ((small, "twinvec"), (large, "inkblot")):
        request = naming(family, folder, name, prompt=f"a circle by {name}")
        with torch.inference_mode():
            found, plain = family._encode(request), family._encode(replace(request, embeddings=()))
        assert torch.equal(found.embeds, plain.embeds)
        assert any(name in warning for warning in found.warnings)
        assert not plain.warnings


def test_a_replaced_file_is_refused(small: Any, folder: Path) -> None:
    """As LoRAs are: the digest says which content the request means."""
    request = naming(small, folder, "inkblot", prompt="a circle by inkblot")
    with pytest.raises(InvalidInput, match="was replaced while the order waited"):
        small.prepare(replace(request, embeddings=(("inkblot", "0" * 16),)))
