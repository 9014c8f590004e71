"""AUTOMATIC1111's parameters text ("infotext"), which many tools read: written from a record, and parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stable_diffusion_server.imaging.unit_text import unit_pairs

# AUTOMATIC1111's names of our schedulers, and of the spacings of their steps.
SAMPLER_NAMES: Mapping[str, str] = {
    "euler": "Euler",
    "flow_euler": "Euler",
    "euler_a": "Euler a",
    "ddim": "DDIM",
    "lcm": "LCM",
    "dpm": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "heun": "Heun",
    "flow_heun": "Heun",
    "dpm_2m": "DPM++ 2M",
    "dpm_3m_sde": "DPM++ 3M SDE",
    "dpm_sde": "DPM++ SDE",
    "dpm_2s": "DPM++ 2S",
    "dpm_2s_a": "DPM++ 2S a",
    "deis": "DEIS",
    "lms": "LMS",
    "kdpm2": "DPM2",
    "kdpm2_a": "DPM2 a",
    "ddpm": "DDPM",
    "tcd": "TCD",
    "pndm": "PLMS",
    "er_sde": "ER SDE",
}
SCHEDULE_NAMES: Mapping[str, str] = {
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "trailing": "SGM Uniform",
    "ddim_uniform": "DDIM",
    "ays": "Align Your Steps",
}
# Its names of ways to enlarge latents, by ours.
LATENT_UPSCALERS: Mapping[str, str] = {
    "latent": "Latent",
    "latent-antialiased": "Latent (antialiased)",
    "latent-bicubic": "Latent (bicubic)",
    "latent-bicubic-antialiased": "Latent (bicubic antialiased)",
    "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)",
}
# Further options of a sampler, by AUTOMATIC1111's names.
_OPTION_NAMES: Mapping[str, str] = {
    "eta": "Eta",
    "s_churn": "Sigma churn",
    "s_tmin": "Sigma tmin",
    "s_tmax": "Sigma tmax",
    "s_noise": "Sigma noise",
    "subseed": "Variation seed",
    "subseed_strength": "Variation seed strength",
}
_NEGATIVE = "Negative prompt:"
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)
_NAME = re.compile(r"\w[\w /-]*")
# A last line with fewer pairs, unless it begins with the steps, belongs to the prompt.
_LEAST_PAIRS = 3
_LONGEST_NAME = 100
# Larger numbers in a record were not written by this server.
_LARGEST = 100_000
_SEEDS = 2**64


def parameters_text(record: Mapping[str, object]) -> str:
    """Return the record as AUTOMATIC1111 writes it: prompt with its LoRAs, negative prompt, and a line of parameters.

    `record` has the fields of a `DiffusionRequest`; `hires` in it has `from` (the size of the first pass), `to`,
    `steps` and `strength`, and what the second pass has of its own.
    """
    prompt = " ".join(
        [str(record.get("prompt", "")), *_lora_tags(record.get("loras"), record.get("lora_parts"))]
    ).strip()
    lines = [prompt]
    if record.get("negative_prompt"):
        lines.append(f"{_NEGATIVE} {record['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in _pairs(record)))
    return "\n".join(lines)


def parse_parameters(text: str) -> dict[str, str]:
    """Return the prompts and the parameters of a text, by AUTOMATIC1111's names; a size as `Size-1` and `Size-2`.

    Takes linear time for any text.
    """
    if not text.strip():
        return {}
    *lines, last = text.strip().split("\n")
    pairs = list(_read_pairs(last))
    if len(pairs) < _LEAST_PAIRS and not last.startswith("Steps:"):
        lines, pairs = [*lines, last], []
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    name = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            name, line = "Negative prompt", line.removeprefix(_NEGATIVE).strip()
        prompts[name].append(line)
    parsed = {name: "\n".join(parts) for name, parts in prompts.items()}
    for name, value in pairs:
        size = _SIZE.fullmatch(value)
        parsed.update({f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: value})
    return parsed


def _pairs(record: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Return the parameters in AUTOMATIC1111's order. The record may come from any file."""
    hires = record.get("hires")
    hires = hires if isinstance(hires, Mapping) and _is_size(hires.get("from")) and _is_size(hires.get("to")) else None
    scheduler, sampling = str(record.get("scheduler", "")), _sampling_of(record.get("sampling"))
    width, height = hires["from"] if hires else (record.get("width"), record.get("height"))
    values: dict[str, object] = {
        "Steps": record.get("num_inference_steps"),
        "Sampler": SAMPLER_NAMES.get(scheduler, scheduler) or None,
        "Schedule type": SCHEDULE_NAMES.get(str(sampling.get("schedule"))),
        "CFG scale": record.get("guidance_scale"),
        "Seed": record.get("seed"),
        "Size": f"{width}x{height}" if width is not None and height is not None else None,
        "Model hash": record.get("revision"),
        "Model": record.get("model"),
        "Denoising strength": record.get("strength") if record.get("image") is not None and not hires else None,
    }
    values |= {theirs: sampling.get(ours) for ours, theirs in _OPTION_NAMES.items()}
    values["TI hashes"] = _embedding_hashes(record.get("embeddings"))
    if record.get("controls"):
        values |= unit_pairs(record["controls"])
    yield from ((name, value) for name, value in values.items() if value is not None)
    if hires:
        yield from _hires_pairs(hires)


