"""Prompts with AUTOMATIC1111's weights: embeddings against a slow reference, pictures against unweighted ones."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import sd15_pipeline
from drawing import draw, draw_together, job_for, largest_difference, psnr
from single_file_specs import sd15_spec
from tiny_oracles import request_for

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.families.sd15 import Sd15
from stable_diffusion_server.pipelines.model_spec import CHUNK_TOKENS, MOST_CHUNKS
from training.image_checker import look, nearest_colour

pytestmark = pytest.mark.slow

LONG = ", ".join(f"a red circle number {number} on the left of a blue square" for number in range(24))
PROMPTS = [
    "a red circle on a white background",
    *("a (red) circle", "a [red] circle", "a (red:1.4) circle", "a (red:0.3) circle", "a (red:0) circle"),
    *("((red)) circle", "(((red))) [[circle]]", "a ((red:1.2) circle:0.8)", "(a (big (red:1.5) circle):1.1) on white"),
    *(
        "\\(red\\) circle",
        "a \\[red\\] (circle:1.2)",
        "a \\\\ (red:1.3)",
        "\\(red:1.3\\)",
        "(red \\(dark\\):1.3) circle",
    ),
    *("a BREAK b", "red circle BREAK blue square BREAK green star", "(red BREAK blue:1.3)", "BREAK red", "BREAKFAST"),
    *(LONG, f"({LONG}:1.2)", LONG.replace(", ", " "), f"{LONG} BREAK (end:1.3)", "red, " * 100, "circle " * 151),
    *("\U0001f534 (\U0001f535:1.3) \U0001f469\u200d\U0001f680", "(日本:1.2) é", "\u05d0\u05d1 (\u05d2:0.7)"),
    *("(red circle", "((red circle", "red) circle", "red:1.3) circle", "[red circle", "red] (circle", "(a [b) c]"),
    *("(red:1,3)", "(red:)", "(:1.3)", "()", "16:9 ratio, (16:9)", "(red:1.2.3) circle", ""),
    *("red  circle", "(red :1.3) circle", "(red: 1.3 ) circle", "a (red:99) circle", "a (red:-1) circle"),
]


def reference_parts(prompt: str) -> list[list[Any]]:
    """AUTOMATIC1111's definition: each bracket multiplies the weight of everything since it was opened."""
    parts: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for part in parts[start:]:
            part[1] *= factor

    for match in re.finditer(r"\\[()\[\]\\:]|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|.", prompt, re.DOTALL):
        found = match[0]
        if found in opened:
            opened[found].append(len(parts))
        elif match[1] and opened["("]:
            multiply(opened["("].pop(), float(match[1]) if match[1].count(".") < 2 else 1)
        elif found == ")" and opened["("]:
            multiply(opened["("].pop(), 1.1)
        elif found == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / 1.1)
        else:
            text = found[1] if found[0] == "\\" and len(found) == 2 else found
            for number, piece in enumerate(re.split(r"\s*\bBREAK\b\s*", text)):
                parts += [["BREAK", float("nan")]] if number else []
                parts += [[piece, 1.0]] if piece else []

    for kind, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for start in opened[kind]:
            multiply(start, factor)
    joined: list[list[Any]] = []
    for text, weight in parts:
        if text == "BREAK":
            joined.append([text, None])
        elif joined and joined[-1][1] == min(max(weight, 0), 10):
            joined[-1][0] += text
        else:
            joined.append([text, min(max(weight, 0), 10)])
    return joined


