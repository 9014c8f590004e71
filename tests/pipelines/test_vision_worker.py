"""The process for models: control images by networks, and what crashes, hangs, lies or is no network at all."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import vision_files

from stable_diffusion_server.errors import ModelLoadError, NotReady
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.vision.vision_worker import PROGRAM, VisionWorker

pytestmark = pytest.mark.slow

PICTURE = cv2.resize(np.random.default_rng(2).integers(0, 256, (6, 9, 3), np.uint8), (90, 60))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("annotators")


@pytest.fixture
async def worker() -> AsyncIterator[VisionWorker]:
    """A worker with a gigabyte and 20 seconds."""
    worker = VisionWorker(memory=2**30, seconds=20, threads=1)
    yield worker
    await worker.close()


def processes() -> set[int]:
    """Running processes for models of this process."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and bytes(PROGRAM) in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


async def none_left() -> None:
    """Wait until no process for models runs."""
    async with asyncio.timeout(20):
        while processes():  # noqa: ASYNC110  # a process has no event
            await asyncio.sleep(0.01)


async def drawn(worker: VisionWorker, method: str, *files: Path, **options: float) -> Pixels:
    return await worker.control_image(method, files, PICTURE, options)


def run_stock(file: Path, picture: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """What ONNX Runtime answers in this process."""
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"x": picture[None].astype(np.float32)})]


async def test_depth_of_an_onnx_file_is_that_of_onnx_runtime(worker: VisionWorker, folder: Path) -> None:
    """ImageNet's normalization, 518 pixels on the shorter side, stretched to 0 … 255; also a fixed size."""
    for name, shape in (("any.onnx", vision_files.ANY_SIZE), ("fixed.onnx", (1, 3, 70, 98))):
        file = vision_files.weighted_channels(folder / name, (0.5, 1.0, -0.3), shape)
        size = (98, 70) if name == "fixed.onnx" else (784, 518)
        scaled = cv2.resize(PICTURE, size, interpolation=cv2.INTER_CUBIC) / 255
        near = run_stock(file, ((scaled - MEAN) / STD).transpose(2, 0, 1))[0][0, 0]
        near = cv2.resize(near, (90, 60), interpolation=cv2.INTER_CUBIC)
        expected = np.rint((near - near.min()) / (near.max() - near.min()) * 255)
        found = await drawn(worker, "depth", file)
        assert (found.shape, found.dtype) == (PICTURE.shape, np.uint8)
        assert np.abs(found[..., 0] - expected).max() <= 1
        assert (found == found[..., :1]).all()


async def test_normals_lean_where_the_depth_rises(worker: VisionWorker, folder: Path) -> None:
    """A ramp to the right leans in red, a flat wall and all that is far face the viewer in blue."""
    ramp = np.repeat(np.repeat(np.arange(90, dtype=np.uint8)[None, :, None], 60, axis=0), 3, axis=2)
    file = vision_files.weighted_channels(folder / "midas.onnx", (1, 1, 1))
    normals = await worker.control_image("normal_depth", [file], ramp, {"background": 0.4})
    assert (normals[30, 60].astype(int) - [128, 128, 128])[[0, 2]].min() > 20
    assert abs(int(normals[30, 60, 1]) - 127) <= 2
    assert normals[30, 10].tolist() == [127, 127, 255]
    wall = await worker.control_image("normal_depth", [file], np.full((40, 40, 3), 9, np.uint8), {"background": 0.4})
    assert np.unique(wall.reshape(-1, 3), axis=0).tolist() == [[127, 127, 255]]


async def test_networks_of_normals_answer_vectors(worker: VisionWorker, folder: Path) -> None:
    """Of any length, with or without a fourth channel."""
    vectors = np.zeros((1, 4, 32, 32), np.float32)
    vectors[:, 0], vectors[:, 2] = 3, 4
    file = vision_files.constant(folder / "bae.onnx", [vectors], (32, 32))
    assert (await drawn(worker, "normal", file))[5, 5].tolist() == [204, 127, 229]


