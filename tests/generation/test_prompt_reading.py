"""The syntax of a request's prompts: what a model is given, the key, and what is shortened and reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from service_harness import OPTIONS, order

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.executor import GenerationExecutor
from stable_diffusion_server.generation.prompt_fitting import shorten_weighted_text
from stable_diffusion_server.generation.prompts import BUILTIN_STOP_WORDS, shorten_too_long_text
from stable_diffusion_server.generation.provenance import requested_fields
from stable_diffusion_server.generation.replay import _request_of
from stable_diffusion_server.generation.resolver import ResolvedRequest, resolve_request
from stable_diffusion_server.parsing import parse_weights
from stable_diffusion_server.pipelines import MODELS
from stable_diffusion_server.types import (
    DiffusionRequest,
    GenerationRequest,
    PromptSyntax,
    Task,
    diffusion_request_fields,
)

PLAIN, A1111, COMPEL = PromptSyntax.PLAIN, PromptSyntax.A1111, PromptSyntax.COMPEL


def resolved(prompt: str, **more: Any) -> ResolvedRequest:
    return resolve_request(order(prompt, **more), OPTIONS)


def count_words(text: str) -> int:
    return len(text.split()) + 2


@pytest.mark.parametrize(
    ("prompt", "more", "key"),
    [
        ("a red square", {}, "6b0ca100a15b8e34b649235f1e5a2758"),
        ("a red square", {"prompt_syntax": A1111}, "6b0ca100a15b8e34b649235f1e5a2758"),
        ("a red square", {"negative_prompt": "blue", "seed": 5}, "97ccb5ccd68f1e11b80a2d076eed5265"),
        ("a red square, 16:9 | wide", {"model": "flux"}, "79a262c889a4ceb1fa34b5eef58207cf"),
        ("a (red:1.3) square", {"prompt_syntax": PLAIN}, "0611e505f95860aedcfbe3728678cdd4"),
        ("a red square", {"clip_skip": 0}, "6b0ca100a15b8e34b649235f1e5a2758"),
    ],
)
def test_pictures_of_earlier_versions_are_found(prompt: str, more: dict[str, Any], key: str) -> None:
    """Keys that version 1 without prompt syntax gave to what is drawn as it was then."""
    assert resolved(prompt, **more).key == f"static/uploads/{key}.webp"


def test_what_is_drawn_differently_has_another_key() -> None:
    """Weights, schedules, BREAK, a long prompt and clip skip; of one picture there is one key."""
    long = "red " * 80
    for prompt in ("a (red:1.3) square", "a [red:blue:0.5] square", "a red BREAK square", "\\(red\\) square", long):
        read, plain = (resolved(prompt, prompt_syntax=syntax).key for syntax in (None, PLAIN))
        assert read != plain, prompt
        assert read == resolved(prompt, prompt_syntax=A1111).key
    assert resolved("a red square", clip_skip=1).key != resolved("a red square").key
    assert resolved("a (red)1.3 square", prompt_syntax=COMPEL).key == resolved("a (red:1.3) square").key
    assert (
        resolved("a", negative_prompt="(b:1.2)").key
        != resolved("a", negative_prompt="(b:1.2)", prompt_syntax=PLAIN).key
    )


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a (red:1.4) [[square]]", "a red square"),
        ("a red BREAK square", "a red square"),
        ("a [blue:red:0.2] square", "a red square"),
        ("a [red|blue] square", "a red square"),
        ("\\(red\\) square", "(red) square"),
        ("a red square, 16:9 | wide", "a red square, 16:9 | wide"),
    ],
)
def test_plain_models_read_the_words_and_it_is_reported(prompt: str, words: str) -> None:
    """FLUX.1 by default; its key is that of the words."""
    read = resolved(prompt, model="flux", num_inference_steps=4)
    assert read.parameters.prompt == words
    assert read.parameters.prompt_syntax is PLAIN
    codes = [warning.code for warning in read.parameters.warnings]
    assert codes == (["prompt-syntax"] if words != prompt else [])
    assert read.key == resolved(words, model="flux", num_inference_steps=4, prompt_syntax=PLAIN).key
    kept = resolved(prompt, model="flux", prompt_syntax=PLAIN)
    assert (kept.parameters.prompt, kept.parameters.warnings) == (prompt, ())


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red)1.3 circle", [("a ", 1), ("red", 1.3), (" circle", 1)]),
        ("a red++ circle-", [("a ", 1), ("red", 1.21), (" ", 1), ("circle", 0.9)]),
        ("(a (red)2)--", [("a ", 0.81), ("red", 1.62)]),
        ("(a red) circle, photo-realistic :-) [x]", [("a red circle, photo-realistic :-) [x]", 1)]),
        ("(red:1.3) (open", [("red:1.3 (open", 1)]),
        ("\\(red\\)1.3", [("(red)1.3", 1)]),
    ],
)
def test_compel_weights_are_translated(prompt: str, parts: list[tuple[str, float]]) -> None:
    """Numbers and signs behind brackets and words; AUTOMATIC1111's own syntax is text there."""
    found = parse_weights(resolved(prompt, prompt_syntax=COMPEL).parameters.prompt)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts], rel=1e-4)


