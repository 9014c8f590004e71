"""Computes the tables on memory of docs/models.md and README: `python -m scripts.memory_tables` writes the pages.

They come from the code that places models, with card sizes in place of the measured free memory; times are those of
the dated results. tests/pipelines/test_full_size.py compares them with the pages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.full_size import skeleton, write_configurations
from stable_diffusion_server.errors import ModelTooLarge
from stable_diffusion_server.pipelines import REAL_MODELS, ModelSpec
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import FileIdentity, Kind, ModelTask
from stable_diffusion_server.pipelines.loading.components import empty_pipeline
from stable_diffusion_server.pipelines.loading.footprint import Workload, architecture_of, dtype_of
from stable_diffusion_server.pipelines.loading.measurement import MeasuredModel, MemoryRoom
from stable_diffusion_server.pipelines.loading.placement import Placement, Quantization, Residency
from stable_diffusion_server.pipelines.loading.working_memory import Architecture

_ROOT = Path(__file__).resolve().parent.parent
PAGE, README = _ROOT / "docs" / "models.md", _ROOT / "README.md"
_H200 = _ROOT / "benchmarks" / "results" / "2026-11-26-gpu-h200.md"
START, END = "<!-- computed by scripts/memory_tables.py -->\n", "<!-- end -->\n"
START_FAMILIES = "<!-- families, computed by scripts/memory_tables.py -->\n"
SDXL, FLUX = REAL_MODELS["sdxl"][-1], REAL_MODELS["flux"][0]
# Rows by title, named as their skeletons.
FAMILIES = {
    title: replace(row, name=name, control_folder=None)
    for title, name, given in (
        ("SD 1.5", "sd15", {"families": ("sd15",)}),
        ("SDXL", "sdxl", {"families": ("sdxl",)}),
        ("FLUX.1 dev, Krea", "flux-dev", {"families": ("flux",), "variant": "dev"}),
        ("FLUX.1 Fill", "flux-fill", {"families": ("flux",), "variant": "fill", "task": ModelTask.FILL}),
        ("FLUX.1 Kontext", "flux-kontext", {"families": ("flux",), "variant": "kontext", "task": ModelTask.EDIT}),
        ("Stable Diffusion 3 medium", "sd3", {"families": ("sd3",)}),
        ("FLUX.2 klein 4B", "flux2", {"families": ("flux2",), "variant": "klein"}),
        ("FLUX.2 klein base 4B", "flux2", {"families": ("flux2",), "variant": "klein-base"}),
        ("Z-Image-Turbo", "z-image", {"families": ("z-image",), "variant": "turbo"}),
        ("Z-Image", "z-image", {"families": ("z-image",), "variant": "base"}),
        ("Qwen-Image (stock)", "qwen-image", {"pipeline_class": "QwenImagePipeline"}),
        ("Chroma (stock)", "chroma", {"pipeline_class": "ChromaPipeline"}),
        ("PixArt-Σ (stock)", "pixart-sigma", {"pipeline_class": "PixArtSigmaPipeline"}),
    )
    if (row := family_row(FileIdentity(Kind.PIPELINE, **given))) is not None  # type: ignore[arg-type]  # by name
}
CARDS = (80, 48, 40, 32, 24, 16, 12, 10, 8)
# The README's, the H200 first.
_FEW_CARDS = (141, 80, 48, 24, 16, 12, 8)
# MAX_SIDE and MAX_BATCH by default.
WORK = Workload(2048 * 2048, 8)
_CUDA = torch.device("cuda")
_GB = 10**9


def architecture(spec: ModelSpec, models_dir: Path) -> Architecture:
    """A model as it computes on an accelerator, with its ControlNet."""
    return architecture_of(spec, empty_pipeline(spec, models_dir), dtype_of(spec, _CUDA))


def placed(
    spec: ModelSpec, model: Architecture, card: int, *, beside: Placement | None = None, ram: int | None = None
) -> Placement | None:
    """Where a model is placed on a card of `card` GB, after another one was; `None` if it does not fit."""
    taken = 0 if beside is None else beside.needed - beside.turn
    room = MemoryRoom(card * _GB - taken, ram, 0 if beside is None else beside.turn)
    try:
        measured = MeasuredModel(spec, model).tiled(card * _GB, WORK, accelerated=True)
        return measured.place(room, WORK, accelerated=True)[0]
    except ModelTooLarge:
        return None


def tables(models: Mapping[str, Architecture]) -> str:
    """The tables as Markdown; `models` are the architectures of `sdxl` and `flux`."""
    return "\n".join([*_placements(models), "", *_work(models), "", *_machine(models), ""])


def cards(models: Mapping[str, Architecture]) -> str:
    """The README's table as Markdown: each model alone on a card, and the seconds of a picture where measured."""
    lines = ["| free memory | SDXL | FLUX.1-schnell | seconds, measured |", "| --- | --- | --- | --- |"]
    for card in _FEW_CARDS:
        cells = [_shown(placed(spec, models[spec.name], card)) for spec in (SDXL, FLUX)]
        times = "not measured"
        if card == _FEW_CARDS[0]:
            times = f"H200: SDXL {_seconds('sdxl'):.2f}, FLUX {_seconds('flux'):.2f}"
        lines.append(f"| {card} GB | {' | '.join(cells)} | {times} |")
    return "\n".join([*lines, ""])