async def test_edge_networks_get_what_they_were_trained_on(worker: VisionWorker, folder: Path) -> None:
    """HED: levels to 255 in RGB, logits; PiDiNet: BGR to 1, probabilities; line art: dark lines, inverted."""
    levels = PICTURE.astype(np.float32)
    hed = vision_files.weighted_channels(folder / "hed.onnx", (0.02, -0.01, 0.0))
    logits = levels[..., 0] * 0.02 - levels[..., 1] * 0.01
    assert np.abs((await drawn(worker, "hed", hed))[..., 0] - 255 / (1 + np.exp(-logits))).max() <= 1.5
    pidinet = vision_files.weighted_channels(folder / "pidinet.onnx", (0.5, 0.2, 0.0))
    edges = levels[..., 2] * 0.5 + levels[..., 1] * 0.2
    assert np.abs((await drawn(worker, "pidinet", pidinet))[..., 2] - edges).max() <= 1.5
    lines = vision_files.weighted_channels(folder / "sk_model.onnx", (0.0, 0.0, 1.0))
    assert np.abs((await drawn(worker, "lines", lines))[..., 0] - (255 - levels[..., 2])).max() <= 1.5
    anime = await drawn(worker, "anime_lines", lines)
    assert np.abs(anime[..., 0] - (255 - levels[..., 2])).max() <= 1.5
    safe = await drawn(worker, "pidinet_safe", pidinet)
    assert set(np.unique(safe)) <= {0, 127, 255}
    thin = await drawn(worker, "hed_thin", hed)
    assert set(np.unique(thin)) <= {0, 255}


HOSTILE = ["empty", "pickle", "zip", "text", "cut", "external", "absolute", "hidden", "declared", "inputs", "numbers"]


def hostile(folder: Path, kind: str) -> tuple[Path, str]:
    """A file that is no network of pictures, and what the sentence about it says."""
    file = folder / f"{kind}.onnx"
    whole = vision_files.weighted_channels(folder / "whole.onnx", (1, 1, 1)).read_bytes()
    contents = {"empty": b"", "pickle": pickle.dumps(["x"] * 9), "zip": b"PK\3\4" + bytes(99), "text": b"ONNX" * 50}
    contents["cut"] = whole[: len(whole) // 2]
    if kind in contents:
        file.write_bytes(contents[kind])
        return file, "not an ONNX file"
    secret = folder / "secret.bin"
    secret.write_bytes(bytes(range(12)))
    if kind in ("external", "absolute"):
        place = str(secret) if kind == "absolute" else "../" + folder.name + "/secret.bin"
        return vision_files.external(file, place), "weights in other files"
    if kind == "hidden":
        return vision_files.with_external_attribute(file, "secret.bin"), "weights in other files"
    if kind == "declared":
        return vision_files.declaring(file, (10, 2**30)), "larger tensors than it holds"
    if kind == "inputs":
        return vision_files.weighted_channels(file, (1, 1, 1), (1, 3)), "ONNX Runtime cannot load it"
    return vision_files.weighted_channels(file, (np.nan, 1, 1)), "not finite"


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_file_that_is_no_network_is_refused_in_a_sentence(
    worker: VisionWorker, folder: Path, kind: str
) -> None:
    """It names the file without its folders; the process goes on, and the next request is answered by the same one."""
    good = vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1))
    await drawn(worker, "depth", good)
    running = processes()
    file, sentence = hostile(folder, kind)
    with pytest.raises(ModelLoadError) as caught:
        await drawn(worker, "depth", file)
    assert sentence in caught.value.detail
    assert caught.value.detail.startswith(file.name)
    assert str(folder.parent) not in caught.value.detail
    await drawn(worker, "depth", good)
    assert processes() == running


async def test_the_process_sees_no_environment_and_is_bounded(worker: VisionWorker, folder: Path) -> None:
    """Nothing of the server's environment, bounded address space, no written files, and the kernel's first choice."""
    await drawn(worker, "depth", vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1)))
    (pid,) = processes()
    place = Path("/proc") / str(pid)
    names = {entry.partition("=")[0] for entry in (place / "environ").read_text().split("\0") if entry}
    assert names == {"CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MALLOC_ARENA_MAX", "HOME"}
    limits = {line[:25].strip(): line[26:].split()[0] for line in (place / "limits").read_text().splitlines()}
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert 2**30 < int(limits["Max address space"]) < 2**31
    assert int(limits["Max cpu time"]) < 60
    assert int(limits["Max open files"]) == 128
    assert (place / "oom_score_adj").read_text().strip() == "1000"
    assert (place / "cwd").resolve() == Path("/")


async def test_a_network_that_wants_all_memory_costs_one_request(worker: VisionWorker, folder: Path) -> None:
    """16 GB are more than the process may have; the next request is answered."""
    with pytest.raises(ModelLoadError, match=r"greedy\.onnx"):
        await drawn(worker, "depth", vision_files.greedy(folder / "greedy.onnx", 16))
    await drawn(worker, "depth", vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1)))


