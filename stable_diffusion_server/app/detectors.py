"""The detectors of this server: the ONNX files in MODELS_DIR that find faces, hands and the like."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.generation import ChosenDetector, DetectedPart, NoDetector
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines import PictureModelFiles, PictureModelRole, PictureModels

_ROLE = PictureModelRole.DETECTOR
# Least score of the boxes that a detector is asked for; a request's own `confidence` counts after it.
_LEAST_SCORE = 0.05


class Detectors(NoDetector):
    """Finds parts of images by detector files. For one event loop; nothing is loaded before its first use."""

    def __init__(self, files: PictureModelFiles, models: PictureModels) -> None:
        self._files = files
        self._models = models

    def names(self) -> Sequence[str]:
        """Return the names of the detectors. Reads folders."""
        return [file.name for file in self._files.files(_ROLE)]

    def find(self, name: str, field: str) -> ChosenDetector:
        """Return the detector of a name, with the digest of its file. Raises `InvalidInput` for `field`."""
        file = self._files.find(name, _ROLE, field)
        try:
            return ChosenDetector(file.name, self._files.digest(file))
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field=field) from error

    async def detect(self, name: str, pixels: Pixels, field: str, *, share: str = "") -> Sequence[DetectedPart]:
        """Return the parts that a detector finds in an image (uint8, height × width × 3).

        Raises `InvalidInput` for `field` if its file cannot be used, ends its process or takes too long.
        """
        file = await asyncio.to_thread(self._files.find, name, _ROLE, field)
        try:
            boxes = await self._models.detect(file.path, pixels, least_score=_LEAST_SCORE, share=share)
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field=field) from error
        return [DetectedPart((box.left, box.top, box.right, box.bottom), box.score, box.label) for box in boxes]
