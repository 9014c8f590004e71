"""Loads and unloads models at the wish of the operator, and reads MODELS_DIR again."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import structlog

from stable_diffusion_server.app.model_choice import file_stamp
from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.engine import Engine
from stable_diffusion_server.errors import ModelLoadError, ModelStays
from stable_diffusion_server.generation import DecodedPixels
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import Caller

_log = structlog.get_logger(__name__)


class ModelManager:
    """Changes which models are in memory, and which are known. For one event loop."""

    def __init__(self, settings: Settings, state: ModelState, engine: Engine[DecodedPixels]) -> None:
        self._settings = settings
        self._state = state
        self._engine = engine
        self._stamps = self._read_stamps(state.asked)
        self._refreshing = asyncio.Lock()

    async def load(self, model: str, caller: Caller) -> None:
        """Load a model, and return when it is loaded. A model whose files could not be used before is tried again.

        Raises `ModelLoadError`, `NotReady` and `QueueFull`. Cancelling the call ends the load unless requests wait.
        """
        if model in self._state.facts:
            self._state.unusable.pop(self._state.facts[model].name, None)
        elif model in self._state.unusable:
            raise ModelLoadError(self._state.unusable[model])
        await asyncio.wrap_future(self._engine.load_model(model, owner=caller.share).result)

    async def unload(self, model: str) -> None:
        """Unload a model as soon as no request uses it, and return then. Raises `NotReady` and `ModelStays`."""
        await asyncio.wrap_future(self._engine.unload_model(model))

    async def refresh(self) -> None:
        """Read MODELS_DIR again: new files become models, and removed or replaced ones are unloaded.

        Raises `ModelLoadError` if nothing can be used any more, `ModelStays` where models are not loaded on demand.
        """
        async with self._refreshing:
            state = self._state
            new = await asyncio.to_thread(ModelState.of, self._settings)
            if new.fault is not None:
                raise ModelLoadError(new.fault.detail)
            stamps = await asyncio.to_thread(self._read_stamps, new.asked)
            changed = {
                name
                for name in {*state.asked, *new.asked}
                if state.asked.get(name) != new.asked.get(name) or self._stamps.get(name) != stamps.get(name)
            }
            if changed and not getattr(state.models, "on_demand", False):
                raise ModelStays("The models were loaded at the start; other files are used after a restart.")
            await self._unload_loaded(changed)
            self._stamps = stamps
            state.refresh(new, changed)
            await self._unload_loaded(changed)  # what requests had loaded again, as it was before
            _log.info("MODELS_DIR was read again", changed=len(changed), models=len(state.asked))

    async def _unload_loaded(self, models: Collection[str]) -> None:
        loaded = self._state.models
        for name in (name for name in models if loaded is not None and loaded.is_loaded(name)):
            await self.unload(name)

    def _read_stamps(self, models: Mapping[str, ModelSpec]) -> dict[str, tuple[object, ...]]:
        return {name: file_stamp(self._settings, spec) for name, spec in models.items()}
