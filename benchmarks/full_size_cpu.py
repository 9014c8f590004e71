"""SDXL at full size with random weights on a CPU: this server's settings, and stable-diffusion.cpp, in one run.

    python -m benchmarks.full_size_cpu --dir FOLDER [--sd-cpp PYTHON] [--tiny] [--out TABLE.md]

Writes one checkpoint of 6.9 GB with original key names into the folder, and deletes it afterwards. PYTHON is an
interpreter with stable-diffusion-cpp-python. Needs a quiet machine and 18 GB of memory; `--tiny` tries the
script with a shallow model, which stable-diffusion.cpp does not take.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import psutil
import torch
import transformers

from benchmarks.full_size import CLIP_G, CLIP_L, UNET, VAE
from benchmarks.loopback import say
from benchmarks.servers import ROOT, Entry, Tuning, end, start
from benchmarks.tables import machine, table
from stable_diffusion_server.pipelines.loading.checkpoint_configs import base_configs

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "pipelines")]

from original_names import sdxl_tensors  # noqa: E402  # from the tests, whose folder was added above

SIDE, STEPS, GUIDANCE = 512, 3, 5.0
# Seconds for a request; a machine that does something else beside takes long.
_TIMEOUT = 3600
# Random numbers that all weights are cut from.
_NUMBERS = 1 << 24
_SHALLOW = {"transformer_layers_per_block": [1, 1, 1], "block_out_channels": [320, 640, 640]}
# Sides of the comparison: settings of this server, or a type of stable-diffusion.cpp's weights.
SIDES: Mapping[str, Mapping[str, str] | str] = {
    "this server, default": {},
    "this server, `QUANTIZE=int8 MMAP_WEIGHTS=1`": {"QUANTIZE": "int8", "MMAP_WEIGHTS": "1"},
    "stable-diffusion.cpp, f16": "f16",
    "stable-diffusion.cpp, q8_0": "q8_0",
    "this server, `MMAP_WEIGHTS=1`": {"MMAP_WEIGHTS": "1"},
    "this server, `ENGINE_WORKERS=2` (the default before)": {"ENGINE_WORKERS": "2"},
}


def main() -> None:
    """Write the checkpoint, measure every side, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--sd-cpp", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    asked.dir.mkdir(parents=True, exist_ok=True)
    file, spec = asked.dir / "full.safetensors", asked.dir / "full.toml"
    side = 128 if asked.tiny else SIDE
    spec.write_text(f"native_size = [{side}, {side}]\n")
    head = [f"{date.today()}, {side} × {side}, {STEPS} steps, guidance {GUIDANCE}, one request. {machine()}", ""]
    try:
        began = time.perf_counter()
        if not file.exists():
            write_checkpoint(file, tiny=asked.tiny)
        say(f"{file.stat().st_size / 1e9:.1f} GB written in {time.perf_counter() - began:.0f} s")
        rows = []
        for row in measure(file, "" if asked.tiny else asked.sd_cpp, side):
            rows.append(row)
            say(str(row))
    finally:
        file.unlink(missing_ok=True)
        spec.unlink()
    columns = ("", "load, s", "a step, s", "whole request, s", "peak memory, GB", "of it not mapped, GB")
    lines = [*head, *table(columns, rows)]
    say("\n".join(lines))
    if asked.out:
        asked.out.write_text("\n".join(["# Full-size SDXL on a CPU", "", *lines, ""]))


def measure(file: Path, sd_cpp: str, side: int) -> Iterator[tuple[str, ...]]:
    """A row of the table for each side."""
    for name, given in SIDES.items():
        if not isinstance(given, str):
            yield (name, *of_server(file, given, side))
        elif sd_cpp:
            yield (name, *of_sd_cpp(file, given, sd_cpp, side))


