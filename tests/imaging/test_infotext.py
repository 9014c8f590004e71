"""AUTOMATIC1111's parameters text: written as it writes it, and read back, whatever it holds."""

from __future__ import annotations

from typing import Any

import pytest

from stable_diffusion_server.imaging import parameters_text, parse_parameters

RECORD: dict[str, Any] = {
    "prompt": "a red square, on blue",
    "negative_prompt": "blur",
    "num_inference_steps": 4,
    "scheduler": "euler_a",
    "guidance_scale": 2.0,
    "seed": 7,
    "width": 128,
    "height": 64,
    "model": "sdxl",
    "revision": "1a2b",
    "loras": [["ink", 0.5]],
}


def test_a_record_is_written_in_its_order_and_spelling() -> None:
    """Prompt with LoRAs, negative prompt, and the parameters in one line."""
    assert parameters_text(RECORD) == (
        "a red square, on blue <lora:ink:0.5>\nNegative prompt: blur\n"
        "Steps: 4, Sampler: Euler a, CFG scale: 2.0, Seed: 7, Size: 128x64, Model hash: 1a2b, Model: sdxl"
    )


def test_values_with_separators_are_quoted_and_read_whole() -> None:
    """As JSON texts; a size is read as two numbers."""
    read = parse_parameters(parameters_text({**RECORD, "model": 'a, b: "c"', "image": "1", "strength": 0.5}))
    assert (read["Model"], read["Size-1"], read["Size-2"]) == ('a, b: "c"', "128", "64")
    assert (read["Denoising strength"], read["Negative prompt"]) == ("0.5", "blur")


def test_a_text_of_another_server_is_read() -> None:
    """Several lines of both prompts, quoted values, and a last line that belongs to the prompt."""
    read = parse_parameters(
        "x\ny\nNegative prompt: b\nc\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, "
        'Lora hashes: "a: b, c: d", Hires resize: 512x768, Version: v1.9'
    )
    assert (read["Prompt"], read["Negative prompt"]) == ("x\ny", "b\nc")
    assert (read["Lora hashes"], read["Hires resize-2"], read["Version"]) == ("a: b, c: d", "768", "v1.9")
    assert parse_parameters("a cat: black, and white") == {"Prompt": "a cat: black, and white", "Negative prompt": ""}
    assert parse_parameters(" ") == {}


@pytest.mark.parametrize(
    "change",
    [
        {"hires": 5},
        {"hires": {}},
        {"hires": {"from": [0, 1], "to": [1, 1]}},
        {"hires": {"from": ["1", 1], "to": [1, 1]}},
        {"hires": {"from": [10**400, 1], "to": [1, 1]}},
        {"loras": 7},
        {"loras": [[]]},
        {"loras": [["a", 10**400]]},
        {"loras": [["a", "b"]]},
        {"scheduler": {"a": 1}},
        {"prompt": None},
    ],
)
def test_a_record_of_a_stranger_is_written_without_failing(change: dict[str, Any]) -> None:
    """A file may hold any JSON as its record."""
    assert "Seed: 7" in parameters_text({**RECORD, **change})


def test_separators_without_a_name_are_skipped() -> None:
    """Hundreds of thousands of them, too; tests/parsing measures that their number counts once."""
    read = parse_parameters("a square\nSteps: 1, Seed: 5, " + "," * 390_000 + "CFG scale: 2")
    assert (read["Steps"], read["Seed"], read["CFG scale"]) == ("1", "5", "2")