def test_functions_of_compel_are_reported() -> None:
    """They are read as text."""
    warnings = resolved('("a cat", "a dog").blend(0.5, 0.5)', prompt_syntax=COMPEL).parameters.warnings
    assert [warning.code for warning in warnings] == ["prompt-syntax"]


def test_clip_skip_is_refused_where_there_is_no_layer_to_leave_out() -> None:
    """And out of its bounds."""
    with pytest.raises(InvalidInput, match="no CLIP whose layers"):
        resolved("a", model="flux", clip_skip=1)
    with pytest.raises(InvalidInput, match="clip_skip must be between 0 and 11"):
        resolved("a", clip_skip=12)


def test_a_second_prompt_is_for_models_with_a_second_encoder() -> None:
    """It is bounded, cleaned and part of the key; equal to the first prompt it is as if it were not there."""
    plain = resolved("a red square", model="sdxl")
    assert resolved("a red square", model="sdxl", prompt_2=" a red  square ").key == plain.key
    second = resolved("a red square", model="sdxl", prompt_2="a\u202e star")
    assert second.parameters.prompt_2 == "a star"
    assert second.key != plain.key
    assert not second.parameters.is_marked
    assert resolved("a red square", model="sdxl", prompt_2="(star:1.2)").parameters.is_marked
    assert resolved("a", model="flux", prompt_2="(star:1.2)").parameters.prompt_2 == "star"
    options = replace(OPTIONS, models={"sdxl": replace(MODELS["sdxl"], takes_prompt_2=False)})
    with pytest.raises(InvalidInput, match="no second text encoder") as caught:
        resolve_request(GenerationRequest(Task.TEXT_TO_IMAGE, "a", model="sdxl", prompt_2="b"), options)
    assert caught.value.field == "prompt_2"
    with pytest.raises(InvalidInput, match="prompt_2 must not be longer"):
        resolved("a", model="sdxl", prompt_2="x" * 100_000)


def test_an_empty_negative_prompt_can_be_asked_for() -> None:
    """SDXL draws otherwise with one than with none, also where its owner has another one; other models do not."""
    none, empty = resolved("a", model="sdxl"), resolved("a", model="sdxl", negative_prompt=" ")
    assert (none.parameters.negative_prompt, empty.parameters.negative_prompt) == (None, "")
    assert none.key != empty.key
    assert resolved("a", model="sdxl", negative_prompt="", guidance_scale=1.0).parameters.negative_prompt is None
    assert resolved("a", model="flux", negative_prompt="").parameters.negative_prompt is None
    owned = replace(OPTIONS, models={"sdxl": replace(MODELS["sdxl"], default_negative_prompt="blur")})
    asked = GenerationRequest(Task.TEXT_TO_IMAGE, "a", model="sdxl")
    assert resolve_request(asked, owned).parameters.negative_prompt == "blur"
    assert resolve_request(replace(asked, negative_prompt=""), owned).parameters.negative_prompt == ""
    plain = replace(OPTIONS, models={"sdxl": replace(MODELS["sdxl"], reads_empty_negative=False)})
    assert resolve_request(replace(asked, negative_prompt=""), plain).key == resolve_request(asked, plain).key
    again = _request_of(requested_fields(empty))
    assert again.negative_prompt == ""


