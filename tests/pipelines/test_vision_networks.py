"""Detectors, poses, classifiers and folders of transformers: each decoded as the stock code does."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import vision_files
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.vision.detection import letterbox, suppress
from stable_diffusion_server.pipelines.vision.pose_drawing import draw_poses
from stable_diffusion_server.pipelines.vision.pose_keypoints import JOINTS, Pose
from stable_diffusion_server.pipelines.vision.vision_messages import FoundBox
from stable_diffusion_server.pipelines.vision.vision_tasks import VisionTasks
from stable_diffusion_server.pipelines.vision.vision_worker import VisionWorker

pytestmark = pytest.mark.slow

# Twice as wide as high: in 64 × 64 it is scaled by a half, with 16 grey rows above and below where it is centred.
PICTURE = cv2.resize(np.random.default_rng(4).integers(0, 256, (4, 8, 3), np.uint8), (128, 64))
SIDE = (64, 64)
CELLS = 64 + 16 + 4


class Refused(Exception):
    """What the process answers instead of a result."""


def asked(method: str, *files: Path, picture: Pixels = PICTURE, **options: float) -> tuple[dict[str, Any], bytes]:
    """The answer of the process, in this one, where the stock libraries are loaded already."""
    request = {"method": method, "files": [str(file) for file in files], "options": options}
    body, data = VisionTasks(1).answer(
        {**request, "height": len(picture), "width": picture.shape[1]}, picture.tobytes()
    )
    if "verdict" in body:
        raise Refused(f"{body['file']}: {body['sentence']}")
    return body, data


def detect(file: Path, least_score: float = 0.3) -> list[FoundBox]:
    return [FoundBox(*box) for box in asked("detect", file, score=least_score)[0]["boxes"]]


def control_image(method: str, *files: Path) -> Pixels:
    return np.frombuffer(asked(method, *files)[1], np.uint8).reshape(PICTURE.shape)


def yolo(rows: Sequence[Sequence[float]], numbers: int, count: int) -> np.ndarray[Any, Any]:
    """1 × count × numbers with these rows, the others zero."""
    found = np.zeros((1, count, numbers), np.float32)
    for place, row in enumerate(rows):
        found[0, 3 * place] = row
    return found


# In pixels of the square: middle (32, 32), 16 × 8; its twin, which it hides; another class there; a weak one.
V8 = [
    (32, 32, 16, 8, 0.9, 0.1), (33, 32, 16, 8, 0.8, 0.0), (32, 32, 16, 8, 0.0, 0.7), (10, 20, 4, 4, 0.2, 0.1),
]  # fmt: skip
BOX = [48.0, 24.0, 80.0, 40.0]
LAYOUTS = {
    "yolov8": yolo(V8, 6, CELLS).transpose(0, 2, 1),
    "yolov5": yolo([(*row[:4], 1.0, *row[4:]) for row in V8], 7, 3 * CELLS),
    "final": yolo([(24, 28, 40, 36, 0.9, 0), (24, 28, 40, 36, 0.7, 1), (8, 18, 12, 22, 0.2, 0)], 6, 20),
    "numbered": yolo([(0, 24, 28, 40, 36, 0, 0.9), (0, 24, 28, 40, 36, 1, 0.7)], 7, 20)[0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_of_each_layout_are_those_of_the_picture(tmp_path: Path, layout: str) -> None:
    """Letterboxed back, the weak ones and twins left out, one class beside another; names from the metadata."""
    names = {0: "face", 1: "hand"}
    file = vision_files.constant(tmp_path / f"{layout}.onnx", [LAYOUTS[layout]], SIDE, names)
    found = detect(file)
    assert [(box.label, round(box.score, 3)) for box in found] == [("face", 0.9), ("hand", 0.7)]
    for box in found:
        assert np.allclose(box[:4], BOX, atol=1e-3)
    many = detect(file, 0.1)
    assert len(many) == (2 if layout == "numbered" else 3)


def test_masks_do_not_count_as_classes(tmp_path: Path) -> None:
    """A file for segmentation has 32 coefficients behind the classes, and prototypes as a second output."""
    rows = np.concatenate([LAYOUTS["yolov8"], np.full((1, 32, CELLS), 5, np.float32)], axis=1)
    file = vision_files.constant(tmp_path / "seg.onnx", [rows, np.zeros((1, 32, 16, 16))], SIDE)
    found = detect(file)
    assert [(box.label, round(box.score, 3)) for box in found] == [("0", 0.9), ("1", 0.7)]


def test_yolox_is_decoded_by_its_cells(tmp_path: Path) -> None:
    """Cell (3, 2) of stride 8 with offset and logarithmic size, by hand; the picture is in the corner, blue first."""
    raw = np.zeros((1, CELLS, 6), np.float32)
    raw[0, 2 * 8 + 3] = (0.5, 0.25, np.log(2), np.log(1), 0.9, 0.8)
    found = detect(vision_files.constant(tmp_path / "yolox.onnx", [raw], SIDE))
    middle, size = np.array([3.5 * 8, 2.25 * 8]), np.array([16, 8])
    assert len(found) == 1
    assert np.allclose(found[0][:5], [*((middle - size / 2) * 2), *((middle + size / 2) * 2), 0.72], atol=1e-3)
    decoded = raw.copy()
    decoded[0, 2 * 8 + 3, :4] = (*middle, *size)
    again = detect(vision_files.constant(tmp_path / "decoded.onnx", [decoded], SIDE))
    assert np.allclose(again[0][:5], found[0][:5], atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 3), (1, 2, 3, 4), (1, 5, 5), (4,), (0, 6)])
def test_an_unknown_layout_is_refused_or_empty(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A sentence, and not boxes that mean nothing."""
    file = vision_files.constant(tmp_path / "odd.onnx", [np.ones(shape)], SIDE)
    if shape == (0, 6):
        assert detect(file) == []
        return
    with pytest.raises(Refused, match=r"odd\.onnx: It"):
        detect(file)


