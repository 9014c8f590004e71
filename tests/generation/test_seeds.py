"""Seeds: 64 bits, those of the images of a batch, subseeds, and the smallest strength that draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.resolver import GenerationOptions, ResolvedRequest, resolve_request
from stable_diffusion_server.generation.results import seed_text
from stable_diffusion_server.pipelines.catalog import MODELS, check_strength
from stable_diffusion_server.storage import HistoryEntry
from stable_diffusion_server.storage.history.index import HistoryIndex
from stable_diffusion_server.types import SEED_MAX, GenerationRequest, Task

OPTIONS = GenerationOptions(RequestLimits(), "sdxl", "static/uploads")
REQUEST = GenerationRequest(Task.TEXT_TO_IMAGE, "a red square", width=64, height=64)


def resolved(**changes: object) -> ResolvedRequest:
    return resolve_request(replace(REQUEST, **changes), OPTIONS)  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**53 + 1, 2**63, SEED_MAX])
def test_a_seed_of_64_bits_is_kept_and_counted_on(seed: int) -> None:
    """Image i has the seed after it, within 64 bits; each is another key."""
    first, second = resolved(seed=seed), resolved(seed=seed, variation=1)
    assert (first.seed, second.seed) == (seed, (seed + 1) % 2**64)
    assert first.key != second.key
    assert seed_text(seed) == (str(seed) if seed > 2**53 else None)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    """By its name."""
    with pytest.raises(InvalidInput) as refused:
        resolved(seed=seed)
    assert refused.value.field == "seed"


def test_random_and_derived_seeds_are_exact_in_every_json_reader() -> None:
    """32 bits; a derived one is the same each time."""
    assert max(resolved(seed="random").seed for _ in range(50)) < 2**32
    assert resolved().seed == resolved().seed < 2**32


def test_the_images_of_a_batch_have_one_seed_and_several_subseeds() -> None:
    """As AUTOMATIC1111 counts; without a strength the subseed is no part of the key."""
    options = (("subseed", 7), ("subseed_strength", 0.3))
    images = [resolved(seed=5, variation=number, sampling=options) for number in range(3)]
    assert [image.seed for image in images] == [5, 5, 5]
    assert [dict(image.parameters.sampling)["subseed"] for image in images] == [7, 8, 9]
    assert len({image.key for image in images}) == 3
    derived = dict(resolved(seed=5, sampling=(("subseed_strength", 0.3),)).parameters.sampling)
    assert 0 <= int(derived["subseed"]) < 2**32
    assert resolved(seed=5, sampling=(("subseed", 7),)).key == resolved(seed=5).key


@pytest.mark.parametrize("sampling", [(("subseed", 1.5), ("subseed_strength", 0.5)), (("subseed_strength", 2.0),)])
def test_a_wrong_subseed_is_refused_by_its_name(sampling: tuple[tuple[str, float], ...]) -> None:
    """A number that is not whole, and a strength above 1."""
    with pytest.raises(InvalidInput) as refused:
        resolved(sampling=sampling)
    assert refused.value.field == sampling[0][0]


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, SEED_MAX])
def test_the_history_keeps_seeds_of_64_bits(seed: int, tmp_path: Path) -> None:
    """SQLite's integers have a sign."""
    index = HistoryIndex(tmp_path / "history.sqlite", 10, 0)
    index.open()
    index.add([HistoryEntry("a.webp", "d", "a", "sdxl", "text_to_image", seed, 64, 64, "", 1.0, {})])
    found = index.find("key", "a.webp")
    assert found is not None
    assert found.seed == seed


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 29, 49, 150])
def test_the_error_names_the_smallest_strength_that_works(model: str, steps: int) -> None:
    """With that strength a step is drawn, with nine tenths of it none."""
    spec = MODELS[model]
    with pytest.raises(InvalidInput, match="leaves none to draw") as refused:
        check_strength(spec, steps, 0.0)
    if spec.rounds_steps_up:
        assert "any above 0 draws one" in refused.value.detail
        check_strength(spec, steps, 0.001)
        return
    least = float(refused.value.detail.partition("; ")[2].split()[0])
    check_strength(spec, steps, least)
    with pytest.raises(InvalidInput):
        check_strength(spec, steps, least * 0.9)