def families() -> str:
    """The table of the families of `FAMILIES`, as Markdown: one image, references and both guided rows included."""
    cards = (24, 16, 12, 8)
    work = ("step at 1024²", "step at 2048²", "decode 1024²", "decode 2048²", "prompt")
    lines = [f"| family | weights | {' | '.join(work)} | {' | '.join(f'{card} GB' for card in cards)} |"]
    lines.append("| --- " * (len(lines[0].split("|")) - 2) + "|")
    for title, spec in FAMILIES.items():
        model = architecture_of(spec, skeleton(spec.name), dtype_of(spec, _CUDA))
        needs, rows = model.working_bytes, 2 if spec.takes_negative_prompt else 1
        encoders = [name for name in needs if name.startswith("text_encoder")]
        steps = [needs[spec.denoiser_part].of(rows * side * side, rows) for side in (1024, 2048)]
        others = [*(needs["vae"].of(side * side) for side in (1024, 2048)), max(needs[name].of(0) for name in encoders)]
        sizes = [f"{size / _GB:.2f} GB" for size in (*steps, *others)]
        places = [_shown(placed(spec, model, card)) for card in cards]
        lines.append(f"| {title} | {sum(model.bytes.values()) / _GB:.1f} GB | {' | '.join((*sizes, *places))} |")
    return "\n".join([*lines, ""])


def _seconds(family: str) -> float:
    """Seconds of one picture of 1024² alone with PERFORMANCE=fast, as measured."""
    section = _H200.read_text().partition(f"## {family},")[2].partition("PERFORMANCE=fast, seconds a picture\n")[2]
    row = next(line for line in section.splitlines() if line.startswith("| 1024 | 1 |"))
    return float(row.split("|")[3])


def _placements(models: Mapping[str, Architecture]) -> list[str]:
    lines = [
        "| free memory | SDXL alone | FLUX.1-schnell alone | SDXL first, then FLUX | FLUX first, then SDXL |",
        "| --- | --- | --- | --- | --- |",
    ]
    for card in CARDS:
        cells = []
        for order in ((SDXL,), (FLUX,), (SDXL, FLUX), (FLUX, SDXL)):
            first = placed(order[0], models[order[0].name], card)
            both = [first]
            if len(order) == 2 and first is not None:
                both.append(placed(order[1], models[order[1].name], card, beside=first))
            cells.append("; ".join(_shown(placement) for placement in both))
        lines.append(f"| {card} GB | {' | '.join(cells)} |")
    return lines


def _shown(placement: Placement | None) -> str:
    if placement is None:
        return "too large"
    int8 = "" if placement.quantization is Quantization.NONE else ", int8"
    return f"{placement.residency}{int8} ({placement.needed / _GB:.1f} GB)"


def _work(models: Mapping[str, Architecture]) -> list[str]:
    lines = ["| work | SDXL | FLUX.1-schnell |", "| --- | --- | --- |"]
    for side in (512, 1024, 2048):
        rows = [
            (f"decode or encode {side}²", "vae", "vae", 1),
            (f"a step at {side}², one image", "unet", "transformer", 1),
            *([(f"a step at {side}², 8 images", "unet", "transformer", 8)] if side == 1024 else []),
        ]
        for label, part, other, images in rows:
            cells = []
            for spec, name in ((SDXL, part), (FLUX, other)):
                halves = images * (2 if spec is SDXL and name == "unet" else 1)
                cells.append(f"{models[spec.name].working_bytes[name].of(halves * side * side, halves) / _GB:.2f} GB")
            lines.append(f"| {label} | {' | '.join(cells)} |")
    encoders = (f"{models[spec.name].working_bytes['text_encoder_2'].of(0) / _GB:.2f} GB" for spec in (SDXL, FLUX))
    lines.append(f"| a prompt, the larger text encoder | {' | '.join(encoders)} |")
    return lines


def _machine(models: Mapping[str, Architecture]) -> list[str]:
    lines = ["| weights | SDXL | FLUX.1-schnell |", "| --- | --- | --- |"]
    for label, residency, quantized in (
        ("on the device, int8", Residency.RESIDENT, True),
        ("model offload, int8", Residency.MODEL, True),
        ("model, group or sequential offload", Residency.GROUP, False),
    ):
        cells = []
        for spec in (SDXL, FLUX):
            footprint = MeasuredModel(spec, models[spec.name]).footprint(WORK)
            size = (footprint.shrunk() if quantized else footprint).on_host(residency, quantized=quantized)
            cells.append(f"{size / _GB:.1f} GB")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def page_with(text: str, page: Path = PAGE, start: str = START) -> str:
    """A page with other tables after the line `start`."""
    before, _, rest = page.read_text().partition(start)
    return f"{before}{start}{text}{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write the pages."""
    with tempfile.TemporaryDirectory() as folder:
        for spec in (SDXL, FLUX):
            write_configurations(Path(folder), spec)
        models = {spec.name: architecture(spec, Path(folder)) for spec in (SDXL, FLUX)}
    PAGE.write_text(page_with(tables(models)))
    PAGE.write_text(page_with(families(), start=START_FAMILIES))
    README.write_text(page_with(cards(models), README))


if __name__ == "__main__":
    main()