@given(st.lists(st.tuples(*[st.integers(0, 60)] * 4, st.integers(0, 2)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_suppression_keeps_what_no_better_box_covers(rows: list[tuple[int, ...]]) -> None:
    """Against the definition, pair by pair: kept boxes overlap no kept one of their class by more than 0.45."""
    boxes = np.array([(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d, _ in rows], np.float32).reshape(
        -1, 4
    )
    labels = np.array([row[4] for row in rows], np.float32)

    def overlap(first: int, second: int) -> float:
        one, two = boxes[first], boxes[second]
        shared = max(0, min(one[2], two[2]) - max(one[0], two[0])) * max(0, min(one[3], two[3]) - max(one[1], two[1]))
        union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)) - shared
        return float(shared / max(union, 1e-6))

    expected: list[int] = []
    for place in range(len(rows)):
        if all(labels[place] != labels[kept] or overlap(kept, place) <= 0.45 for kept in expected):
            expected.append(place)
    assert suppress(boxes, labels) == expected


def test_a_letterbox_keeps_the_aspect_ratio() -> None:
    """Scaled by the tighter side, grey around it."""
    boxed, scale, corner = letterbox(PICTURE, 64, 64, centred=True)
    assert (scale, corner.tolist()) == (0.5, [0, 16])
    assert (boxed[:16] == 114).all()
    assert (boxed[48:] == 114).all()
    assert letterbox(PICTURE, 64, 64, centred=False)[2].tolist() == [0, 0]
    assert letterbox(np.zeros((1, 900, 3), np.uint8), 64, 64, centred=True)[0].shape == (64, 64, 3)


def pose_files(folder: Path) -> tuple[Path, Path, np.ndarray[Any, Any]]:
    """A detector of one person, a network of joints, and where those are in the picture: x and y."""
    raw = np.zeros((1, CELLS, 6), np.float32)
    raw[0, 2 * 8 + 4] = (0, 0, np.log(4), np.log(3), 1, 1)  # middle (32, 16), 32 × 24; in the picture twice that
    detector = vision_files.constant(folder / "yolox_l.onnx", [raw], SIDE)
    along_x, along_y = np.zeros((1, JOINTS, 48 * 2), np.float32), np.zeros((1, JOINTS, 64 * 2), np.float32)
    random = np.random.default_rng(7)
    places = np.stack([random.integers(20, 76, JOINTS), random.integers(40, 90, JOINTS)], axis=1)
    along_x[0, np.arange(JOINTS), places[:, 0]] = 0.9
    along_y[0, np.arange(JOINTS), places[:, 1]] = 0.8
    along_y[0, 9] = 0  # the left wrist is not seen
    pose = vision_files.constant(folder / "dw-ll_ucoco.onnx", [along_x, along_y], (48, 64))
    # The box, 64 × 48 around (64, 32), is widened by 1.25 and to the shape 48 : 64.
    scale = 64 * 1.25 / 48
    joints = places / 2 * scale + np.array([64, 32]) - np.array([48, 64]) * scale / 2
    return detector, pose, joints


def test_a_pose_is_drawn_where_the_joints_are(tmp_path: Path) -> None:
    """SimCC rows decoded by hand; OpenPose's colours at the joints, the neck between the shoulders."""
    detector, network, joints = pose_files(tmp_path)
    drawn = control_image("pose_body", detector, network)
    scores = np.full((JOINTS, 1), 0.8, np.float32)
    scores[9] = 0
    pose = Pose(np.concatenate([joints, scores], axis=1).astype(np.float32))
    assert np.allclose(pose.body[1, :2], (joints[5] + joints[6]) / 2)
    assert np.allclose(pose.body[[0, 2, 5, 8, 14, 17], :2], joints[[0, 6, 5, 12, 2, 3]])
    assert pose.body[7, 2] < 0.3
    expected = draw_poses([pose], 128, 64, body=True, hands=False, face=False)
    assert (drawn == expected).mean() > 0.99
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 10
    parts = {}
    for method in ("pose_hand", "pose_face", "pose_faceonly", "pose_full"):
        parts[method] = control_image(method, detector, network)
    assert (parts["pose_full"] != parts["pose_hand"]).any()
    assert (parts["pose_full"] != parts["pose_face"]).any()
    colours = np.unique(parts["pose_faceonly"].reshape(-1, 3), axis=0)
    assert colours.tolist() == [[0, 0, 0], [255, 255, 255]]


def test_joints_of_another_skeleton_are_refused(tmp_path: Path) -> None:
    """17 joints are no whole body; which of the two files is meant is said."""
    detector, _, _ = pose_files(tmp_path)
    other = vision_files.constant(tmp_path / "coco.onnx", [np.ones((1, 17, 96)), np.ones((1, 17, 128))], (48, 64))
    with pytest.raises(Refused, match=r"coco\.onnx: It does not answer the 133 joints"):
        control_image("pose_full", detector, other)


def test_a_body_is_drawn_as_openpose_does() -> None:
    """A single limb from neck to right shoulder: red at 0.6 of its brightness, joints full; nothing for one joint."""
    joints = np.zeros((JOINTS, 3), np.float32)
    joints[5], joints[6] = (100, 40, 1), (20, 40, 1)
    drawn = draw_poses([Pose(joints)], 128, 80, body=True, hands=True, face=True)
    assert drawn[40, 40].tolist() == [153, 0, 0]
    assert drawn[40, 80].tolist() == [153, 51, 0]
    assert drawn[40, 60].tolist() == [255, 85, 0]
    assert drawn[40, 20].tolist() == [255, 170, 0]
    assert drawn[60:].max() == 0
    joints[6, 0] = np.inf
    assert draw_poses([Pose(joints)], 128, 80, body=True, hands=True, face=True).shape == (80, 128, 3)


def test_an_onnx_classifier_answers_labels_by_score(tmp_path: Path) -> None:
    """The softmax of its logits; names from the metadata, as a list or a dictionary, numbers without them."""
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 0] = 255
    for names, label in (({0: "safe", 1: "not", 2: "odd"}, "safe"), (["a", "b", "c"], "a"), ("__import__('os')", "0")):
        file = vision_files.classifier(tmp_path / "classifier.onnx", names)
        found = asked("classify", file, picture=red)[0]["labels"]
        logits = 4 * (np.array([1.0, 0, 0]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        assert found[0][0] == label
        assert np.isclose(found[0][1], np.exp(logits)[0] / np.exp(logits).sum(), atol=1e-5)
        assert np.isclose(sum(score for _, score in found), 1, atol=1e-5)


def depth_anything(folder: Path, **changes: object) -> DepthAnythingForDepthEstimation:
    """A tiny Depth-Anything with random weights, saved with its processor."""
    torch.manual_seed(3)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=42, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8, **changes,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config).eval()
    for weights in model.parameters():  # as initialized, the last layer answers nothing but zeros
        torch.nn.init.normal_(weights, 0.01, 0.15)
    model.save_pretrained(folder)
    DPTImageProcessorPil(
        size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return model


def test_depth_anything_from_a_folder_equals_transformers(tmp_path: Path) -> None:
    """Its own processor before and behind it; metric depth is inverted, so near is white."""
    for name, changes in (("relative", {}), ("metric", {"depth_estimation_type": "metric", "max_depth": 80})):
        model = depth_anything(tmp_path / name, **changes)
        processor = DPTImageProcessorPil.from_pretrained(tmp_path / name)
        with torch.inference_mode():
            stock = model(**processor(images=PICTURE, return_tensors="pt"))
        depth = processor.post_process_depth_estimation(stock, target_sizes=[(64, 128)])[0]["predicted_depth"].numpy()
        near = -depth if changes else depth
        expected = np.rint((near - near.min()) / (near.max() - near.min()) * 255)
        found: Pixels = control_image("depth", tmp_path / name)
        assert np.abs(found[..., 0] - expected).max() <= 2
        assert expected.std() > 10


def test_a_classifier_from_a_folder_equals_transformers(tmp_path: Path) -> None:
    """Labels and scores of a tiny ViT; several labels at once where the configuration says so."""
    torch.manual_seed(5)
    for kind in ("single_label_classification", "multi_label_classification"):
        labels = {0: "normal", 1: "nsfw", 2: "drawing"}
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=16, id2label=labels, problem_type=kind,
        )  # fmt: skip
        model = ViTForImageClassification(config).eval()
        model.save_pretrained(tmp_path / kind)
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        processor.save_pretrained(tmp_path / kind)
        with torch.inference_mode():
            logits = model(**processor(images=PICTURE, return_tensors="pt")).logits[0]
        scores = torch.sigmoid(logits) if kind.startswith("multi") else logits.softmax(0)
        found = asked("classify", tmp_path / kind)[0]["labels"]
        assert [label for label, _ in found] == [labels[int(number)] for number in scores.argsort(descending=True)]
        assert np.allclose([score for _, score in found], scores.sort(descending=True)[0], atol=1e-4)


def test_without_onnx_runtime_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what to install."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Refused, match=r"c\.onnx: It needs ONNX Runtime: pip install onnxruntime"):
        asked("classify", vision_files.classifier(tmp_path / "c.onnx", None))


async def test_folders_work_in_the_process_itself(tmp_path: Path) -> None:
    """There torch and transformers have no home, no hub, few files and bounded memory; the result is the same."""
    depth_anything(tmp_path / "depth")
    worker = VisionWorker(memory=4 * 2**30, seconds=100, threads=1)
    try:
        found = await worker.control_image("depth", [tmp_path / "depth"], PICTURE, {})
        boxes = await worker.detect(vision_files.constant(tmp_path / "v8.onnx", [LAYOUTS["yolov8"]], SIDE), PICTURE)
        labels = await worker.classify(vision_files.classifier(tmp_path / "c.onnx", ["a", "b", "c"]), PICTURE)
    finally:
        await worker.close()
    assert np.abs(found.astype(int) - control_image("depth", tmp_path / "depth")).max() <= 1
    assert [box.label_number for box in boxes] == [0, 1]
    assert np.allclose(boxes[0][:4], BOX, atol=1e-3)
    assert {label for label, _ in labels} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"auto_map": {"AutoModelForDepthEstimation": "evil.Evil"}}, "asks for code or weights"),
        ({"backbone": "resnet50", "use_pretrained_backbone": True}, "asks for code or weights"),
        ({"quantization_config": {"quant_method": "gptq"}}, "asks for code or weights"),
        ({"model_type": "unknown"}, "transformers cannot load it"),
        ("adapter_config.json", "names other files"),
        ("model.safetensors.index.json", "names other files"),
        ("-model.safetensors", "lacks"),
        ("pickle", "transformers cannot load it"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_hostile_folder_is_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    """No code, no other files, no pickle under the name of safetensors."""
    depth_anything(tmp_path / "depth")
    folder = tmp_path / "depth"
    (folder / "evil.py").write_text("raise SystemExit")
    config = folder / "config.json"
    if isinstance(change, dict):
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    elif change == "pickle":
        torch.save({"a": torch.zeros(3)}, folder / "model.safetensors")
    elif change == "-model.safetensors":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif change.endswith(".json"):
        (folder / change).write_text("{}")
    else:
        config.write_text(change)
    with pytest.raises(Refused, match=f"^depth: .*{sentence}"):
        control_image("depth", folder)
