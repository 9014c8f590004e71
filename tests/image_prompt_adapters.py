"""Stand-ins for IP-Adapters: facts about files that are nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser

from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.app.models import generation_options
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import GenerationOptions
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.settings import Settings


@dataclass(frozen=True, slots=True)
class KnownAdapter:
    """A name and a digest."""

    name: str
    digest: str
    takes_range: bool = True


@dataclass(frozen=True, slots=True)
class KnownAdapters:
    """Two adapters for SDXL, and one that counts at all steps; other models have none."""

    names: tuple[str, ...] = ("ip-adapter_sdxl", "ip-adapter-plus-face_sdxl", "redux")

    def usable(self, spec: ModelSpec) -> Sequence[str]:
        return self.names if spec.name == "sdxl" else ()

    def find(self, name: str | None, spec: ModelSpec) -> KnownAdapter:
        names = self.usable(spec)
        if name not in (None, *names):
            raise InvalidInput(f"{name!r} is not here; there are {', '.join(names)}.")
        known = name or names[0]
        return KnownAdapter(known, f"{names.index(known) + 10}" * 32, known != "redux")


@pytest.fixture
def prompted_app(run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunningApp]:
    """Make a running app with fake image models and the adapters that are known here."""
    build = generation_options

    def options(settings: Settings, models: ModelState, stores: StorageStack) -> GenerationOptions:
        return replace(build(settings, models, stores), image_prompts=KnownAdapters())

    monkeypatch.setattr("stable_diffusion_server.app.application.generation_options", options)
    return lambda **changes: run_app(FakeImageDenoiser(), **changes)
