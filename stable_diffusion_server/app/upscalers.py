"""The upscalers of this server: filters, the embedded network, and the files in MODELS_DIR."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.generation import ChosenUpscaler
from stable_diffusion_server.imaging import Pixels, Resampling, crop_to_aspect, upscale
from stable_diffusion_server.pipelines import UPSCALER_TILES, UpscalerFiles
from stable_diffusion_server.settings import Settings

_FILTERS = {resampling.lower(): resampling for resampling in Resampling}


class Upscalers:
    """Finds upscalers by name and enlarges images. Thread-safe; its methods block. Loads nothing before its first use.

    A network is loaded onto the device of the models, and stays loaded while no other two are used.
    """

    def __init__(self, settings: Settings) -> None:
        folder = settings.data_dir
        self._device_name = settings.device
        self._files = UpscalerFiles(settings.models_dir, folder / "upscaler-files.json", folder / "upscalers.json")
        self._lock = threading.Lock()
        self._networks: Any = None

    def factors(self) -> Mapping[str, float]:
        """Return the names of all upscalers, the filters first, with the usual factor of each."""
        return {**dict.fromkeys((resampling.value for resampling in Resampling), 4.0), **self._files.factors()}

    def find(self, name: str, field: str) -> ChosenUpscaler:
        """Return the upscaler of a name. Raises `InvalidInput` for `field`."""
        if (resampling := _FILTERS.get(name.strip().lower())) is not None:
            return ChosenUpscaler(resampling.value, resampling.value)
        file = self._files.find(name, field)
        return ChosenUpscaler(file.name, f"{file.digest}/{UPSCALER_TILES}")

    def enlarge(self, name: str, pixels: Pixels, width: int, height: int, report: Callable[[int, int], None]) -> Pixels:
        """Enlarge an image (uint8, height × width × 3), cutting off evenly what exceeds the aspect ratio.

        Lanczos makes a result that is no larger than the image. `report` receives how many tiles are done, of how many;
        what it raises ends the work. Raises `InvalidInput` for an unusable upscaler, `OutOfMemory`, `NotFinite`.
        """
        resampling = _FILTERS.get(name.strip().lower())
        if resampling is None and width <= pixels.shape[1] and height <= pixels.shape[0]:
            resampling = Resampling.LANCZOS
        if resampling is not None:
            report(0, 1)
            return upscale(pixels, width, height, resampling)
        file = self._files.find(name, "upscaler")
        try:
            enlarged: Pixels = self._loaded().enlarge(
                file, crop_to_aspect(pixels, width, height), width, height, report
            )
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field="upscaler") from error
        return enlarged

    def _loaded(self) -> Any:
        with self._lock:
            if self._networks is None:
                # Imported on a thread of the upscaler: importing torch takes seconds.
                from stable_diffusion_server.pipelines.upscaling.upscaler import NetworkUpscaler

                self._networks = NetworkUpscaler(self._device_name)
            return self._networks
