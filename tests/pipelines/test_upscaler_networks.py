"""Upscaler networks: files in all names, tiles against the whole, memory, and files that are refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import upscaler_files as files
from conftest import ROOT
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from stable_diffusion_server.errors import InvalidInput, ModelLoadError, NotFinite
from stable_diffusion_server.pipelines.upscaling.compact import CompactNetwork
from stable_diffusion_server.pipelines.upscaling.network import load_network
from stable_diffusion_server.pipelines.upscaling.spandrel_import import import_spandrel
from stable_diffusion_server.pipelines.upscaling.tiles import OVERLAP, TILE, plan_tiles, run_tiles
from stable_diffusion_server.pipelines.upscaling.upscaler import NetworkUpscaler
from stable_diffusion_server.pipelines.upscaling.upscaler_files import UPSCALER_TILES, UpscalerFiles

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EMBEDDED = ROOT / "models" / "embedded-upscaler" / "embedded-2x.safetensors"


def picture(width: int, height: int) -> NDArray[np.uint8]:
    """Noise at three sizes, so that edges of all kinds are there."""
    rng, whole = np.random.default_rng(3), np.zeros((height, width, 3))
    for cell in (1, 5, 17):
        coarse = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3))
        whole += np.repeat(np.repeat(coarse, cell, 0), cell, 1)[:height, :width] / 3
    return whole.astype(np.uint8)


def ignore(done: int, total: int) -> None:
    """Ignore a report."""


def enlarged(path: Path, pixels: NDArray[np.uint8], width: int, height: int, report: Any = ignore) -> Any:
    found = UpscalerFiles([path.parent.parent]).find(path.stem, "upscaler")
    return NetworkUpscaler("cpu").enlarge(found, pixels, width, height, report)


def untiled(path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    network = load_network(path, CPU)
    with torch.inference_mode():
        drawn = network.run(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div(255))[0]
    return np.asarray(drawn.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def test_a_file_in_all_three_names_is_one_network(tmp_path: Path) -> None:
    """Real-ESRGAN's, BSRGAN's and ESRGAN's names give the same pixels."""
    new, pixels = files.rrdb(), picture(40, 30)
    results = [
        enlarged(files.saved(tmp_path, name, tensors), pixels, 160, 120)
        for name, tensors in (("new", new), ("old", files.in_old_names(new)), ("bsrgan", files.in_bsrgan_names(new)))
    ]
    assert results[0].shape == (120, 160, 3)
    assert results[0].std() > 10
    assert all((result == results[0]).all() for result in results)


def test_our_compact_network_is_spandrels(tmp_path: Path) -> None:
    """The same file read by spandrel gives the same numbers; wrapped names and fp16 are read too."""
    tensors = files.compact()
    path = files.saved(tmp_path, "compact", {f"params_ema.{name}": tensor for name, tensor in tensors.items()})
    theirs = import_spandrel().MAIN_REGISTRY.load(dict(tensors)).eval()
    probe = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours = load_network(path, CPU).run(probe)
        assert torch.allclose(ours.clamp(0, 1), theirs(probe), atol=1e-6)
        half = files.saved(tmp_path, "half", {name: tensor.half() for name, tensor in tensors.items()})
        assert torch.allclose(load_network(half, CPU).run(probe), ours, atol=0.02)


def test_spandrel_is_imported_without_torchvision() -> None:
    """No stand-in stays behind, and other modules get no stand-in."""
    assert import_spandrel().MAIN_REGISTRY
    assert "torchvision.transforms.functional" not in sys.modules
    with pytest.raises(ImportError):
        __import__("torchvision.transforms.functional")


