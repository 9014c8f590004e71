"""What the process for models computes: control images, boxes and labels, with the networks of the last requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.library.file_headers import shown
from stable_diffusion_server.pipelines.vision import depth_maps, edge_networks
from stable_diffusion_server.pipelines.vision.classification import classify_by_folder, classify_by_onnx
from stable_diffusion_server.pipelines.vision.detection import detect_boxes
from stable_diffusion_server.pipelines.vision.model_folders import load_classifier_folder, load_depth_folder
from stable_diffusion_server.pipelines.vision.onnx_file import RefusedFile
from stable_diffusion_server.pipelines.vision.onnx_network import Floats, OnnxNetwork
from stable_diffusion_server.pipelines.vision.pose_drawing import draw_poses
from stable_diffusion_server.pipelines.vision.pose_keypoints import find_poses
from stable_diffusion_server.pipelines.vision.vision_messages import NO_MEMORY, REFUSED

# Networks that stay loaded: those of a pose, and one more.
_KEPT = 3
_EDGES: dict[str, Callable[[OnnxNetwork, Pixels], Floats]] = {
    "hed": edge_networks.hed_edges,
    "pidinet": edge_networks.pidinet_edges,
}
_LINES: dict[str, Callable[[OnnxNetwork, Pixels], Pixels]] = {
    "lines": edge_networks.line_art,
    "anime_lines": edge_networks.anime_line_art,
    "normal": depth_maps.network_normals,
}
_SENTENCES_MAX = 500


class VisionTasks:
    """Answers requests one after the other; `threads` compute."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._networks: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        # The file that is being used, for sentences about it.
        self._file = Path()

    def answer(self, asked: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Return JSON and pixels for a request: method, files, options, and height and width of its pixels."""
        pixels = np.frombuffer(data, np.uint8).reshape(asked["height"], asked["width"], 3)
        files = [Path(file) for file in asked["files"]]
        try:
            try:
                return self._answered(asked["method"], files, asked["options"], pixels)
            except MemoryError:
                self._networks.clear()
                return self._answered(asked["method"], files, asked["options"], pixels)
        except MemoryError:
            return self._failed(NO_MEMORY, "")
        except RefusedFile as error:
            return self._failed(REFUSED, str(error))
        except Exception as error:  # networks fail in ways of their own; the next request may use another
            return self._failed(REFUSED, f"It failed with {type(error).__name__}.")

    def _failed(self, verdict: str, sentence: str) -> tuple[dict[str, Any], bytes]:
        named = {"file": shown(self._file.name), "sentence": shown(sentence, _SENTENCES_MAX)}
        return {"verdict": verdict, **named}, b""

    def _answered(
        self, method: str, files: Sequence[Path], options: dict[str, float], pixels: Pixels
    ) -> tuple[dict[str, Any], bytes]:
        if method == "detect":
            return {"boxes": detect_boxes(self._onnx(files[0]), pixels, options["score"])}, b""
        if method == "classify":
            return {"labels": self._classify(files[0], pixels)}, b""
        drawn = self._draw(method, files, options, pixels)
        return {"height": drawn.shape[0], "width": drawn.shape[1]}, drawn.tobytes()

    def _draw(self, method: str, files: Sequence[Path], options: dict[str, float], pixels: Pixels) -> Pixels:
        if method == "depth":
            return depth_maps.depth_map(self._depth(files[0]), pixels)
        if method == "normal_depth":
            return depth_maps.normal_map(self._depth(files[0]), pixels, options["background"])
        if method in _LINES:
            return _LINES[method](self._onnx(files[0]), pixels)
        if method.startswith("pose_"):
            return self._pose(method.removeprefix("pose_"), files, pixels)
        network, _, finish = method.partition("_")
        edges = _EDGES[network](self._onnx(files[0]), pixels)
        if finish == "thin":
            return edge_networks.scribbled(edges)
        return edge_networks.as_picture(edge_networks.safe_edges(edges) if finish == "safe" else edges)

    def _pose(self, parts: str, files: Sequence[Path], pixels: Pixels) -> Pixels:
        boxes = detect_boxes(self._onnx(files[0]), pixels, 0.1)
        poses = find_poses(self._onnx(files[1]), pixels, boxes)
        return draw_poses(
            poses,
            pixels.shape[1],
            pixels.shape[0],
            body=parts != "faceonly",
            hands=parts in ("hand", "full"),
            face=parts in ("face", "faceonly", "full"),
        )

    def _classify(self, file: Path, pixels: Pixels) -> list[tuple[str, float]]:
        if not file.is_dir():
            return classify_by_onnx(self._onnx(file), pixels)
        model, processor = self._kept(file, "classifier", load_classifier_folder)
        return classify_by_folder(model, processor, pixels)

    def _depth(self, file: Path) -> depth_maps.DepthNetwork:
        if not file.is_dir():
            return depth_maps.OnnxDepth(self._onnx(file))
        return depth_maps.FolderDepth(*self._kept(file, "depth", load_depth_folder))

    def _onnx(self, file: Path) -> OnnxNetwork:
        network: OnnxNetwork = self._kept(file, "onnx", lambda path: OnnxNetwork(path, self._threads))
        return network

    def _kept(self, file: Path, use: str, load: Callable[[Path], Any]) -> Any:
        """A network that is loaded already, or loaded now; the one that was used longest ago gives way."""
        self._file = file
        facts = file.stat()
        key = (file, use, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if key not in self._networks:
            while len(self._networks) >= _KEPT:
                self._networks.popitem(last=False)
            self._networks[key] = load(file)
        self._networks.move_to_end(key)
        return self._networks[key]
