"""Writes a folder as owners have it: small models of five kinds with random weights, and files that are no use.

Run it to try a server: `PYTHONPATH=tests:tests/pipelines:. python tests/pipelines/five_models.py FOLDER`, then
`MODELS_DIR=FOLDER make run`. What they draw is noise with structure, since nobody trained them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from checkpoint_stand_ins import flux_pipeline, sdxl_pipeline, write
from original_names import flux_tensors, sdxl_tensors

WORDS = Path(__file__).parents[2] / "models" / "embedded-flux" / "tokenizer_2"
MARKERS = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
NAMES = ("dev", "my juggernaut", "noob-v", "paint", "schnell")


def write_five_models(folder: Path) -> None:
    """SDXL (epsilon, v-prediction, inpaint) and Flux (schnell, dev), a spec, a tokenizer, and three useless files."""
    write(folder / "my juggernaut.safetensors", sdxl_tensors(sdxl_pipeline(1)))
    write(folder / "checkpoints" / "noob-v.safetensors", {**sdxl_tensors(sdxl_pipeline(2)), **MARKERS})
    write(folder / "paint.safetensors", sdxl_tensors(sdxl_pipeline(3, in_channels=9)))
    write(folder / "schnell.safetensors", flux_tensors(flux_pipeline(4, tokenizer=WORDS)))
    write(folder / "dev.safetensors", flux_tensors(flux_pipeline(5, guided=True, tokenizer=WORDS)))
    (folder / "my juggernaut.toml").write_text("steps = 2\nguidance = 3.5\n")
    (folder / "t5-tokenizer").symlink_to(WORDS)
    (folder / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (folder / "half.safetensors").write_bytes((folder / "paint.safetensors").read_bytes()[:90_000])
    write(folder / "sd15.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)})


if __name__ == "__main__":
    write_five_models(Path(sys.argv[1]))
