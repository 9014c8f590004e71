"""Models that look at pictures are found by name, identified by content, and used by preprocessors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import vision_files

from stable_diffusion_server.app.preprocessors import Preprocessors
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging import PREPROCESSORS, Pixels, canny
from stable_diffusion_server.pipelines import FoundBox, ModelLibrary, PictureModelFiles, PictureModelRole, VisionWorker

PICTURE = cv2.resize(np.random.default_rng(6).integers(0, 256, (5, 8, 3), np.uint8), (160, 100))


class NoModels:
    """Models that nobody asks."""

    async def control_image(
        self, method: str, files: Sequence[Path], pixels: Pixels, options: Mapping[str, float], *, share: str = ""
    ) -> Pixels:
        raise AssertionError

    async def detect(self, file: Path, pixels: Pixels, *, least_score: float = 0.3, share: str = "") -> list[FoundBox]:
        raise AssertionError

    async def classify(self, file: Path, pixels: Pixels, *, share: str = "") -> list[tuple[str, float]]:
        raise AssertionError


def door(*folders: Path) -> Preprocessors:
    return Preprocessors(PictureModelFiles(folders), NoModels())


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "preprocessors"),
    [
        ("annotators/Depth-Anything-V2-Small/model.onnx", {"depth", "depth_anything_v2", "normal_depth"}),
        ("controlnet_annotators/dpt_hybrid.onnx", {"depth", "depth_midas", "normal_depth"}),
        ("ControlNetPreprocessor/ControlNetHED.onnx", {"softedge_hed", "softedge_hedsafe", "scribble_hed"}),
        ("annotators/table5_pidinet.onnx", {"softedge_pidinet", "softedge_pidisafe", "scribble_pidinet"}),
        ("annotators/sk_model.onnx", {"lineart_realistic"}),
        ("annotators/sk_model2.onnx", {"lineart_coarse"}),
        ("annotators/netG.onnx", {"lineart_anime"}),
        ("annotators/HEDNet.onnx", {"softedge_hed", "softedge_hedsafe", "scribble_hed"}),
        ("annotators/ZoeD_M12_N.onnx", {"depth", "depth_zoe", "normal_depth"}),
        ("annotators/scannet-bae.onnx", {"normal_bae"}),
        ("annotators/sketched_dptx_zoey_baes.onnx", set()),
        ("annotators/yolox_l.onnx", set()),
        ("annotators/readme.txt", set()),
        ("annotators/depth.safetensors", set()),
        ("other/depth.onnx", set()),
        ("depth.onnx", set()),
        ("annotators/.depth.onnx", set()),
    ],
)
def test_a_file_enables_the_preprocessors_that_its_name_says(
    tmp_path: Path, name: str, preprocessors: set[str]
) -> None:
    """By the folders of AUTOMATIC1111 and Forge and the usual names; nothing is read of the files."""
    touch(tmp_path / name)
    files = door(tmp_path)
    assert {row.name for row in files.usable() if row.draw is None} == preprocessors


def test_a_pose_needs_both_of_its_files(tmp_path: Path) -> None:
    """Which one is missing is said."""
    touch(tmp_path / "annotators" / "yolox_l.onnx")
    with pytest.raises(InvalidInput, match=r"openpose_full needs DWPose in MODELS_DIR/annotators"):
        door(tmp_path).find("dw_openpose_full", {}, "controls")
    touch(tmp_path / "annotators" / "dw-ll_ucoco_384.onnx")
    assert len(door(tmp_path).find("dw_openpose_full", {}, "controls").files) == 2


def test_a_replaced_file_is_another_identity(tmp_path: Path) -> None:
    """Content, options and preprocessor decide; so a stored image of the old network is not answered."""
    file = touch(tmp_path / "annotators" / "midas.onnx", b"one")
    first = door(tmp_path).find("normal_midas", {}, "controls").identity
    assert door(tmp_path).find("normal_depth", {"background": 0.4}, "controls").identity == first
    assert door(tmp_path).find("normal_depth", {"background": 0.5}, "controls").identity != first
    assert door(tmp_path).find("depth_midas", {}, "controls").identity != first
    touch(file, b"two")
    assert door(tmp_path).find("normal_midas", {}, "controls").identity != first


def test_a_folder_of_transformers_is_a_model(tmp_path: Path) -> None:
    """One with safetensors and a configuration, at any depth; its files together are its digest."""
    folder = tmp_path / "annotators" / "hf" / "depth-anything-v2-small"
    touch(folder / "config.json", b"{}")
    assert door(tmp_path).usable()[-1].draw is not None
    touch(folder / "model.safetensors")
    files = PictureModelFiles([tmp_path])
    (found,) = files.files(PictureModelRole.ANNOTATOR)
    assert (found.name, found.path) == ("hf/depth-anything-v2-small", folder)
    digest = files.digest(found)
    touch(folder / "preprocessor_config.json", b"{}")
    assert PictureModelFiles([tmp_path]).digest(found) != digest


def test_detectors_and_classifiers_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    """With folders or ending or neither, in any case; names of other places are not names."""
    touch(tmp_path / "ultralytics" / "bbox" / "face_yolov8n.onnx")
    touch(tmp_path / "classifiers" / "nsfw.onnx")
    files = PictureModelFiles([tmp_path, tmp_path / "missing"])
    for name in (
        "face_yolov8n",
        "Face_YOLOv8n.onnx",
        "face_yolov8n.pt",
        "bbox/face_yolov8n",
        " bbox/face_yolov8n.onnx ",
    ):
        assert files.find(name, PictureModelRole.DETECTOR, "detector").name == "bbox/face_yolov8n"
    assert files.find("nsfw", PictureModelRole.CLASSIFIER, "x").path.name == "nsfw.onnx"
    for name in ("nsfw", "../classifiers/nsfw", "/etc/passwd", "", "x" * 9000, str(tmp_path / "classifiers/nsfw.onnx")):
        with pytest.raises(InvalidInput, match="not a detector here") as caught:
            files.find(name, PictureModelRole.DETECTOR, "detector")
        assert len(caught.value.detail) < 400


def test_models_that_look_at_pictures_are_none_that_draw(tmp_path: Path) -> None:
    """The library does not list them as unusable models, so the embedded ones stay where there are no others."""
    touch(tmp_path / "Annotators" / "midas.onnx")
    for folder in ("annotators/depth", "detectors/x", "classifiers/vit"):
        touch(tmp_path / folder / "config.json", b"{}")
        touch(tmp_path / folder / "model.safetensors")
    touch(tmp_path / "checkpoints" / "annotators" / "kept.safetensors")
    library = ModelLibrary([tmp_path])
    library.refresh()
    assert [model.name for model in library.models] == ["annotators/kept"]


def test_circular_links_and_unreadable_folders_end(tmp_path: Path) -> None:
    """The walk enters each folder once."""
    touch(tmp_path / "annotators" / "midas.onnx")
    (tmp_path / "annotators" / "again").symlink_to(tmp_path / "annotators")
    os.symlink(tmp_path / "nowhere", tmp_path / "annotators" / "hed.onnx")
    assert "depth_midas" in {row.name for row in door(tmp_path).usable()}
    with pytest.raises(InvalidInput):
        door(tmp_path).find("softedge_hed", {}, "controls")


def test_what_needs_no_model_works_without_folders() -> None:
    """And every name of the table is either usable or refused by what it needs."""
    empty = door()
    usable = {row.name for row in empty.usable()}
    for row in PREPROCESSORS.values():
        if row.draw is not None:
            assert empty.find(row.name, {}, "controls").row is row
            assert row.name in usable
        else:
            with pytest.raises(InvalidInput, match="MODELS_DIR/annotators"):
                empty.find(row.name, {}, "controls")


@pytest.mark.slow
async def test_the_front_door_draws_by_a_model(tmp_path: Path) -> None:
    """Scaled to the resolution first; a file that is no network is refused for the field, and nothing else fails."""
    vision_files.weighted_channels(tmp_path / "annotators" / "midas.onnx", (1, 0, 0))
    touch(tmp_path / "annotators" / "hed.onnx", b"\x80\x04pickle")
    worker = VisionWorker(seconds=60, threads=1)
    made = Preprocessors(PictureModelFiles([tmp_path]), worker)
    try:
        chosen = made.find("depth", {"resolution": 64}, "controls")
        drawn = await made.preprocess(chosen, PICTURE, "controls")
        assert drawn.shape == (64, 102, 3)
        assert drawn.min() == 0
        assert drawn.max() == 255
        with pytest.raises(InvalidInput, match=r"hed\.onnx cannot be used\. It is not an ONNX file") as caught:
            await made.preprocess(made.find("hed", {}, "controls[0]"), PICTURE, "controls[0]")
        assert caught.value.field == "controls[0]"
        edges = made.find("canny", {}, "controls")
        assert (await made.preprocess(edges, PICTURE, "controls") == canny(PICTURE)).all()
    finally:
        await worker.close()