def of_server(file: Path, environment: Mapping[str, str], side: int) -> tuple[str, ...]:
    """Start the server with this checkpoint alone, draw once, and read its timings."""
    processes: list[subprocess.Popen[bytes]] = []
    given = {"MODELS": "local", "MODELS_DIR": str(file.parent), "TEXT_TO_IMAGE_MODEL": file.stem, "MIN_SIDE": "64"}
    unset = {
        "ENGINE_WORKERS": "0",
        "CPU_THREADS": "0",
        "MAX_TIMEOUT": str(_TIMEOUT),
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    }
    entry = Entry(None, Tuning(1, 1, 1), {**unset, **given, **environment})
    with tempfile.TemporaryDirectory() as home:
        try:
            server = start(file.stem, entry, Path(home) / "server", processes.append)
            with Memory(processes[0].pid) as memory:
                order: dict[str, object] = {
                    "prompt": "a red circle",
                    "save_path": "full-size.png",
                    "seed": 1,
                    "width": side,
                    "height": side,
                }
                order |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "scheduler": "euler"}
                began = time.perf_counter()
                answer = server.client.post("/create_and_upload_image", json=order, timeout=_TIMEOUT)
                whole = time.perf_counter() - began
            step = answer.raise_for_status().json()["timings"]["denoise"] / STEPS
        finally:
            for process in processes:
                end(process)
    figures = (server.ready, step, whole, memory.peak / 1e9, memory.own / 1e9)
    return tuple(f"{figure:.1f}" for figure in figures)


def of_sd_cpp(file: Path, kind: str, python: str, side: int) -> tuple[str, ...]:
    """Draw once with stable-diffusion.cpp on all cores."""
    script = ROOT / "benchmarks" / "peers" / "sd_cpp.py"
    given = map(str, (file, kind, os.cpu_count(), side, STEPS, GUIDANCE))
    run = subprocess.run([python, str(script), *given], capture_output=True, text=True, check=False)  # noqa: S603  # ours
    if run.returncode:
        return (f"failed: {run.stderr[-200:]}", "", "", "", "")
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    steps = found["steps"] or [float("nan")]
    figures = (found["load"], sum(steps) / len(steps), found["whole"], found["peak"] / 1e9, found["peak"] / 1e9)
    return tuple(f"{figure:.1f}" for figure in figures)


class Memory:
    """The peak memory of the largest process of a tree, in bytes: `peak`, and `own` without mapped files.

    `peak` is the kernel's own, from the start of that process; `own` is polled while the context is open.
    """

    def __init__(self, root: int) -> None:
        self.peak = self.own = 0
        self._root = root
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            root = psutil.Process(self._root)
            for process in (root, *root.children(recursive=True)):
                facts = _status_of(process.pid)
                self.peak = max(self.peak, facts.get("VmHWM", 0))
                self.own = max(self.own, facts.get("RssAnon", 0))


def _status_of(pid: int) -> dict[str, int]:
    """The kernel's figures of a process, in bytes; empty if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def write_checkpoint(file: Path, *, tiny: bool) -> None:
    """Write SDXL in fp16 with original names and random weights, without holding it in memory.

    `tiny` makes it shallow and its last block narrower.
    """
    base = base_configs("sdxl")
    unet = {**base["denoiser"], **UNET, **(_SHALLOW if tiny else {})}
    with torch.device("meta"):
        parts = {
            "unet": diffusers.UNet2DConditionModel.from_config(unet),
            "vae": diffusers.AutoencoderKL.from_config({**base["vae"], **VAE}),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_L)),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP_G)),
        }
        tensors = sdxl_tensors(SimpleNamespace(**parts))
    whole = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.is_meta}
    header, place = dict[str, Any](), 0
    for name, tensor in whole.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    encoded = json.dumps(header).encode()
    numbers = 0.02 * torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0))
    random = numbers.half().numpy().tobytes()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in whole.items():
            out.write(_weights(name, tensor, random))


def _weights(name: str, tensor: torch.Tensor, random: bytes) -> bytes:
    """The numbers of a tensor: random for weights, one for norms, zero for biases."""
    if tensor.ndim == 1:
        scale = name.endswith("weight")
        return (torch.ones if scale else torch.zeros)(tensor.numel(), dtype=torch.float16).numpy().tobytes()
    size = 2 * tensor.numel()
    return (random * (size // len(random) + 1))[:size]


if __name__ == "__main__":
    main()
