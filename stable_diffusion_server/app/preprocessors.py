"""The preprocessors of this server: those that need no models, and those whose model files are in MODELS_DIR."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.generation import ChosenPreprocessor, InProcessPreprocessor
from stable_diffusion_server.imaging import (
    NO_PREPROCESSOR,
    PREPROCESSORS,
    RESOLUTION,
    Pixels,
    Preprocessor,
    find_preprocessor,
    to_resolution,
)
from stable_diffusion_server.pipelines import PictureModelFile, PictureModelFiles, PictureModels


class Preprocessors(InProcessPreprocessor):
    """Turns pictures into control images, also by models. For one event loop."""

    def __init__(self, files: PictureModelFiles, models: PictureModels) -> None:
        super().__init__()
        self._files = files
        self._models = models

    def usable(self) -> Sequence[Preprocessor]:
        """Return the preprocessors whose model files are there. Reads folders."""
        return [row for row in PREPROCESSORS.values() if row.draw is not None or None not in self._needed(row)]

    def find(self, name: str, options: Mapping[str, float], field: str, /) -> ChosenPreprocessor:
        """Return the preprocessor of a name or alias with checked options. Reads files.

        Raises `InvalidInput` for `field`, also for a missing model file.
        """
        if name.strip().lower() in (NO_PREPROCESSOR, ""):
            return super().find(name, options, field)
        row = find_preprocessor(name, field)
        if row.draw is not None:
            return super().find(name, options, field)
        values = row.values(options, field)
        try:
            digests = tuple(self._files.digest(file) for file in self._files_of(row, field))
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field=field) from error
        return ChosenPreprocessor(row, values, digests)

    async def preprocess(self, chosen: ChosenPreprocessor, pixels: Pixels, field: str, /, *, share: str = "") -> Pixels:
        """Return the control image of a picture (both uint8, height × width × 3).

        Raises `InvalidInput` for `field`, also if a model file cannot be used or ends its process.
        """
        row = chosen.row
        if row is None or row.draw is not None:
            return await super().preprocess(chosen, pixels, field, share=share)
        files = await asyncio.to_thread(self._files_of, row, field)
        values = dict(chosen.values)
        scaled = await asyncio.to_thread(to_resolution, pixels, values.pop(RESOLUTION, 0.0), field)
        try:
            return await self._models.control_image(
                row.method, [file.path for file in files], scaled, values, share=share
            )
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field=field) from error

    def _needed(self, row: Preprocessor) -> list[PictureModelFile | None]:
        return [self._files.fitting(need) for need in row.needs]

    def _files_of(self, row: Preprocessor, field: str) -> list[PictureModelFile]:
        """Return the model files of a preprocessor. Raises `InvalidInput` that says which are missing."""
        files = self._needed(row)
        lacking = [need.what for need, file in zip(row.needs, files, strict=True) if file is None]
        if lacking:
            sentence = f"{row.name} needs {' and '.join(lacking)} in MODELS_DIR/annotators, which is not there."
            raise InvalidInput(sentence, field=field)
        return [file for file in files if file is not None]