def _hires_pairs(hires: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    (width, height), (wide, high) = hires["from"], hires["to"]
    yield "Denoising strength", hires.get("strength")
    if wide * height == high * width:
        yield "Hires upscale", f"{wide / width:g}"
    else:
        yield "Hires resize", f"{wide}x{high}"
    yield "Hires steps", hires.get("steps")
    upscaler, scheduler, schedule = (hires.get(name) for name in ("upscaler", "scheduler", "schedule"))
    yield "Hires upscaler", "Lanczos" if upscaler is None else LATENT_UPSCALERS.get(str(upscaler), upscaler)
    own = {
        "Hires sampler": None if scheduler is None else SAMPLER_NAMES.get(str(scheduler), scheduler),
        "Hires schedule type": None if schedule is None else SCHEDULE_NAMES.get(str(schedule), "Automatic"),
        "Hires CFG Scale": hires.get("guidance_scale"),
        "Hires prompt": _hires_prompt(hires),
        "Hires negative prompt": hires.get("negative_prompt") or None,
    }
    yield from ((name, value) for name, value in own.items() if value is not None)


def _hires_prompt(hires: Mapping[str, Any]) -> str | None:
    """Return the prompt of the second pass with its LoRAs; `None` if it has none of its own."""
    prompt = hires.get("prompt")
    return None if prompt is None else " ".join([str(prompt), *_lora_tags(hires.get("loras"), None)]).strip()


def _sampling_of(pairs: object) -> Mapping[str, object]:
    """Return the options of the sampler in a record by name."""
    listed = pairs if isinstance(pairs, list | tuple) else ()
    found = {str(pair[0]): pair[1] for pair in listed if isinstance(pair, list | tuple) and len(pair) == 2}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, str) or _is_small(value) or (type(value) is int and 0 <= value < _SEEDS)
    }


def _embedding_hashes(embeddings: object) -> str | None:
    """Return names and digests of embeddings as one value."""
    pairs = embeddings if isinstance(embeddings, list | tuple) else ()
    hashes = [f"{pair[0]}: {str(pair[1])[:12]}" for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
    return ", ".join(hashes) or None


def _lora_tags(loras: object, parts: object) -> list[str]:
    pairs = loras if isinstance(loras, list | tuple) else ()
    by_part = parts if isinstance(parts, list | tuple) else ()
    texts = {pair[0]: pair[1] for pair in by_part if isinstance(pair, list | tuple) and len(pair) == 2}
    return [_lora_tag(pair[0], pair[1], str(texts.get(pair[0], ""))) for pair in pairs if _is_lora(pair)]


def _lora_tag(name: str, weight: float, parts: str) -> str:
    """Return a tag as AUTOMATIC1111 reads it: the weight in the text encoders, and in the denoiser if it is another."""
    encoders = next((part.removeprefix("te=") for part in parts.split(":") if part.startswith("te=")), None)
    blocks = [part for part in parts.split(":") if part.startswith("lbw=")]
    weights = [f"{weight:g}"] if encoders is None else [encoders, f"{weight:g}"]
    return f"<lora:{':'.join([name, *weights, *blocks])}>"


def _is_lora(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and _is_small(pair[1])


def _is_size(size: object) -> bool:
    return isinstance(size, list | tuple) and len(size) == 2 and all(_is_small(side) and side >= 1 for side in size)


def _is_small(number: object) -> bool:
    return isinstance(number, int | float) and abs(number) <= _LARGEST


def _quote(value: object) -> str:
    """Return a value as JSON text if it has characters that separate values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def _read_pairs(line: str) -> Iterator[tuple[str, str]]:
    """Split `Name: value, Name: "quoted, value"` into pairs; parts without a name are left out."""
    position = 0
    while position < len(line):
        colon = line.find(":", position)
        if colon < 0:
            return
        # Skips parts without a name in one search; a search from each comma would be quadratic.
        name = line[max(position, line.rfind(",", position, colon) + 1) : colon].strip()
        start = colon + 1
        while start < len(line) and line[start] == " ":
            start += 1
        value, position = _read_quoted(line, start) if line.startswith('"', start) else _read_plain(line, start)
        if len(name) <= _LONGEST_NAME and _NAME.fullmatch(name):
            yield name, value


def _read_plain(line: str, start: int) -> tuple[str, int]:
    """Return the value that begins at `start`, and where the next pair begins."""
    comma = line.find(",", start)
    end = len(line) if comma < 0 else comma
    return line[start:end].strip(), end + 1


def _read_quoted(line: str, start: int) -> tuple[str, int]:
    """Return the JSON text that begins at `start`, and where the next pair begins; unquoted if it does not end."""
    end = start + 1
    while end < len(line) and line[end] != '"':
        end += 2 if line[end] == "\\" else 1
    if end >= len(line):
        return _read_plain(line, start)
    try:
        value = json.loads(line[start : end + 1])
    except ValueError:
        value = line[start + 1 : end]
    comma = line.find(",", end)
    return str(value), len(line) if comma < 0 else comma + 1
