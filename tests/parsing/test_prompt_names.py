"""Names in prompts: whole words, the longest first, in any case, with ComfyUI's mark."""

from __future__ import annotations

import time

import pytest

from stable_diffusion_server.parsing import NameIndex

NAMES = ["easynegative", "bad", "Bad-Hands-5", "bad hands", "verybad_v1.3", "foo (bar)", "\u0130x", "猫", "..."]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("by easynegative, sea", ["easynegative"]),
        ("easynegative", ["easynegative"]),
        ("EasyNegative,EASYNEGATIVE", ["easynegative", "easynegative"]),
        ("easynegatives, uneasynegative, easynegative_2, easynegative2", []),
        ("bad hands", ["bad hands"]),
        ("bad-hands-5", ["Bad-Hands-5"]),
        ("bad-hands-50", ["bad"]),
        ("a verybad_v1.3.", ["verybad_v1.3"]),
        ("foo (bar) baz", ["foo (bar)"]),
        ("embedding:bad", ["bad"]),
        ("EMBEDDING:Bad.PT", ["bad"]),
        ("embedding:easynegative.safetensors, embedding:unknown", ["easynegative"]),
        ("myembedding:bad", ["bad"]),
        ("\u0130X, a \u0130", ["\u0130x"]),
        ("a 猫, 猫猫", ["猫"]),
        ("..", []),
        ("", []),
    ],
)
def test_names_are_found_as_words(text: str, found: list[str]) -> None:
    """Letters, digits and underscores beside a name make it another word."""
    parts = NameIndex(NAMES).split(text)
    assert [part.name for part in parts if part.name] == found


def test_the_words_between_stay_as_they_are() -> None:
    """ComfyUI's mark and the ending of a file belong to the name; other words keep theirs."""
    index = NameIndex(NAMES)
    pieces = [part.text for part in index.split("A Sea, embedding:Bad.pt and myembedding:bad.pt")]
    assert pieces == ["A Sea, ", "Bad", " and myembedding:", "bad", ".pt"]
    assert [part.text for part in index.split("embedding:nothing")] == ["embedding:nothing"]
    assert [part.text for part in NameIndex().split("bad")] == ["bad"]


def test_a_thousand_names_cost_a_long_prompt_linear_time() -> None:
    """Also names that begin alike, of every length, that the prompt almost names."""
    index = NameIndex([*(f"style{number}" for number in range(1000)), *("a " * n + "b" for n in range(1, 50))])
    for text in ("a " * 16_000, "style1 " * 4_500, "style" * 6_400, "embedding:" * 3_200, "(" * 32_000):
        taken = []
        for size in (3_200, 32_000):
            began = time.thread_time()
            index.split(text[:size])
            taken.append(time.thread_time() - began)
        assert taken[1] < 40 * max(taken[0], 0.0005), (text[:10], taken)