async def test_an_endless_network_is_ended(folder: Path) -> None:
    """After the time limit its process is killed; the next request gets another."""
    worker = VisionWorker(memory=2**30, seconds=4, threads=1)
    try:
        with pytest.raises(ModelLoadError, match=r"endless\.onnx took too long"):
            await drawn(worker, "depth", vision_files.endless(folder / "endless.onnx"))
        await none_left()
        await drawn(worker, "depth", vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1)))
    finally:
        await worker.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
async def test_a_process_that_crashes_costs_one_request(
    worker: VisionWorker, folder: Path, number: signal.Signals
) -> None:
    """Killed while it computes: that request fails in a sentence, the one that waited behind it is answered."""
    good = vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1))
    await drawn(worker, "depth", good)
    hit = asyncio.create_task(drawn(worker, "depth", vision_files.endless(folder / "endless.onnx")))
    behind = asyncio.create_task(drawn(worker, "depth", good))
    (pid,) = processes()
    await asyncio.sleep(0.3)
    os.kill(pid, number)
    with pytest.raises(ModelLoadError, match=r"endless\.onnx ended the process"):
        await hit
    assert (await behind).shape == PICTURE.shape
    assert pid not in processes()


async def test_a_process_that_died_while_idle_is_replaced(worker: VisionWorker, folder: Path) -> None:
    """No request fails for it."""
    good = vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1))
    await drawn(worker, "depth", good)
    (pid,) = processes()
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.1)
    await drawn(worker, "depth", good)


async def test_a_cancelled_request_ends_its_process(worker: VisionWorker, folder: Path) -> None:
    """It computes for nobody; the next request starts another."""
    good = vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1))
    await drawn(worker, "depth", good)
    left = asyncio.create_task(drawn(worker, "depth", vision_files.endless(folder / "endless.onnx")))
    await asyncio.sleep(0.2)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    await none_left()
    await drawn(worker, "depth", good)


async def test_an_idle_process_ends_and_a_closed_worker_starts_none(folder: Path) -> None:
    """Its memory is free again after the idle time."""
    worker = VisionWorker(memory=2**30, seconds=20, threads=1, idle_seconds=0.05)
    good = vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1))
    await drawn(worker, "depth", good)
    await none_left()
    await drawn(worker, "depth", good)
    await worker.close()
    assert not processes()
    with pytest.raises(NotReady):
        await drawn(worker, "depth", good)


async def test_callers_take_turns(worker: VisionWorker, folder: Path) -> None:
    """Who comes behind ten requests of another caller waits for one of them."""
    files, done = [vision_files.weighted_channels(folder / "good.onnx", (1, 1, 1))], []

    async def ask(share: str) -> None:
        await worker.control_image("depth", files, PICTURE, {}, share=share)
        done.append(share)

    await asyncio.gather(*(ask("many") for _ in range(10)), ask("one"))
    assert sorted(done) == ["many"] * 10 + ["one"]
    assert done.index("one") <= 2


LIAR = """
import json, struct, sys
head = struct.Struct(">IQ")
source, target = sys.stdin.buffer, sys.stdout.buffer
while len(data := source.read(head.size)) == head.size:
    length, size = head.unpack(data)
    asked = json.loads(source.read(length)); source.read(size)
    body, pixels = {body}, b"{pixels}" * 9
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    target.write(head.pack({length} or len(text), {size} or len(pixels)) + text + pixels); target.flush()
"""
LIES: list[dict[str, object]] = [
    {"size": 10**15},
    {"length": 10**9},
    {"body": "b'['"},
    {"body": "[1]"},
    {"body": "{'height': 10**9, 'width': 10**9}"},
    {"body": "{'height': 60, 'width': 90}"},
    {"body": "{'verdict': 'refused', 'file': ['a' * 9000], 'sentence': '\\x1b[2J'}"},
]


@pytest.mark.parametrize("lie", LIES)
async def test_a_process_that_answers_nonsense_is_not_believed(tmp_path: Path, lie: dict[str, object]) -> None:
    """Lengths, JSON and sizes are checked, sentences are cut and printable, and no memory is taken for a claim."""
    program = tmp_path / "liar.py"
    text = LIAR
    for part, usual in {"body": "{}", "pixels": "x", "length": 0, "size": 0}.items():
        text = text.replace(f"{{{part}}}", str(lie.get(part, usual)))
    program.write_text(text)
    worker = VisionWorker(seconds=10, program=program)
    try:
        with pytest.raises(ModelLoadError) as caught:
            await drawn(worker, "depth", tmp_path / "any.onnx")
        assert len(caught.value.detail) < 1200
        assert caught.value.detail.isprintable()
        for ask in (worker.detect, worker.classify):
            with pytest.raises(ModelLoadError):
                await ask(tmp_path / "any.onnx", PICTURE)
    finally:
        await worker.close()