@pytest.mark.parametrize(
    ("name", "tensors", "scale"),
    [
        ("x4", files.rrdb(), 4),
        ("x2 of 2 × 2 cells", files.rrdb(channels=12), 2),
        ("compact", files.compact(), 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tiles_are_equal_to_the_whole(tmp_path: Path, name: str, tensors: files.Tensors, scale: int) -> None:
    """Within 1/255, at an odd size that no tile divides, with random weights, whose reach is long."""
    path = files.saved(tmp_path, "network", tensors)
    network, pixels = load_network(path, CPU), picture(147, 101)
    tiles = plan_tiles(147, 101, 96, network.overlap, network.multiple)
    assert len(tiles) >= 4
    found = UpscalerFiles([tmp_path]).find("network", "upscaler")
    upscaler = NetworkUpscaler("cpu")
    size = 147 * scale, 101 * scale
    drawn = run_tiles(lambda part: upscaler._draw(network, part), pixels, scale, tiles, size, lambda: None)
    assert np.abs(drawn.astype(int) - untiled(path, pixels)).max() <= 1
    assert (upscaler.enlarge(found, pixels, *size, ignore).astype(int) - untiled(path, pixels)).max() <= 1


def test_the_embedded_upscaler_has_no_seams_at_all() -> None:
    """Its reach is smaller than its overlap, so tiles of any size are the whole."""
    network, pixels = load_network(EMBEDDED, CPU), picture(150, 110)
    upscaler, whole = NetworkUpscaler("cpu"), untiled(EMBEDDED, pixels)
    for side in (32, 64, 100):
        tiles = plan_tiles(150, 110, side, network.overlap, network.multiple)
        drawn = run_tiles(lambda part: upscaler._draw(network, part), pixels, 2, tiles, (300, 220), lambda: None)
        assert np.abs(drawn.astype(int) - whole).max() <= 1
        assert (drawn != whole).mean() < 0.001  # where a sum rounds the other way


def test_tiles_cover_an_image_once() -> None:
    """Every pixel is kept by one tile; offsets are multiples of what the network wants."""
    for width, height, side, overlap, multiple in ((1, 1, 64, 8, 1), (64, 65, 64, 8, 1), (1000, 333, 128, 30, 4)):
        kept = np.zeros((height, width), int)
        for tile in plan_tiles(width, height, side, overlap, multiple):
            kept[tile.keep_top : tile.keep_bottom, tile.keep_left : tile.keep_right] += 1
            assert tile.left % multiple == tile.top % multiple == 0
            assert tile.right - tile.left <= side + 2 * multiple
        assert (kept == 1).all()


@pytest.mark.parametrize("factor", [1.5, 2.5, 3.0, 4.0, 7.3, 9.0])
def test_any_factor_is_reached(tmp_path: Path, factor: float) -> None:
    """Several passes and Lanczos; equal to the passes over the whole image, scaled by Pillow, but for roundings."""
    path, pixels = files.saved(tmp_path, "compact", files.compact()), picture(70, 50)
    size = round(70 * factor), round(50 * factor)
    reports: list[tuple[int, int]] = []
    drawn = enlarged(path, pixels, *size, lambda done, total: reports.append((done, total)))
    assert drawn.shape == (size[1], size[0], 3)
    whole = pixels
    for _ in range(3):
        whole = untiled(path, whole)
        if whole.shape[1] >= size[0]:
            break
    expected = np.asarray(Image.fromarray(whole).resize(size, Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(drawn - expected).max() <= 4  # a rounding in one pass grows in the next
    assert reports[0][0] == 0
    assert reports[-1][0] == reports[-1][1]


def test_memory_does_not_grow_with_the_image() -> None:
    """Beside input and result there is a tile: an image of 16 times the area takes no more."""
    found = UpscalerFiles([ROOT / "models"]).find("embedded-2x", "upscaler")
    upscaler, peaks = NetworkUpscaler("cpu"), []
    for side in (300, 1200):
        pixels = np.zeros((side, side, 3), np.uint8)
        upscaler.enlarge(found, pixels, 330, 330, ignore)
        tracemalloc.start()
        upscaler.enlarge(found, pixels, side * 2, side * 2, ignore)
        peaks.append(tracemalloc.get_traced_memory()[1] - 4 * pixels.nbytes)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2_000_000


def test_a_report_that_raises_ends_the_work_after_its_tile(tmp_path: Path) -> None:
    """That is how a request is cancelled; the next one works."""
    path, seen = files.saved(tmp_path, "compact", files.compact()), []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        enlarged(path, picture(600, 600), 1200, 1200, stop)
    assert seen == [0, 1, 2]


def test_threads_take_turns(tmp_path: Path) -> None:
    """Four images at a time have the pixels that each has alone."""
    files.saved(tmp_path, "compact", files.compact())
    found, upscaler = UpscalerFiles([tmp_path]).find("compact", "upscaler"), NetworkUpscaler("cpu")
    pixels = [picture(100 + 20 * number, 90) for number in range(4)]
    alone = [upscaler.enlarge(found, one, 2 * one.shape[1], 180, ignore) for one in pixels]
    together: dict[int, Any] = {}

    def work(number: int) -> None:
        one = pixels[number]
        together[number] = upscaler.enlarge(found, one, 2 * one.shape[1], 180, ignore)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((together[number] == alone[number]).all() for number in range(4))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (31, 33)])
def test_tiny_images_are_enlarged(tmp_path: Path, size: tuple[int, int]) -> None:
    """Networks that reflect their input need some pixels of it."""
    path = files.saved(tmp_path, "x2", files.rrdb(channels=12))
    drawn = enlarged(path, picture(*size), size[0] * 2, size[1] * 2)
    assert drawn.shape == (size[1] * 2, size[0] * 2, 3)


def test_names_are_found_and_nothing_else(tmp_path: Path) -> None:
    """By name, file name and folder; never a path; unknown ones are answered with those that are there."""
    files.saved(tmp_path, "RealESRGAN_x4", files.rrdb())
    upscalers = UpscalerFiles([tmp_path])
    assert [*upscalers.factors()] == ["embedded-2x", "RealESRGAN_x4"]
    for name in ("RealESRGAN_x4", "realesrgan_x4", "RealESRGAN_x4.safetensors"):
        assert upscalers.find(name, "upscaler").name == "RealESRGAN_x4"
    outside = tmp_path.parent / "secret.safetensors"
    outside.write_bytes(EMBEDDED.read_bytes())
    for name in ("../secret", f"../{outside.name}", str(outside), "nothing", "", "x" * 5000, "a\0b"):
        with pytest.raises(InvalidInput, match="not an upscaler here; there are embedded-2x, RealESRGAN_x4"):
            upscalers.find(name, "upscaler")
    assert f"{TILE}.{OVERLAP}" == UPSCALER_TILES


class RunsCode:
    """Unpickling it would make a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("OWNED",)


def huge_header(size: int) -> bytes:
    return struct.pack("<Q", size) + b'{"a":'


HOSTILE: list[tuple[str, bytes, str]] = [
    ("evil.pth", pickle.dumps(RunsCode()), "is pickled"),
    ("evil.safetensors", pickle.dumps(RunsCode()), "is a pickle under another name"),
    ("zip.safetensors", b"PK\x03\x04" + bytes(100), "is a pickle under another name"),
    ("long.safetensors", huge_header(10_000_000_000), "is not a safetensors file"),
    ("less.safetensors", huge_header(90_000_000), "is truncated within its header"),
    ("noise.safetensors", b"\xff" * 64, "is not a safetensors file"),
    ("empty.safetensors", b"", "is empty"),
]


@pytest.mark.parametrize(("name", "content", "reason"), HOSTILE, ids=[row[0] for row in HOSTILE])
def test_a_hostile_file_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, reason: str
) -> None:
    """By its header, without running its code; it is not listed, and who names it reads why."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "upscale_models" / name
    place.parent.mkdir()
    place.write_bytes(content)
    upscalers = UpscalerFiles([tmp_path])
    assert [*upscalers.factors()] == ["embedded-2x"]
    with pytest.raises(InvalidInput, match=reason):
        upscalers.find(place.stem, "upscaler")
    assert not (tmp_path / "OWNED").exists()


def broken_networks() -> dict[str, tuple[files.Tensors, str]]:
    rrdb, compact = files.rrdb(), files.compact()
    lacking = {name: tensor for name, tensor in rrdb.items() if "rdb2.conv3" not in name}
    wrong = {**rrdb, "body.1.rdb1.conv2.weight": torch.zeros(32, 7, 3, 3)}
    bits = {**rrdb, "conv_hr.weight": torch.zeros(16, 16, 3, 3, dtype=torch.float64)}
    many = {f"body.{number}.rdb1.conv1.weight": torch.zeros(1) for number in range(3000)}
    many |= {"conv_first.weight": torch.zeros(1000, 1000, 3, 3)}
    return {
        "lacking": (lacking, "lacks some of its network's"),
        "wrong": (wrong, "wrong shapes"),
        "four channels": (files.rrdb(channels=4), "4 channels|wrong shapes|do not fit"),
        "double": (bits, "F64"),
        "not a number": ({**rrdb, "conv_last.bias": torch.full((3,), torch.nan)}, "not finite at conv_last.bias"),
        "infinite": ({**compact, "body.0.bias": torch.full((16,), torch.inf)}, "not finite at body.0.bias"),
        "amplified": (many, "would be too large"),
        "compact wrong": ({**compact, "body.2.weight": torch.zeros(16, 8, 3, 3)}, "other shapes"),
        "compact lacking": ({name: t for name, t in compact.items() if name != "body.4.weight"}, "other shapes"),
        "compact of 5": (files.compact(scale=5), "enlarges by 5"),
        "compact of 9 channels": ({**compact, "body.10.weight": torch.zeros(9, 16, 3, 3)}, "other shapes"),
        "unknown": ({"a.weight": torch.zeros(3, 3)}, "no network that spandrel knows"),
    }


@pytest.mark.parametrize("name", broken_networks())
def test_a_broken_network_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    """Missing tensors, wrong shapes, numbers that are none, networks far larger than their files."""
    tensors, reason = broken_networks()[name]
    with pytest.raises(ModelLoadError, match=reason) as refused:
        load_network(files.saved(tmp_path, name, tensors), CPU)
    assert refused.value.detail.startswith(f"{name}.safetensors ")
    assert str(tmp_path) not in refused.value.detail


def test_numbers_that_overflow_fail_one_request(tmp_path: Path) -> None:
    """Finite weights can give infinite pixels: that image fails, others do not."""
    tensors = files.compact()
    tensors["body.0.bias"] = torch.full((16,), 1e38)
    tensors["body.2.weight"] = torch.full((16, 16, 3, 3), 1e30)
    path = files.saved(tmp_path, "overflowing", tensors)
    with pytest.raises((ModelLoadError, NotFinite)):
        enlarged(path, picture(40, 40), 80, 80)
    assert enlarged(files.saved(tmp_path, "sound", files.compact()), picture(40, 40), 80, 80).shape == (80, 80, 3)


def test_a_header_of_16_mb_is_the_most(tmp_path: Path) -> None:
    """As for all other model files."""
    header = json.dumps({"__metadata__": {"a": "b" * (17 * 2**20)}}).encode()
    place = tmp_path / "upscale_models" / "fat.safetensors"
    place.parent.mkdir()
    place.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InvalidInput, match="has a header of"):
        UpscalerFiles([tmp_path]).find("fat", "upscaler")


def test_the_embedded_upscaler_is_3_db_above_lanczos() -> None:
    """On held-out pictures of the embedded world, halved by three filters; half a megabyte at most."""
    from training import upscaler as stage

    assert EMBEDDED.stat().st_size < 500_000
    tensors = load_file(EMBEDDED)
    network = CompactNetwork(stage.WIDTH, stage.LAYERS, stage.SCALE)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    for resampling in stage.FILTERS:
        ours = stage.measure(lambda small: untiled(EMBEDDED, small), resampling)
        assert ours >= stage.measure(stage.lanczos, resampling) + 3, resampling
