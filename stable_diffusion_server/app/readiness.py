"""Reports whether the server can generate images, and the reasons if it cannot."""

from __future__ import annotations

from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.generation import DecodedPixels
from stable_diffusion_server.imaging import DecoderPool
from stable_diffusion_server.jobs import JobManager


class Readiness:
    """The state that `/readyz` reports: storage failures, stalled parts, missing models, engine state."""

    def __init__(self, models: ModelState, stores: StorageStack) -> None:
        self._models = models
        self._stores = stores
        self._engine: Engine[DecodedPixels] | None = None
        self._decoder: DecoderPool | None = None
        self._jobs: JobManager | None = None
        self._storage_faults: dict[str, str] = {}

    def watch(self, engine: Engine[DecodedPixels], decoder: DecoderPool, jobs: JobManager) -> None:
        """Set the parts that are built after this object: the engine needs this object to announce that it is ready."""
        self._engine, self._decoder, self._jobs = engine, decoder, jobs

    def open_stores(self) -> None:
        """Open the storage. `missing` reports failures, and retries."""
        self._stores.open(self._storage_faults)

    def missing(self) -> list[str]:
        """Return why the server cannot generate images, as sentences without duplicates; empty if it can."""
        if self._storage_faults:
            self.open_stores()
        bucket = self._stores.bucket.health()
        found = [*self._storage_faults.values(), bucket, *self.stalled(), *self._models.missing()]
        reasons = [*dict.fromkeys(filter(None, found))]
        engine = self._engine
        if engine is not None and engine.state is not EngineState.READY:
            reasons.append(self._models.progress() or engine.reason)
        return reasons

    def stalled(self) -> list[str]:
        """Return the parts that have work but make no progress, as sentences."""
        parts = (
            self._decoder.health() if self._decoder is not None else None,
            self._jobs.health() if self._jobs is not None else None,
        )
        return [fault for fault in parts if fault is not None]
