"""The second pass of a request: what it does otherwise, what identifies it, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import disc
from test_resolver import HIRES, OPTIONS, OTHER_HIRES, UPLOADED, WITH_HIRES

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.hires_choices import latent_resize
from stable_diffusion_server.generation.interfaces import ChosenUpscaler
from stable_diffusion_server.generation.provenance import requested_fields
from stable_diffusion_server.generation.resolver import resolve_request
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.types import GenerationRequest, LatentResize, Task

PLAIN = GenerationRequest(Task.TEXT_TO_IMAGE, "a red disc", 64, 64, seed=7)
TWICE = replace(PLAIN, **HIRES)
# Digests of 2026-11, before second passes had anything of their own.
DIGESTS = {
    PLAIN: "e9188bfc36bc52741d758197772ed66d2fc2db1483a1bf575cc75e81785ba8b9",
    TWICE: "66bd7c08733ce1b67093fa6b9a8c023a9930fec71cfb1b0186e7dcc5a99e5ee3",
}


class OneUpscaler:
    """An upscaler file with a content."""

    def __init__(self, content: str = "1a") -> None:
        self.content = content

    def factors(self) -> Mapping[str, float]:
        return {"sharp": 2.0}

    def find(self, name: str, field: str) -> ChosenUpscaler:
        if name != "sharp":
            raise InvalidInput(f"{name!r} is not an upscaler here; there are sharp.", field=field)
        return ChosenUpscaler("sharp", self.content)

    def enlarge(self, name: str, pixels: Pixels, width: int, height: int, report: Callable[[int, int], None]) -> Pixels:
        return np.ascontiguousarray(disc(width, height))


def identities(request: GenerationRequest, **changes: Any) -> list[str]:
    plan = resolve_request(request, replace(OPTIONS, **changes))
    return [plan.key, plan.content_digest, plan.request_digest, plan.sent_digest]


@pytest.mark.parametrize("change", [*({name: value} for name, value in {**OTHER_HIRES, **WITH_HIRES}.items())], ids=str)
def test_what_changes_the_second_pass_changes_the_identity(change: dict[str, Any]) -> None:
    """Each of its parameters, alone."""
    other = identities(replace(TWICE, **change), upscaler=OneUpscaler())
    assert all(one != two for one, two in zip(identities(TWICE), other, strict=True))


def test_a_scale_is_another_identity_than_a_size() -> None:
    """Although the picture is the same: the size of an input image is not known when the key is made."""
    scaled = replace(PLAIN, hires_scale=2.0)
    assert identities(scaled) != identities(replace(PLAIN, hires_width=128, hires_height=128))
    assert identities(scaled) != identities(replace(scaled, hires_scale=1.5))


def test_an_upscaler_a_lora_and_an_embedding_are_known_by_their_content() -> None:
    """Another file of the same name is another picture; names of one upscaler are one."""
    asked = replace(TWICE, hires_upscaler="sharp", hires_loras=(("pastel", 1.0),))
    there = {"upscaler": OneUpscaler(), "loras": lambda: {"pastel": "1a"}}
    first = identities(asked, **there)
    assert first == identities(asked, **there)
    assert first != identities(asked, **{**there, "upscaler": OneUpscaler("2b")})
    assert first != identities(asked, **{**there, "loras": lambda: {"pastel": "2b"}})
    ways = [replace(TWICE, hires_upscaler=name) for name in ("latent-bicubic", "Latent (bicubic)", "LATENT BICUBIC")]
    assert len({tuple(identities(way)) for way in ways}) == 1


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"hires_width": 128}, {"hires_height"}),
        ({"hires_height": 128, "hires_scale": 2.0}, {"hires_width"}),
        ({**HIRES, "hires_scale": 2.0}, {"hires_scale"}),
        ({"hires_steps": 3, "hires_prompt": "a disc"}, {"hires_steps", "hires_prompt"}),
        ({"hires_scale": 0.5}, {"hires_scale"}),
        ({"hires_scale": float("nan")}, {"hires_scale"}),
        ({"hires_scale": 16.0, "width": 256, "height": 64}, {"hires_scale"}),
        ({**HIRES, "hires_width": 4096}, {"hires_width"}),
        ({**HIRES, "hires_guidance": 31.0}, {"hires_guidance"}),
        ({**HIRES, "hires_steps": 0, "hires_strength": 2.0}, {"hires_steps", "hires_strength"}),
        ({**HIRES, "hires_scheduler": "none"}, {"hires_scheduler"}),
        ({**HIRES, "hires_schedule": "none"}, {"hires_schedule"}),
        ({**HIRES, "hires_scheduler": "lcm", "hires_steps": 60}, {"hires_steps"}),
        ({**HIRES, "hires_prompt": " "}, {"hires_prompt"}),
        ({**HIRES, "hires_prompt": "a" * 40_000}, {"hires_prompt"}),
        ({**HIRES, "hires_negative_prompt": "a" * 40_000}, {"hires_negative_prompt"}),
        ({**HIRES, "hires_loras": (("none", 1.0),)}, {"hires_loras"}),
        ({**HIRES, "hires_loras": (("pastel", 1e9),)}, {"hires_loras"}),
        ({**HIRES, "hires_loras": (("pastel", 0.1),) * 5}, {"hires_loras"}),
        ({**HIRES, "hires_upscaler": "../sharp"}, {"hires_upscaler"}),
        ({**HIRES, "hires_upscaler": "latent-lanczos"}, {"hires_upscaler"}),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], fields: set[str]) -> None:
    """By the parameters of the second pass, before anything is drawn."""
    with pytest.raises(InvalidInput) as refused:
        resolve_request(replace(PLAIN, **change), replace(OPTIONS, upscaler=OneUpscaler()))
    assert {field for field, _ in refused.value.faults} == fields


def test_an_unknown_upscaler_is_told_what_there_is() -> None:
    """The files, and the ways to enlarge latents."""
    with pytest.raises(InvalidInput, match=r"there are sharp\. Latents are enlarged by latent, latent-antialiased"):
        resolve_request(replace(TWICE, hires_upscaler="soft"), replace(OPTIONS, upscaler=OneUpscaler()))


@pytest.mark.parametrize("change", [{}, {"mask": None, "task": Task.IMAGE_TO_IMAGE}])
def test_a_second_pass_would_change_what_a_mask_keeps(change: dict[str, Any]) -> None:
    """So it is refused with a mask, and drawn without one."""
    asked = replace(UPLOADED, **change, **HIRES)
    if change:
        assert resolve_request(asked, OPTIONS).second is not None
        return
    with pytest.raises(InvalidInput) as refused:
        resolve_request(asked, OPTIONS)
    assert {field for field, _ in refused.value.faults} == set(HIRES)


def test_models_without_latents_of_their_own_are_named() -> None:
    """One that its diffusers class draws, and one that changes no images."""
    own = replace(MODELS["sdxl"], any_extra=True, pipeline_class="ZImagePipeline")
    no_images = replace(MODELS["sdxl"], tasks=(Task.TEXT_TO_IMAGE,))
    for spec, asked, field in (
        (own, {**HIRES, "hires_upscaler": "latent"}, "hires_upscaler"),
        (no_images, {"hires_scale": 2.0}, "hires_scale"),
    ):
        with pytest.raises(InvalidInput, match="sdxl") as refused:
            resolve_request(replace(PLAIN, **asked), replace(OPTIONS, models={"sdxl": spec}))
        assert refused.value.field == field


def test_options_that_the_second_sampler_does_not_take_stay_with_the_first() -> None:
    """Churn is Euler's; the schedule and the subseed are taken by both."""
    sampling = (("s_churn", 2.0), ("schedule", "karras"), ("subseed", 3), ("subseed_strength", 0.5))
    plan = resolve_request(replace(TWICE, scheduler="euler", sampling=sampling, hires_scheduler="dpm_2m"), OPTIONS)
    assert plan.second is not None
    assert plan.second.own is not None
    _, parameters = plan.second.own
    assert parameters.scheduler == "dpm_2m"
    assert parameters.sampling == (("schedule", "karras"), ("subseed", 3), ("subseed_strength", 0.5))
    plan = resolve_request(replace(TWICE, scheduler="euler", sampling=sampling, hires_schedule="beta"), OPTIONS)
    assert plan.second is not None
    assert plan.second.own is not None
    assert dict(plan.second.own[1].sampling) == {**dict(sampling), "schedule": "beta"}


