"""Stand-ins for ControlNets: facts about networks that no file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from stable_diffusion_server.types import ControlKind


@dataclass(frozen=True, slots=True)
class KnownNetwork:
    """Facts about a network."""

    name: str
    digest: str
    kinds: tuple[ControlKind, ...]
    union: bool = False
    default_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class KnownNetworks:
    """The networks that guide SDXL; other models have none."""

    networks: tuple[KnownNetwork, ...] = (
        KnownNetwork("canny-sdxl", "ca" * 32, (ControlKind.CANNY,), default_weight=0.5),
        KnownNetwork("depth-sdxl", "de" * 32, (ControlKind.DEPTH,)),
        KnownNetwork("inpaint-sdxl", "1a" * 32, (ControlKind.INPAINT,)),
        KnownNetwork("promax", "0f" * 32, (ControlKind.CANNY, ControlKind.TILE, ControlKind.OPENPOSE), union=True),
    )

    def usable(self, spec: ModelSpec) -> Mapping[str, KnownNetwork]:
        return {one.name: replace(one, digest="") for one in self.networks} if spec.name == "sdxl" else {}

    def find(self, name: str | None, kind: ControlKind | None, spec: ModelSpec) -> KnownNetwork:
        for network in self.networks if spec.name == "sdxl" else ():
            if network.name == name or (name is None and kind in network.kinds):
                return network
        raise InvalidInput(f"{name or kind} is not here; there are {', '.join(one.name for one in self.networks)}.")


@pytest.fixture
def guided_app(run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunningApp]:
    """Make a running app with fake image models and the networks that are known here."""
    build = generation_options

    def options(settings: Settings, models: ModelState, stores: StorageStack) -> GenerationOptions:
        return replace(build(settings, models, stores), controlnets=KnownNetworks())

    monkeypatch.setattr("stable_diffusion_server.app.application.generation_options", options)
    return lambda **changes: run_app(FakeImageDenoiser(), **changes)
