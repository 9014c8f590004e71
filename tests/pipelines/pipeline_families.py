"""Fixtures: the families, once per session, since loading is slow and generation does not change them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """One thread: more threads only add timing noise at this size."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sdxl(one_thread: None) -> Any:
    """The embedded SDXL with its ControlNet."""
    import torch
    from drawing import MODELS_DIR

    from stable_diffusion_server.pipelines.catalog import MODELS
    from stable_diffusion_server.pipelines.families.sdxl import Sdxl
    from stable_diffusion_server.pipelines.loading.components import load_controlnet, load_pipeline

    facts, cpu = MODELS["sdxl"], torch.device("cpu")
    return Sdxl(load_pipeline(facts, MODELS_DIR, cpu), facts, load_controlnet(facts, MODELS_DIR, cpu))


@pytest.fixture(scope="session")
def flux(one_thread: None) -> Any:
    """The embedded Flux, with its ControlNet or, where there is none, one with random weights."""
    import torch
    from drawing import MODELS_DIR

    from stable_diffusion_server.pipelines.catalog import MODELS
    from stable_diffusion_server.pipelines.families.flux import Flux
    from stable_diffusion_server.pipelines.loading.components import load_controlnet, load_pipeline

    facts, cpu = MODELS["flux"], torch.device("cpu")
    pipeline = load_pipeline(facts, MODELS_DIR, cpu)
    return Flux(pipeline, facts, load_controlnet(facts, MODELS_DIR, cpu) or random_controlnet(pipeline))


@pytest.fixture(scope="session")
def families(sdxl: Any, flux: Any) -> dict[str, Any]:
    """Both by name, and `sdxl-4` and `flux-16`: the same with the latent channels that the stock pipelines require.

    The stock inpaint pipelines recognise latents by their number of channels, 4 and 16; embedded models may have
    another.
    """
    from reshaped_pipelines import reshaped

    from stable_diffusion_server.pipelines.families.flux import Flux
    from stable_diffusion_server.pipelines.families.sdxl import Sdxl

    with_four, with_sixteen = reshaped(sdxl.pipeline, 4), reshaped(flux.pipeline, 16)
    return {
        "sdxl": sdxl,
        "flux": flux,
        "sdxl-4": Sdxl(with_four, sdxl.spec, sdxl.controlnet if with_four is sdxl.pipeline else None),
        "flux-16": Flux(with_sixteen, flux.spec, random_controlnet(with_sixteen)),
    }


def random_controlnet(pipeline: Any) -> Any:
    """A small Flux ControlNet whose outputs are not the zeros of an untrained one."""
    import torch
    from diffusers import FluxControlNetModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = pipeline.transformer.config.items()
        config = {name: value for name, value in given if not name.startswith("_") and value is not None}
        network = FluxControlNetModel.from_config({**config, "num_layers": 1, "num_single_layers": 2})
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()
