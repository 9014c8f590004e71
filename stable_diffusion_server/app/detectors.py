"""The detectors of details, such as faces, whose files are in MODELS_DIR."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.generation import ChosenDetector, DetectedPart
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines import PictureModelFiles, PictureModelRole, PictureModels

# Below it detectors find noise; requests choose their own confidence above it.
_LEAST_SCORE = 0.05
_FIELD = "repairs"


class Detectors:
    """Finds parts of images by files in MODELS_DIR, in the process for models. For one event loop."""

    def __init__(self, files: PictureModelFiles, models: PictureModels) -> None:
        self._files = files
        self._models = models

    def names(self) -> Sequence[str]:
        """Return the names of the detectors. Reads folders."""
        return [file.name for file in self._files.files(PictureModelRole.DETECTOR)]

    def find(self, name: str, field: str) -> ChosenDetector:
        """Return the detector of a name. Reads its file. Raises `InvalidInput` for `field`."""
        file = self._files.find(name, PictureModelRole.DETECTOR, field)
        try:
            return ChosenDetector(file.name, self._files.digest(file))
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field=field) from error

    async def detect(self, name: str, pixels: Pixels) -> Sequence[DetectedPart]:
        """Return the parts of an image (uint8, height × width × 3), the highest score first.

        Raises `InvalidInput` for a file that is gone, cannot be used or ends its process, `NotReady`.
        """
        file = await asyncio.to_thread(self._files.find, name, PictureModelRole.DETECTOR, _FIELD)
        try:
            found = await self._models.detect(file.path, pixels, least_score=_LEAST_SCORE)
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field=_FIELD) from error
        return [DetectedPart(box[:4], box.score, box.label) for box in found]
