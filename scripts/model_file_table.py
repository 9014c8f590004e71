"""Writes docs/model-files.md: kinds of model files, what each is identified as, its difference to stock pipelines.

`python scripts/model_file_table.py`: writes small files with the original tensor names, loads and draws them, and lists
what an operator reads of broken ones. Takes minutes. Opens no socket.
"""

from __future__ import annotations

import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "pipelines")]

from drawing import draw, job_for, largest_difference  # noqa: E402  # found only by the path above
from file_kinds import BROKEN, LOADED, Kind  # noqa: E402  # the same

from stable_diffusion_server.errors import ModelLoadError  # noqa: E402  # the same
from stable_diffusion_server.pipelines import find_owned_models, identify  # noqa: E402  # the same
from stable_diffusion_server.pipelines.loading.components import load_pipeline  # noqa: E402  # the same

PAGE = ROOT / "docs" / "model-files.md"
_HEAD = """# Model files

Written by `python scripts/model_file_table.py` with small models of random weights and the original tensor names. The
difference is the largest of any pixel (0 to 255) to diffusers' stock pipeline with the weights of the file, three
steps at 128 × 128 on a CPU. `tests/pipelines/test_single_files.py` compares with pipelines that diffusers loads from
the same file.

## Kinds that are drawn

| file | identified as | difference |
| --- | --- | --- |
"""
_BROKEN = """
## Files that are refused

| file | what the log and `/readyz` say |
| --- | --- |
"""


def identified(path: Path) -> str:
    """What the library says of a file, from its header."""
    found = identify(path)
    facts = [
        found.kind.value,
        "/".join(found.families),
        found.variant,
        "" if found.task.value == "normal" else found.task.value,
        found.precision + (" scaled" if found.scaled else ""),
        found.prediction,
        "zero SNR" if found.zero_snr else "",
    ]
    return ", ".join(fact for fact in facts if fact)


def difference(kind: Kind, folder: Path) -> int:
    """The largest difference of a pixel between our image and the stock pipeline's."""
    built = kind.build(folder)
    spec = built.spec or find_owned_models(folder, (folder,)).specs[built.name]
    spec = replace(spec, dtype="float32", cpu_dtype="float32")  # as the stock pipeline's
    pipeline = load_pipeline(spec, folder, torch.device("cpu"))
    flux = hasattr(pipeline, "transformer")
    guidance = 3.5 if spec.takes_guidance else 0.0
    job = job_for(
        "flux" if flux else "sdxl",
        scheduler=spec.default_scheduler,
        guidance_scale=guidance,
        num_inference_steps=3,
        **built.job,
    )
    ours = draw(pkgutil.resolve_name(spec.family)(pipeline, spec), job)
    given: dict[str, Any] = {"max_sequence_length": spec.text_tokens} if flux else {}
    given |= {"guidance_rescale": spec.guidance_rescale} if spec.guidance_rescale else {}
    built.stock.set_progress_bar_config(disable=True)
    stock = built.stock(
        prompt=job.prompt,
        num_inference_steps=3,
        height=128,
        width=128,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(job.seed),
        **given,
        **built.stock_arguments,
    ).images[0]
    return largest_difference(ours, stock)


def sentence(build: Callable[[Path], Any], folder: Path) -> str:
    """What an operator reads of a broken file."""
    build(folder)
    found = find_owned_models(folder, (folder,))
    if found.refused:
        return " ".join(found.refused.values())
    sentences = []
    for spec in found.specs.values():
        try:
            load_pipeline(spec, folder, torch.device("cpu"))
        except ModelLoadError as error:
            sentences.append(error.detail)
    if not sentences:
        raise AssertionError(f"{build} is not refused")
    return " ".join(sentences)


def rows() -> Iterator[str]:
    """The page, line by line."""
    yield _HEAD
    for kind in LOADED:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            largest = difference(kind, folder)
            yield f"| {kind.title} | {identified(folder / kind.file)} | {largest} |\n"
    yield _BROKEN
    for title, build in BROKEN.items():
        with tempfile.TemporaryDirectory() as place:
            yield f"| {title} | {sentence(build, Path(place)).replace('|', '/')} |\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = []
    for line in rows():
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line)
    PAGE.write_text("".join(lines))