def reference_embeds(prompt: str, tokenizer: Any, network: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk after the other, one number after the other."""
    comma = tokenizer(",", add_special_tokens=False).input_ids[0]
    chunks: list[list[tuple[int, float]]] = [[]]
    for text, weight in reference_parts(prompt):
        if text == "BREAK":
            chunks.append([])
            continue
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            last = chunks[-1]
            commas = [place for place, (known, _) in enumerate(last) if known == comma]
            if len(last) == 75 and token != comma and commas and 75 - commas[-1] <= 20:
                chunks[-1:] = [last[: commas[-1] + 1], last[commas[-1] + 1 :]]
            if len(chunks[-1]) == 75:
                chunks.append([])
            chunks[-1].append((token, weight))
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()
    embeds, pooled = [], []
    for chunk in chunks:
        padding = [tokenizer.pad_token_id] * (75 - len(chunk))
        row = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id, *padding]
        found = network(torch.tensor([row]), output_hidden_states=True)
        plain, changed = found.hidden_states[-2][0], found.hidden_states[-2][0].clone()
        for place, (_, weight) in enumerate(chunk, 1):
            changed[place] = changed[place] * weight
        factor = float(plain.mean() / changed.mean())
        embeds.append(changed * factor if any(weight != 1 for _, weight in chunk) and 0.5 <= factor <= 2 else changed)
        pooled.append(getattr(found, "text_embeds", None))
    return torch.cat(embeds)[None], pooled[0]


@pytest.fixture(scope="module")
def small() -> Any:
    """A small SD 1.5."""
    return sd15_pipeline()


def test_embeddings_equal_the_reference(sdxl: Any) -> None:
    """Nesting, escapes, BREAK, 300 tokens, emoji, unbalanced brackets; pooled is that of the first chunk."""
    assert len(PROMPTS) >= 40
    pipe = sdxl.pipeline
    with torch.inference_mode():
        for prompt in PROMPTS:
            ours = sdxl._encode(job_for("sdxl", prompt=prompt, weighted=True, guidance_scale=1.0))
            pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
            (first, _), (second, pooled) = (reference_embeds(prompt, *pair) for pair in pairs)
            wanted = torch.cat([first, second], -1)
            assert ours.embeds.shape == wanted.shape, prompt
            assert float((ours.embeds - wanted).abs().max()) < 1e-4, prompt
            assert float((ours.added["text_embeds"] - pooled).abs().max()) < 1e-4, prompt


def test_plain_prompts_equal_the_stock_encoder(sdxl: Any, small: Any) -> None:
    """Bit for bit, with and without a negative prompt, so that reading in chunks changes no picture."""
    sd15 = Sd15(small, sd15_spec(("denoiser", "model.safetensors")))
    with torch.inference_mode():
        for negative in (None, "a blue star"):
            for family, job in (
                (sdxl, job_for("sdxl", negative_prompt=negative)),
                (sd15, request_for(sd15.spec, negative_prompt=negative)),
            ):
                stock, ours = family._encode(job), family._encode(replace(job, weighted=True))
                assert torch.equal(stock.embeds, ours.embeds)
                assert all(torch.equal(stock.added[name], ours.added[name]) for name in stock.added)


def test_the_second_encoder_reads_prompt_2(sdxl: Any) -> None:
    """With its weights and its changes by step; the first encoder and the negative row do not see it."""

    def encoded(**changes: Any) -> Any:
        return sdxl._encode(job_for("sdxl", weighted=True, negative_prompt="a blue star", **changes))

    width = sdxl.pipeline.text_encoder.config.hidden_size
    with torch.inference_mode():
        one, other = (encoded(prompt=text) for text in ("a (red:1.3) circle", "a [green:blue:2] (star:0.7)"))
        both = encoded(prompt="a (red:1.3) circle", prompt_2="a [green:blue:2] (star:0.7)")
    assert torch.equal(both.embeds[1, :, :width], one.embeds[1, :, :width])
    assert torch.equal(both.embeds[1, :, width:], other.embeds[1, :, width:])
    assert torch.equal(both.embeds[0], one.embeds[0])
    assert torch.equal(both.added["text_embeds"][1], other.added["text_embeds"][1])
    ((start, later),) = both.later
    assert start == other.later[0][0]
    assert torch.equal(later.embeds[1, :, :width], one.embeds[1, :, :width])
    assert torch.equal(later.embeds[1, :, width:], other.later[0][1].embeds[1, :, width:])


def test_the_shorter_prompt_is_padded_with_empty_chunks(sdxl: Any) -> None:
    """Both rows have as many chunks; the weights of the shorter one do not change with its padding."""
    with torch.inference_mode():
        alone = sdxl._encode(job_for("sdxl", prompt="a (red:1.3) circle", weighted=True, guidance_scale=1.0)).embeds
        empty = sdxl._encode(job_for("sdxl", prompt="", weighted=True, guidance_scale=1.0)).embeds
        both = sdxl._encode(job_for("sdxl", prompt="a (red:1.3) circle", negative_prompt=LONG, weighted=True)).embeds
    chunks = both.shape[1] // alone.shape[1]
    assert chunks >= 4
    assert torch.equal(both[1:], torch.cat([alone, *[empty] * (chunks - 1)], dim=1))


def test_jobs_share_a_pass_only_with_as_many_chunks(sdxl: Any) -> None:
    """The number of chunks is part of the shape; those of equal number draw in a batch what they draw alone."""
    one = job_for("sdxl", prompt="a (red:1.3) circle", weighted=True, seed=1)
    long = [job_for("sdxl", prompt=f"{LONG}, (blue:1.2) star {seed}", weighted=True, seed=seed) for seed in (2, 3)]
    plain = job_for("sdxl", seed=4)
    shapes = [sdxl.prepare(job).shape for job in (one, *long, plain)]
    assert shapes[0] == shapes[3] != shapes[1] == shapes[2]
    for jobs in (long, [one, plain]):
        together = draw_together(sdxl, jobs)
        assert all(psnr(mixed, draw(sdxl, job)) >= 45 for mixed, job in zip(together, jobs, strict=True))


def test_what_is_over_the_most_chunks_is_reported(sdxl: Any) -> None:
    """Also many BREAKs, which make a chunk each."""
    for prompt in ("red circle, " * 400, "a BREAK " * 50):
        state = sdxl.prepare(job_for("sdxl", prompt=prompt, weighted=True))
        assert state.conditioning.embeds.shape[1] == MOST_CHUNKS * (CHUNK_TOKENS + 2)
        assert state.warnings == ("A prompt has more than 8 chunks of 75 tokens; the rest is not read.",)
    assert sdxl.prepare(job_for("sdxl", prompt=LONG, weighted=True)).warnings == ()


def test_a_schedule_changes_what_is_drawn_at_its_step(sdxl: Any) -> None:
    """Each range of steps has the conditioning of its text; the picture becomes the later one's."""
    words = "a {} circle on a white background"
    job = job_for("sdxl", prompt=words.format("[red:blue:0.25]"), weighted=True, seed=3)
    both = [job_for("sdxl", prompt=words.format(colour), weighted=True, seed=3) for colour in ("red", "blue")]
    with torch.inference_mode():
        found = sdxl._encode(job)
        texts = [sdxl._encode(each) for each in both]
    assert [start for start, _ in found.later] == [1]
    for step, text in enumerate([texts[0], *[texts[1]] * 3]):
        assert torch.equal(found.at(step).embeds, text.embeds)
        assert torch.equal(found.at(step).added["text_embeds"], text.added["text_embeds"])
    drawn = draw(sdxl, job)
    assert nearest_colour(drawn[48:80, 48:80].reshape(-1, 3).mean(0)) == "blue"
    assert largest_difference(drawn, draw(sdxl, both[1])) > 2
    assert psnr(draw_together(sdxl, [job, *both])[0], drawn) >= 45
    alternating = sdxl.prepare(replace(job, prompt="[red|blue] circle"))
    assert [start for start, _ in alternating.conditioning.later] == [1, 2, 3]


def test_too_many_texts_become_one(sdxl: Any) -> None:
    """The memory of a schedule is bounded, and the caller hears of it."""
    options = "|".join(f"red {number}" for number in range(30))
    state = sdxl.prepare(job_for("sdxl", prompt=f"[{options}] circle", weighted=True, num_inference_steps=40))
    assert state.conditioning.later == ()
    assert "more than 16 texts" in state.warnings[0]


def test_clip_skip_of_a_request(small: Any, sdxl: Any) -> None:
    """Equals that of a spec, counts for the negative prompt too, and is bounded."""
    spec = sd15_spec(("denoiser", "model.safetensors"))
    request = request_for(spec, negative_prompt="sea")
    with torch.inference_mode():
        of_spec = Sd15(small, replace(spec, clip_skip=1))._encode(request).embeds
        of_request = Sd15(small, spec)._encode(replace(request, clip_skip=1)).embeds
        usual = Sd15(small, spec)._encode(request).embeds
    assert torch.equal(of_spec[1], of_request[1])
    assert not torch.equal(usual[0], of_request[0])
    skipped, plain = (draw(sdxl, job_for("sdxl", seed=3, **more)) for more in ({"clip_skip": 1}, {}))
    assert largest_difference(skipped, plain) > 2
    with pytest.raises(InvalidInput, match="at most 2 layers"):
        sdxl.prepare(job_for("sdxl", clip_skip=3))


def test_a_weighted_colour_stays_the_colour_of_one_thing(sdxl: Any) -> None:
    """A (red:1.4) circle is what a red circle is; read as words, the brackets would change it."""
    for seed, colour in enumerate(("red", "blue")):
        prompts = (f"a {words} circle on a white background" for words in (colour, f"({colour}:1.4)"))
        jobs = [job_for("sdxl", prompt=prompt, weighted=True, seed=seed, width=192, height=192) for prompt in prompts]
        drawn = [draw(sdxl, job) for job in jobs]
        plain, weighted = ([(thing.shape, thing.colour) for thing in look(picture)[1]] for picture in drawn)
        assert weighted == plain
        assert [found for _, found in weighted] == [colour]
