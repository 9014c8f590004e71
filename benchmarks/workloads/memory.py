"""Measures what all tasks take in memory beside one task's weights, and a server's memory after each task."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from benchmarks.servers import ENTRIES, FACTS, OURS, PLAIN, ROOT, Server, servers
from benchmarks.tables import Result, table
from stable_diffusion_server.pipelines.loading.components import load_controlnet, load_pipeline
from stable_diffusion_server.pipelines.loading.footprint import bytes_of
from stable_diffusion_server.pipelines.registry import load


def measure(rounds: int) -> Result:
    """Bytes of weights in this process, then the memory of a server task by task. One round says it all."""
    cpu = torch.device("cpu")
    stock = load_pipeline(FACTS, ROOT / "models", cpu)
    one = bytes_of(*(part for part in stock.components.values() if isinstance(part, torch.nn.Module)))
    control = load_controlnet(FACTS, ROOT / "models", cpu)
    needed = one + (bytes_of(control) if control is not None else 0)
    ours = next(model for model in load(ROOT / "models", "cpu", 0).loaded if model.name == FACTS.name).bytes
    rows = [
        ("the stock text-to-image pipeline", f"{one / 1e6:.1f}", ""),
        ("and its ControlNet", f"{needed / 1e6:.1f}", "1.00"),
        ("all tasks of ours", f"{ours / 1e6:.1f}", f"{ours / needed:.2f}"),
    ]
    lines = [*table(("weights in memory", "MB", "of the needed"), rows), "", *by_task()]
    return Result(lines, {"memory, all tasks of the weights needed": ours / needed})


def by_task() -> list[str]:
    """A server's memory after each task, and the plain one's after its only one."""
    rows = []
    with servers({name: ENTRIES[name] for name in (OURS, PLAIN)}) as started:
        for name, server in started.items():
            for task, ask in tasks(server).items():
                for _ in range(3):
                    ask()
                rows.append((name, task, f"{server.memory():.0f}"))
    return [*table(("server", "after", "MB in all its processes"), rows), ""]


def tasks(server: Server) -> dict[str, Callable[[], object]]:
    """What a server can be asked to do."""
    text = {"its start": lambda: None, "text to image": lambda: server.draw("memory", 1, 256)}
    if server.entry.script is not None:
        return text
    return {
        **text,
        "style transfer": lambda: restyle(server, "memory-style", canny=False),
        "style transfer along edges": lambda: restyle(server, "memory-edges", canny=True),
        "inpainting": lambda: inpaint(server, "memory-inpaint"),
    }


def restyle(server: Server, name: str, *, canny: bool, seed: int = 1) -> None:
    """Image to image from an uploaded picture."""
    given = {"prompt": "a blue square on a white background", "save_path": f"{name}.webp", "canny": canny, "seed": seed}
    files = {"image_file": ("a.png", picture())}
    data = {**given, "overwrite": True, "strength": 0.6}
    server.client.post("/style_transfer_bytes_and_upload_image", data=data, files=files).raise_for_status()


def inpaint(server: Server, name: str, seed: int = 1) -> None:
    """Repaint the middle of an uploaded picture."""
    files = {"image_file": ("a.png", picture()), "mask_file": ("m.png", mask())}
    data = {
        "prompt": "a red circle on a white background",
        "save_path": f"{name}.webp",
        "overwrite": True,
        "seed": seed,
        "strength": 0.6,
    }
    server.client.post("/inpaint_and_upload_image", data=data, files=files).raise_for_status()


def picture(side: int = 256) -> bytes:
    """A PNG of a green square on white."""
    pixels = np.full((side, side, 3), 255, np.uint8)
    pixels[side // 4 : -side // 4, side // 4 : -side // 4] = (0, 160, 0)
    return png(pixels)


def mask(side: int = 256) -> bytes:
    """A PNG that is white in the middle."""
    pixels = np.zeros((side, side), np.uint8)
    pixels[side // 3 : -side // 3, side // 3 : -side // 3] = 255
    return png(pixels)


def png(pixels: np.ndarray) -> bytes:
    """Pixels as a PNG file."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def as_text(file: bytes) -> str:
    """A file as it travels in JSON."""
    return base64.b64encode(file).decode()
