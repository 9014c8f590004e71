"""Counts what the shipped and the published architectures need beside their weights.

`python -m scripts.count_memory` writes stable_diffusion_server/pipelines/loading/configs/working_memory.json, which
tests/pipelines/test_full_size.py and tests/pipelines/test_working_memory.py compare with counts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.full_size import skeleton, write_configurations
from scripts.memory_tables import FAMILIES
from stable_diffusion_server.pipelines import MODELS, REAL_MODELS
from stable_diffusion_server.pipelines.loading.components import empty_pipeline
from stable_diffusion_server.pipelines.loading.footprint import architecture_of, dtype_of
from stable_diffusion_server.pipelines.loading.working_memory import TABLE, Architecture

_MODELS_DIR = Path(__file__).resolve().parent.parent / "models"
# In half precision on an accelerator; on the CPU also in fp32.
_DTYPES = (torch.float16, torch.float32)


def architectures(folder: Path) -> Iterator[Architecture]:
    """The embedded and the published models, with and without ControlNet, by dtype; `folder` is for configurations."""
    for spec in MODELS.values():
        parts = empty_pipeline(spec, _MODELS_DIR)
        plain = {name: part for name, part in parts.items() if name != "control"}
        yield from (architecture_of(spec, some, dtype) for some in (parts, plain) for dtype in _DTYPES)
    for spec in (REAL_MODELS["sdxl"][-1], REAL_MODELS["flux"][0]):
        write_configurations(folder, spec)
        parts = empty_pipeline(spec, folder)
        plain = {name: part for name, part in parts.items() if name != "control"}
        for dtype in _DTYPES:
            yield from (architecture_of(spec, some, dtype) for some in (parts, plain))
    for spec in FAMILIES.values():
        dtypes = (dtype_of(spec, torch.device("cuda")), torch.float32)
        yield from (architecture_of(spec, skeleton(spec.name), dtype) for dtype in dtypes)


def main() -> None:
    """Write the table."""
    counts: dict[str, tuple[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in architectures(Path(folder)):
            for name in model.parts:
                if name != "control" and (key := model.key(name)) not in counts:
                    counted = model.count(name)
                    counts |= {} if counted.estimated else {key: (counted.fixed, counted.per_pixel)}
    TABLE.write_text(json.dumps(dict(sorted(counts.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
