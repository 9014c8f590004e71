"""Reading MODELS_DIR again while requests load models: nothing stays in memory as it was before."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeDenoiser, settings_in

from stable_diffusion_server.app.model_manager import ModelManager
from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.pipelines import MODELS, ModelSpec, ModelTable

NAMES = ("one", "two")


@dataclass
class Backend(FakeDenoiser):
    """Models in memory by name, and the specs that can be loaded."""

    on_demand: bool = True
    there: set[str] = field(default_factory=lambda: set(NAMES))
    specs: dict[str, ModelSpec] = field(default_factory=dict)

    def is_loaded(self, model: str) -> bool:
        return model in self.there

    def replace_specs(self, specs: Any) -> None:
        self.specs = dict(specs)


@dataclass
class UnloadingEngine:
    """While it unloads the second model, a request loads the first one again."""

    backend: Backend
    unloaded: list[str] = field(default_factory=list)

    def unload_model(self, model: str) -> Future[None]:
        self.unloaded.append(model)
        self.backend.there.discard(model)
        if len(self.unloaded) == len(NAMES):
            self.backend.there.add(self.unloaded[0])
        done: Future[None] = Future()
        done.set_result(None)
        return done


def asked(steps: int) -> dict[str, ModelSpec]:
    """Two models whose owner wants so many steps."""
    return {
        name: replace(next(iter(MODELS.values())), name=name, folder=name, default_steps=steps, unread=True)
        for name in NAMES
    }


def test_a_model_that_a_request_loaded_again_during_the_reading_is_unloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it stays unread and loaded: each of its requests would be told that the files were changed."""
    backend = Backend()
    engine: Any = UnloadingEngine(backend)
    state = ModelState(ModelTable(asked(4)), asked=asked(4), models=backend)  # type: ignore[arg-type]  # a fake
    manager = ModelManager(settings_in(tmp_path), state, engine)
    new = ModelState(ModelTable(asked(5)), asked=asked(5))
    monkeypatch.setattr(ModelState, "of", lambda settings: new)
    asyncio.run(manager.refresh())
    assert backend.there == set()
    assert engine.unloaded == [*engine.unloaded[:2], engine.unloaded[0]]
    assert {spec.default_steps for spec in [*backend.specs.values(), *state.facts.values()]} == {5}