def test_names_of_latent_upscalers_are_read_as_automatic1111_writes_them() -> None:
    """All six, in any case; others are no latent upscalers."""
    theirs = ["Latent", "Latent (antialiased)", "Latent (bicubic)", "Latent (bicubic antialiased)"]
    theirs += ["Latent (nearest)", "Latent (nearest-exact)"]
    assert [latent_resize(name) for name in theirs] == [*LatentResize]
    assert [latent_resize(way.value.upper()) for way in LatentResize] == [*LatentResize]
    assert {latent_resize(name) for name in (None, "", "Lanczos", "latent-", "latent-lanczos", "(", "x" * 9999)} == {
        None
    }


def test_a_replay_has_the_same_second_pass() -> None:
    """What was asked is recorded, where it was given."""
    asked = replace(TWICE, hires_upscaler="latent", hires_guidance=2.0, hires_loras=(("ink", 0.5),))
    recorded = requested_fields(resolve_request(asked, OPTIONS))
    assert (recorded["hires_upscaler"], recorded["hires_guidance"]) == ("latent", 2.0)
    assert "hires_prompt" not in recorded
    assert "hires_scale" not in requested_fields(resolve_request(TWICE, OPTIONS))


@pytest.mark.parametrize("request_", DIGESTS, ids=["plain", "second pass"])
def test_requests_without_the_new_parameters_keep_their_keys(request_: GenerationRequest) -> None:
    """So that stored pictures are found again."""
    assert resolve_request(request_, OPTIONS).content_digest == DIGESTS[request_]
