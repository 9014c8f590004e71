"""The pipeline classes of the pinned diffusers: those that are drawn by their own call, and why others are not.

Read from a table that `scripts/pipeline_classes.py` makes, so that nothing here imports diffusers.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_diffusion_server.pipelines.call_parameters import SIMPLE, CallParameters
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import ExtraValue, Task

TABLE = Path(__file__).parent / "configs" / "pipeline_classes.json"
_TYPES = {kind.__name__: kind for kind in SIMPLE}
_WHY = {
    "video": "makes videos, and images are drawn here",
    "audio": "makes sound, and images are drawn here",
    "text": "writes text, and images are drawn here",
    "model": "makes shapes and not images",
    "map": "measures an image, and images are drawn here",
    "depth": "makes an image with its depth, and images alone are drawn here",
    "embeddings": "makes no image but what another class draws from; take the folder of the combined class",
    "stage": "draws from what another class makes; take the folder of the combined class",
    "layers": "makes several images at a time, and one is drawn here",
    "upscale": "enlarges or refines an image of another model, and images are drawn here",
    "variation": "needs an image in place of a prompt",
    "control": "needs a control image with each request, which stock classes are not given here",
    "silent": "does not call back after its steps, so that it could be neither shown nor stopped",
    "promptless": "takes no prompt",
    "onnx": "runs ONNX files, and weights in safetensors are read here",
    "broken": "cannot be used as shipped in this version of diffusers",
}
# Packages that a class imports and that are no dependencies here: class → package.
_PACKAGES = {
    "PRXPipeline": "ftfy",
    "PRXPixelPipeline": "ftfy",
    "OmniGenPipeline": "torchvision",
    "KolorsPipeline": "sentencepiece",
    "KolorsImg2ImgPipeline": "sentencepiece",
    "KolorsPAGPipeline": "sentencepiece",
    "Cosmos2TextToImagePipeline": "cosmos_guardrail",
}


@dataclass(frozen=True)
class StockClass:
    """A pipeline class that is drawn by its own call.

    `calls` says how it hands control back: `step_end` and `callback` are arguments, `blocks` those of a modular one.
    `denoiser` is its part that predicts the noise. `scaled` latents are the VAE's by its factor and shift. `tasks` are
    the classes that draw each task over its components. `defaults` are those of its arguments that are numbers, and
    `unused` the arguments of its constructor that judge or mark pictures. With a `guider`, guidance is a component and
    no argument.
    """

    name: str
    calls: str
    denoiser: str
    scaled: bool
    tasks: Mapping[Task, str]
    defaults: Mapping[str, float]
    unused: tuple[str, ...]
    guider: bool
    parameters: CallParameters

    @property
    def modular(self) -> bool:
        """Whether it is made of blocks."""
        return self.calls == "blocks"


@functools.cache
def _table() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(TABLE.read_text())
    return read


@functools.cache
def stock_class(name: str) -> StockClass | None:
    """What is known of a class; `None` for one that is not drawn by its own call."""
    facts = _table()["drawn"].get(name)
    if facts is None:
        return None
    types = {
        key: frozenset(_TYPES[one] for one in kinds.split("|") if one) for key, kinds in facts["parameters"].items()
    }
    return StockClass(
        name=name,
        calls=facts["calls"],
        denoiser=facts["denoiser"],
        scaled=facts["layout"] == "scaled",
        tasks={Task(task): kind for task, kind in facts["tasks"].items()},
        defaults=facts["defaults"],
        unused=tuple(facts["unused"]),
        guider=facts.get("guider", False),
        parameters=CallParameters.of(name, types, facts["defaults"]),
    )


def is_of_diffusers(name: str) -> bool:
    """Whether a pipeline class is listed, drawn or not."""
    return name in _table()["drawn"] or name in _table()["refused"]


def why_not_drawn(name: str) -> str:
    """Why a class of diffusers is not drawn, as the end of a sentence on it; empty for an unknown class."""
    package = _PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"needs the Python package {package}, which is not installed"
    why: str = _table()["refused"].get(name, "")
    kind, _, argument = why.partition(":")
    return f"needs {argument} with each request, which no request has here" if argument else _WHY.get(kind, "")


def check_class_extra(extra: Iterable[tuple[str, ExtraValue]], spec: ModelSpec, task: Task) -> None:
    """Raise `InvalidInput` naming each parameter that the class which draws a task does not take.

    Unknown classes and tasks are left to the family.
    """
    known = stock_class(spec.pipeline_class)
    drawing = known and stock_class(known.tasks.get(task, ""))
    if drawing:
        drawing.parameters.checked_extra(extra, spec)