def test_a_replay_reads_a_prompt_as_it_was_read() -> None:
    """Metadata without the field are those of plain text, also by earlier versions; others say how they were read."""
    for syntax in (None, PLAIN, COMPEL):
        for prompt, model in (
            ("a (red)1.3 \\(square\\)", "sdxl"),
            ("a (red:1.3) \\(square\\)", "flux"),
            ("a red", "sdxl"),
        ):
            first = resolved(
                prompt, model=model, prompt_syntax=syntax, seed=5, clip_skip=1 if model == "sdxl" else None
            )
            again = resolve_request(replace(_request_of(requested_fields(first)), save_path=None), OPTIONS)
            assert again.content_digest == first.content_digest, (prompt, syntax)
    old = {name: value for name, value in requested_fields(resolved("a (red:1.3)")).items() if name != "prompt_syntax"}
    assert _request_of(old).prompt_syntax is PLAIN


def job(prompt: str, negative: str | None = None, *, weighted: bool = False) -> DiffusionRequest:
    return DiffusionRequest(
        Task.TEXT_TO_IMAGE, "sdxl", "r", prompt, negative, 64, 64, 1, 4, 2.0, "euler", weighted=weighted
    )


def test_a_long_prompt_is_read_in_chunks() -> None:
    """In AUTOMATIC1111's syntax; otherwise it is shortened to one chunk."""
    executor = GenerationExecutor(None, lambda model, text: count_words(text), OPTIONS)  # type: ignore[arg-type]  # unused
    words = " ".join(f"word{number}" for number in range(200))
    for prompt, negative in ((words, None), ("a", words)):
        fitted = executor.fit_prompts(job(prompt, negative), resolved("a"))
        assert fitted == job(prompt, negative, weighted=True)
        plain = executor.fit_prompts(job(prompt, negative), resolved("a", prompt_syntax=PLAIN))
        assert not plain.weighted
        assert len((plain.negative_prompt or plain.prompt).split()) == 75
    assert executor.fit_prompts(job("a red square"), resolved("a")) == job("a red square")
    assert "weighted" not in diffusion_request_fields(job("a"))
    assert diffusion_request_fields(job("a", weighted=True))["weighted"] is True


def test_a_weighted_prompt_keeps_its_weights_when_it_is_shortened() -> None:
    """Stop words go, then whole words from the end; the weights of the rest are what they were."""
    prompt = "a (very (red:1.5) and blue:1.2) square \\(dark\\) BREAK " + "details, " * 700
    short = shorten_weighted_text(prompt, 4, count_words, BUILTIN_STOP_WORDS)
    parts = parse_weights(short)
    assert [(part.text.strip(), round(part.weight, 6)) for part in parts[:4]] == [
        ("red", 1.8),
        ("blue", 1.2),
        ("square (dark)", 1.0),
        ("BREAK", 1.0),
    ]
    assert len(parts[4].text.split()) == 525
    assert shorten_weighted_text("a (red:1.5) square", 4, count_words, BUILTIN_STOP_WORDS) == "a (red:1.5) square"
    assert len(parse_weights(shorten_weighted_text("a BREAK " * 1000, 4, count_words, BUILTIN_STOP_WORDS))) <= 16


@pytest.mark.parametrize(
    ("prompt", "shortened"),
    [
        ("a beach without people, no text, not blurry, at dawn", "beach without people, no text, not blurry,"),
        ("the cat and nothing but the cat on a mat", "cat nothing but cat mat"),
        ("a room with the lights off in the night at home", "room lights off night home"),
        ("all of a red house and only few trees by the sea", "red house only few trees sea"),
        ("one red big old house without", "one red big old house"),
        ("one red big old small green house no people", "one red big old small green house"),
    ],
)
def test_shortening_never_turns_a_prompt_into_its_opposite(prompt: str, shortened: str) -> None:
    """Words that exclude stay with what they exclude, or go with it."""
    assert shorten_too_long_text(prompt, min(count_words(prompt) - 1, 9), count_words) == shortened
