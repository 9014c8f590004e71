"""Requests with different adapters in one forward pass: each as it is drawn alone, on one thread and on several."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import TRAINED
from drawing import MODELS_DIR, draw, draw_together, job_for
from lora_layouts import write

from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_pipeline
from stable_diffusion_server.pipelines.model_spec import TRUE_GUIDANCE

pytestmark = pytest.mark.slow

KINDS: dict[str, Any] = {"sdxl": Sdxl, "flux": Flux}
# Files by name, and the sets of adapters of eight requests: five different ones, and one without.
FILES = {
    "sdxl": {"lora": "kohya", "locon": "kohya LoCon", "clip": "OneTrainer, text encoder 2", "other": "diffusers"},
    "flux": {"lora": "ai-toolkit", "locon": "kohya", "clip": "kohya, text encoders", "other": "XLabs"},
}
OTHERS = {
    "sdxl": {"loha": "LoHa", "lokr": "LoKr", "dora": "DoRA by rows", "columns": "DoRA by columns"},
    "flux": {"loha": "LoHa", "lokr": "LoKr", "dora": "DoRA"},
}
SETS: list[tuple[tuple[str, float], ...]] = [
    (("lora", 1.0),), (("locon", 0.8),), (), (("lora", 1.0),),
    (("other", -1.0), ("locon", 0.5)), (("clip", 1.0),), (("lora", 0.4), ("other", 0.4), ("locon", 0.4)), (),
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Any:
    """A family with files in a folder."""
    name, folder = request.param, tmp_path_factory.mktemp("adapters")
    pipeline, spec = load_pipeline(MODELS[name], MODELS_DIR, torch.device("cpu")), MODELS[name]
    for stem, trainer in {**FILES[name], **OTHERS[name]}.items():
        write(folder / f"{stem}.safetensors", TRAINED[name][trainer].file(pipeline)[0])
    return KINDS[name](pipeline, spec, loras=LoraManager(pipeline, folder))


def request_of(family: Any, loras: tuple[tuple[str, float], ...], seed: int, **changes: Any) -> Any:
    times = 8 if family.spec.name == "sdxl" else 1  # of its picture at 64 × 64 little depends on a few layers
    scaled = tuple((name, times * weight) for name, weight in loras)
    quick = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": seed, "loras": scaled}
    return job_for(family.spec.name, **quick, **changes)


class Passes:
    """Counts the passes of a denoiser, and their rows."""

    def __init__(self, family: Any) -> None:
        self.rows: list[int] = []
        denoiser = getattr(family.pipeline, "unet", None) or family.pipeline.transformer
        self._handle = denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.rows.append(len(kwargs.get("sample", kwargs.get("hidden_states"))))

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *args: object) -> None:
        self._handle.remove()


def test_eight_requests_with_five_sets_of_adapters_share_each_pass(family: Any) -> None:
    """Three steps are three passes, and each picture is within one step of 255 of the one drawn alone."""
    jobs = [request_of(family, loras, seed) for seed, loras in enumerate(SETS)]
    assert len(set(SETS)) == 6
    alone = [draw(family, job).astype(int) for job in jobs]
    with Passes(family) as passes:
        together = draw_together(family, jobs)
    assert len(passes.rows) == 3
    for mine, expected in zip(together, alone, strict=True):
        assert abs(mine.astype(int) - expected).max() <= 1
    plain = [draw(family, request_of(family, (), seed)).astype(int) for seed in range(8)]
    effects = [abs(mine - own).max() for mine, own, loras in zip(alone, plain, SETS, strict=True) if loras]
    assert min(effects) >= 2


def test_other_methods_share_passes_too(family: Any) -> None:
    """LoHa, LoKr and DoRA beside LoRA and beside none, and two methods in one request."""
    names = [*OTHERS[family.spec.name]]
    sets = [*(((name, 1.0),) for name in names), (("lora", 1.0),), (), (("loha", 0.5), ("lora", 1.0), ("dora", 0.7))]
    jobs = [request_of(family, loras, seed) for seed, loras in enumerate(sets)]
    alone = [draw(family, job).astype(int) for job in jobs]
    with Passes(family) as passes:
        together = draw_together(family, jobs)
    assert len(passes.rows) == 3
    for mine, expected in zip(together, alone, strict=True):
        assert abs(mine.astype(int) - expected).max() <= 1


def test_requests_with_other_numbers_of_rows_share_a_pass(family: Any) -> None:
    """With and without guidance by a negative prompt, each with its own adapter; joining one after the other."""
    guided: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": "grey"}
    if family.spec.name == "flux":
        guided["extra"] = ((TRUE_GUIDANCE, 3.0),)
    jobs = [
        request_of(family, (("lora", 1.0),), 1, **guided),
        request_of(family, (("locon", 1.0),), 2, guidance_scale=1.0),
        request_of(family, (), 3, **guided),
    ]
    alone = [draw(family, job).astype(int) for job in jobs]
    states: list[Any] = []
    for job in jobs:
        states.append(family.prepare(job))
        family.step([state for state in states if not state.done])
    while any(not state.done for state in states):
        family.step([state for state in states if not state.done])
    for state, expected in zip(states, alone, strict=True):
        assert abs(family.finish(state).pixels.astype(int) - expected).max() <= 1


def test_two_threads_draw_with_different_adapters_at_once(family: Any) -> None:
    """Bit for bit as alone: nothing that threads share is changed. This is what several engine workers do."""
    jobs = [request_of(family, loras, 5) for loras in ((("lora", 1.0),), (("locon", 1.0),), (), (("clip", 1.0),))]
    alone = [draw(family, job) for job in jobs]
    meeting = threading.Barrier(len(jobs))

    def one(job: Any) -> Any:
        state = family.prepare(job)
        meeting.wait(60)
        while not state.done:
            family.step([state])
        return family.finish(state).pixels

    with ThreadPoolExecutor(len(jobs)) as threads:
        for drawn, expected in zip(threads.map(one, jobs), alone, strict=True):
            assert (drawn == expected).all()


def test_an_adapter_that_overflows_spoils_its_own_row_alone(family: Any, tmp_path: Path) -> None:
    """Finite weights whose product is not: the other rows of the pass are as they are alone."""
    folder = family.loras._folder.folder
    huge = TRAINED[family.spec.name][FILES[family.spec.name]["lora"]].file(family.pipeline)[0]
    write(folder / "huge.safetensors", {k: t * 1e30 if "alpha" not in k else t for k, t in huge.items()})
    jobs = [request_of(family, loras, 7) for loras in ((("lora", 1.0),), (("huge", 1.0),), ())]
    alone = [draw(family, jobs[0]).astype(int), draw(family, jobs[2]).astype(int)]
    states = [family.prepare(job) for job in jobs]
    while not states[0].done:
        family.step(states)
    assert not torch.isfinite(states[1].latents).all()
    for state, expected in zip((states[0], states[2]), alone, strict=True):
        assert abs(family.finish(state).pixels.astype(int) - expected).max() <= 1
