"""Previews without VAE decoding, the prompt cache, and what the registry offers the engine."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from drawing import disc_mask, draw, job_for, psnr, scene
from PIL import Image

from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.registry import LoadedFamily, Registry

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("task", ["text", "inpaint"])
def test_a_preview_shows_what_the_picture_is_going_to_be(family: str, task: str, families: dict[str, Any]) -> None:
    """Small, and closer to the final image step by step; half way it is distinguishable from any other."""
    more = {"image": scene(), "mask": disc_mask()} if task == "inpaint" else {}
    job = job_for(family, seed=3, num_inference_steps=8, **more)
    state, previews = families[family].prepare(job), []
    while not state.done:
        families[family].step([state])
        previews.append(families[family].preview(state))
    picture = np.asarray(Image.fromarray(families[family].finish(state).pixels).resize(previews[0].shape[1::-1]))
    assert {preview.dtype for preview in previews} == {np.dtype(np.uint8)}
    assert max(max(preview.shape) for preview in previews) <= 128
    likeness = [psnr(preview, picture) for preview in previews]
    print(f"\n{family}, {task}: PSNR of preview to picture {', '.join(f'{value:.1f}' for value in likeness)} dB")  # noqa: T201  # figures
    assert likeness[-1] > 15
    assert likeness[-1] >= likeness[0] - 1


def test_the_preview_of_a_large_picture_is_small(sdxl: Any) -> None:
    """Latents beyond 128 along a side are averaged, and the aspect ratio stays."""
    state = sdxl.prepare(job_for("sdxl", width=2048, height=512))
    assert sdxl.preview(state).shape == (32, 128, 3)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_prompt_is_encoded_once(family: str, families: dict[str, Any]) -> None:
    """The same words give the same tensors; other words, negative prompt or guidance are encoded again."""
    model = families[family]
    model.prompt_cache = PromptCache()
    first, again = (model.prepare(job_for(family, seed=seed)) for seed in (1, 2))
    assert len(model.prompt_cache) == 1
    assert torch.equal(first.conditioning.embeds, again.conditioning.embeds)
    before = draw(model, job_for(family))
    model.prepare(job_for(family, prompt="a green square"))
    assert len(model.prompt_cache) == 2
    if family == "sdxl":
        model.prepare(job_for(family, negative_prompt="blurred"))
        model.prepare(job_for(family, guidance_scale=1.0))
        assert len(model.prompt_cache) == 4
    assert (draw(model, job_for(family)) == before).all()


def test_encoded_prompts_are_kept_within_their_bytes() -> None:
    """The least recently used entry is evicted first, and an entry larger than the cache is not stored."""
    kept, made = PromptCache(limit_bytes=3 * 400), list[str]()

    def of(key: str, size: int = 100) -> torch.Tensor:
        def make() -> tuple[torch.Tensor, None]:
            made.append(key)
            return torch.zeros(size), None

        return kept.get_or_create(key, make)[0]

    for key in ("a", "b", "c", "a", "d"):
        of(key)
    assert (len(kept), kept.bytes) == (3, 1200)
    of("a")
    of("b")
    assert made == ["a", "b", "c", "d", "b"]
    of("too large", 1000)
    assert kept.bytes <= 1200


@pytest.mark.parametrize(("threads", "lanes"), [(1, 1), (2, 2), (8, 2)])
def test_two_workers_are_best_on_a_cpu_of_several_cores(
    threads: int, lanes: int, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless there is only one core."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # the machine is what is varied here
    families = [LoadedFamily(cast(Any, None), registry.models[info.name], info) for info in registry.loaded]
    assert Registry(families).best_workers == lanes


def test_the_registry_offers_what_the_engine_asks_for(registry: Any) -> None:
    """Previews, a number of workers, and no objection to workers on the CPU in full precision."""
    assert registry.unshareable == ""
    before = torch.get_num_threads()
    registry.share_cores(1)
    assert torch.get_num_threads() >= 1
    torch.set_num_threads(before)
    state = registry.prepare(job_for("flux"))
    assert registry.preview(state).shape == (128, 128, 3)
