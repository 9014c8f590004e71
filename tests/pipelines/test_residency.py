"""More models than memory: pictures are those of single runs, equal parts are loaded once, unloaded is gone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from checkpoint_stand_ins import sdxl_pipeline, write
from drawing import job_for
from fakes import until
from original_names import sdxl_tensors
from single_file_specs import sdxl_spec

from stable_diffusion_server.engine import Engine, EngineState, LoadStopped
from stable_diffusion_server.errors import ModelChanged, ModelLoadError, ModelStays, ModelTooLarge
from stable_diffusion_server.pipelines import registry as registry_module
from stable_diffusion_server.pipelines.family import LoadedFamily
from stable_diffusion_server.pipelines.loading.placement import Placement, Quantization, Residency
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.registry import LoadOptions, Registry, load
from stable_diffusion_server.pipelines.residency import MemoryBudget, ModelNeed, ResidentModels
from stable_diffusion_server.types import DiffusionRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints: `b` has the VAE and the text encoders of `a`, and `c` shares nothing; a fourth is cut off."""
    place = tmp_path_factory.mktemp("weights")
    pipelines = {name: sdxl_pipeline(seed) for seed, name in enumerate(NAMES, 1)}
    for part in ("vae", "text_encoder", "text_encoder_2"):
        getattr(pipelines["b"], part).load_state_dict(getattr(pipelines["a"], part).state_dict())
    for name, pipeline in pipelines.items():
        write(place / f"{name}.safetensors", sdxl_tensors(pipeline))
    (place / "cut.safetensors").write_bytes((place / "c.safetensors").read_bytes()[:500_000])
    return place


def specs(*names: str) -> dict[str, ModelSpec]:
    """The specs of some of the checkpoints, by name."""
    return {name: replace(sdxl_spec(("denoiser", f"{name}.safetensors")), name=name) for name in names}


def on_demand(folder: Path, *names: str, **more: Any) -> Registry:
    """A registry that has loaded nothing yet."""
    return load(folder, "cpu", 1, LoadOptions(models=specs(*names), on_demand=names, **more))


def ignore(share: float) -> None:
    """A load nobody follows."""


@pytest.fixture(scope="module")
def size(folder: Path) -> int:
    """Bytes of one model."""
    registry = on_demand(folder, "c")
    registry.load("c", (), ignore)
    return registry.residents.bytes_used()


def request_of(registry: Registry, model: str, seed: int) -> DiffusionRequest:
    """A picture of a loaded model."""
    revision = registry.residents[model].spec.revision
    job = job_for("sdxl", seed=seed, num_inference_steps=2, guidance_scale=3.0, width=64, height=64)
    return replace(job, model=model, revision=revision, prompt=f"{model} {seed % 3}")


def drawn(registry: Registry, request: DiffusionRequest) -> Any:
    """The pixels of a request that runs alone."""
    state = registry.prepare(request)
    while not state.done:
        registry.step([state])
    return registry.finish(state).pixels


def test_the_least_recently_used_model_makes_room(folder: Path, size: int) -> None:
    """Memory for two: the third load unloads what was used longest ago, and not what is busy."""
    registry = on_demand(folder, "a", "c", "b", memory=int(2.2 * size))
    for name in ("a", "c"):
        assert registry.load(name, (), ignore)
    drawn(registry, request_of(registry, "a", 1))
    assert registry.load("b", (), ignore)
    assert {model.name for model in registry.loaded} == {"a", "b"}
    assert not registry.has_room_for("c", {"a", "b"})
    assert not registry.load("c", {"a", "b"}, ignore)
    assert registry.load("c", {"a"}, ignore)
    assert {model.name for model in registry.loaded} == {"a", "c"}


def test_a_pinned_model_stays_and_what_does_not_fit_says_so_with_numbers(folder: Path, size: int) -> None:
    """A pinned model is never unloaded for another one; the sentence has the need and the setting."""
    registry = on_demand(folder, "a", "c", memory=int(1.2 * size), pinned=("a",))
    registry.load("a", (), ignore)
    with pytest.raises(ModelTooLarge, match=r"c needs 0\.1 GB for its weights, and MODEL_MEMORY allows 0\.1 GB, of"):
        registry.load("c", (), ignore)
    assert registry.is_loaded("a")
    small = on_demand(folder, "c", memory=size // 2)
    with pytest.raises(ModelTooLarge, match="MODEL_MEMORY allows"):
        small.load("c", (), ignore)


def test_equal_parts_take_memory_once_and_stay_while_a_model_uses_them(folder: Path, size: int) -> None:
    """Two checkpoints with the same VAE and text encoders: less than their sum; unloading one keeps the other whole."""
    alone = on_demand(folder, "b")
    alone.load("b", (), ignore)
    expected = drawn(alone, request_of(alone, "b", 5))
    registry = on_demand(folder, "a", "b")
    registry.load("a", (), ignore)
    registry.load("b", (), ignore)
    a, b = (registry.residents[name].networks for name in ("a", "b"))
    assert a["vae"].decoder.conv_in.weight.data_ptr() == b["vae"].decoder.conv_in.weight.data_ptr()
    assert a["unet"].conv_in.weight.data_ptr() != b["unet"].conv_in.weight.data_ptr()
    unet = sum(weight.nbytes for weight in b["unet"].parameters())
    assert registry.residents.bytes_used() <= size + 1.1 * unet < 1.9 * size
    assert np.array_equal(drawn(registry, request_of(registry, "b", 5)), expected)
    del a, b
    registry.unload("a")
    assert np.array_equal(drawn(registry, request_of(registry, "b", 5)), expected)
    assert registry.residents.bytes_used() == pytest.approx(size, rel=0.02)


def test_nothing_of_an_unloaded_model_is_left(folder: Path) -> None:
    """Weights, prompts and the family are gone; its tokens can still be counted; loaded again, it draws the same."""
    registry = on_demand(folder, "a")
    registry.load("a", (), ignore)
    first = drawn(registry, request_of(registry, "a", 1))
    loaded = registry.residents["a"]
    left = [weakref.ref(one) for one in (loaded.family, loaded.prompt_cache, *loaded.networks.values())]
    del loaded
    registry.unload("a")
    gc.collect()
    assert [one() for one in left] == [None] * len(left)
    assert registry.residents.bytes_used() == 0
    assert registry.count_tokens("a", "a red square") == 5
    registry.load("a", (), ignore)
    assert np.array_equal(drawn(registry, request_of(registry, "a", 1)), first)


def test_a_stopped_load_leaves_nothing(folder: Path) -> None:
    """Ended at a report, whichever it is: the model is not there, and can be loaded afterwards."""
    first: list[float] = []
    shares: list[float] = []
    registry = on_demand(folder, "c")
    for seen in (first, shares):  # the second time the file is known by its content
        registry.load("c", (), seen.append)
        registry.unload("c")
        assert seen == sorted(seen)
    assert len(first) > len(shares) >= 5

    def stop_at(number: int) -> Any:
        left = iter(range(number))

        def report(share: float) -> None:
            if next(left, None) is None:
                raise LoadStopped("c")

        return report

    for number in range(len(shares)):
        with pytest.raises(LoadStopped):
            registry.load("c", (), stop_at(number))
        assert not registry.loaded
    assert registry.load("c", (), ignore)


def test_a_damaged_model_leaves_the_others_in_memory(folder: Path, size: int) -> None:
    """A file that cannot be read fails before another model is unloaded for it."""
    registry = on_demand(folder, "a", "cut", memory=int(1.2 * size))
    registry.load("a", (), ignore)
    with pytest.raises(ModelLoadError, match=r"cut\.safetensors"):
        registry.load("cut", (), ignore)
    assert registry.is_loaded("a")


def test_a_request_for_replaced_files_is_refused(folder: Path, tmp_path: Path) -> None:
    """The key names the former weights, so that the picture of the new ones must not be stored under it."""
    registry = on_demand(folder, "a")
    registry.load("a", (), ignore)
    request = replace(request_of(registry, "a", 1), revision="sdxl-0123456789abcdef")
    with pytest.raises(ModelChanged):
        registry.prepare(request)


def test_models_loaded_at_the_start_stay_without_others_on_demand(folder: Path) -> None:
    """The default loads all models once; they may be traced, and are not unloaded."""
    registry = load(folder, "cpu", 1, LoadOptions(models=specs("a")))
    assert not registry.on_demand
    with pytest.raises(ModelStays):
        registry.unload("a")


@pytest.fixture
def running(folder: Path, size: int) -> Iterator[tuple[Engine[Any], Registry]]:
    """An engine over the checkpoints with memory for two."""
    registry = on_demand(folder, *NAMES, "cut", memory=int(2.2 * size))
    engine: Engine[Any] = Engine(lambda: registry, queue_limit=200, max_batch=4, workers=0, switch_patience=0.5)
    engine.start()
    yield engine, registry
    engine.stop(30)
    assert engine.state is EngineState.STOPPED


def test_sixty_mixed_requests_are_the_pictures_of_single_runs(
    running: tuple[Engine[Any], Registry], folder: Path
) -> None:
    """Three models, memory for two, cancels and a broken fourth model: no picture of another model or request."""
    engine, registry = running
    alone = on_demand(folder, *NAMES)
    requests: dict[str, dict[int, DiffusionRequest]] = {}
    expected = {}
    for name in NAMES:
        alone.load(name, (), ignore)
        requests[name] = {seed: request_of(alone, name, seed) for seed in range(6)}
        expected |= {(name, seed): drawn(alone, request) for seed, request in requests[name].items()}
    chance = np.random.default_rng(3)
    until(lambda: engine.state is EngineState.READY)
    asked, broken = [], []
    for number in range(60):
        pick = str(chance.choice(NAMES)), int(chance.integers(6))
        asked.append((pick, engine.submit(requests[pick[0]][pick[1]])))
        if number % 10 == 9:
            engine.submit(requests[pick[0]][pick[1]]).result.cancel()
            broken.append(engine.submit(replace(requests["a"][0], model="cut")))
    for pick, ticket in asked:
        pixels = ticket.result.result(600).product.pixels.astype(int)
        assert np.abs(pixels - expected[pick]).max() <= 2, pick
        assert all(np.abs(pixels - other).max() > 20 for (name, _), other in expected.items() if name != pick[0])
    for ticket in broken:
        with pytest.raises(ModelLoadError):
            ticket.result.result(600)
    assert len(registry.loaded) <= 2


def test_memory_does_not_grow_with_switches(folder: Path, size: int) -> None:
    """Memory for one of three models, one picture after each switch: at most 2 % more than after the first ones."""
    registry = on_demand(folder, *NAMES, memory=int(1.2 * size))
    used = []
    for number in range(15):
        name = NAMES[number % 3]
        registry.load(name, (), ignore)
        drawn(registry, request_of(registry, name, number))
        used.append(psutil.Process().memory_info().rss)
    assert len(registry.loaded) == 1
    assert max(used[-5:]) <= 1.02 * max(used[4:9]), [f"{size / 1e6:.0f}" for size in used]
    assert torch.get_num_threads() == 1


def offloaded(name: str, weights: int, control: int, residency: Residency, turn: int, moved: int) -> LoadedFamily:
    """A loaded model whose weights wait in RAM, without anything that could draw."""
    info = SimpleNamespace(residency=residency.value, name=name)
    networks = {
        "unet": torch.nn.Linear(weights // 4, 1, bias=False),
        "control": torch.nn.Linear(control // 4, 1, bias=False),
    }
    placement = Placement(residency, Quantization.NONE, weights + turn, turn, moved)
    family: Any = SimpleNamespace(count_tokens=len)
    held: Any = SimpleNamespace(release=lambda: None)
    spec = specs(name)[name]
    return LoadedFamily(family, spec, cast(Any, info), offloaded=held, networks=networks, placement=placement)


@pytest.mark.parametrize(
    ("residency", "rests"), [(Residency.MODEL, 400), (Residency.SEQUENTIAL, 400), (Residency.GROUP, 0)]
)
def test_weights_that_wait_in_ram_do_not_count_on_the_device(residency: Residency, rests: int) -> None:
    """Only the ControlNet of an offloaded model stays there; its turn counts once, beside the weights of the others."""
    residents = ResidentModels(specs("a", "c"), MemoryBudget(10_000), measure=lambda spec: ModelNeed(6000, 1000))
    residents.add(offloaded("a", 40_000, 400, residency, turn=3000, moved=2500))
    assert residents.bytes_used() == rests
    assert residents.turn == 3000
    residents.measure("c")
    for limit, fits in ((rests + 6000 + 3000, True), (rests + 6000 + 2999, False)):
        residents.budget = MemoryBudget(limit)
        assert residents.has_room_for("c", None) is fits
    for limit, fits in ((rests + 6000 + 2500, True), (rests + 6000 + 2499, False)):  # MODEL_MEMORY is for weights alone
        residents.budget = MemoryBudget(limit, measured=False)
        assert residents.has_room_for("c", None) is fits


def test_what_does_not_fit_beside_a_pinned_model_says_what_drawing_takes() -> None:
    """A measured budget holds activations too, and the sentence has both numbers."""
    need = ModelNeed(6 * 10**9, 3 * 10**9)
    residents = ResidentModels(specs("a", "c"), MemoryBudget(8 * 10**9), measure=lambda spec: need, pinned=("a",))
    residents.add(offloaded("a", 40_000, 400, Residency.MODEL, turn=10**9, moved=0))
    with pytest.raises(
        ModelTooLarge, match=r"c needs 6\.0 GB for its weights and 3\.0 GB to draw, and MODEL_MEMORY"
    ) as told:
        residents.load("c", (), ignore)
    assert told.value.detail.endswith(" hold pinned models."), "a key limited to c must not learn of others"


def test_what_does_not_fit_beside_busy_models_is_loaded_after_them() -> None:
    """The estimate allows it and the free memory does not: it waits, and fails only where nothing else can go."""
    tried: list[str] = []

    def load_alone(spec: ModelSpec, progress: Any) -> LoadedFamily:
        tried.append(spec.name)
        if residents.loaded or spec.name == "b":
            raise ModelTooLarge(f"{spec.name} needs more than is free.")
        return offloaded(spec.name, 400, 40, Residency.MODEL, turn=0, moved=0)

    residents = ResidentModels(specs("a", "b", "c"), MemoryBudget(10**9), load_alone)
    residents.add(offloaded("a", 400, 40, Residency.MODEL, turn=0, moved=0))
    assert residents.has_room_for("c", {"a"})
    assert not residents.load("c", {"a"}, ignore)
    assert not residents.has_room_for("c", {"a"}), "it would be tried again at once, and again"
    assert not residents.has_room_for("c", None)
    assert residents.has_room_for("c", ())
    assert residents.load("c", (), ignore)
    assert [loaded.spec.name for loaded in residents.loaded] == ["c"]
    with pytest.raises(ModelTooLarge):
        residents.load("b", (), ignore)
    assert tried == ["c", "c", "c", "b", "b"]


@pytest.mark.parametrize("failure", [None, ModelLoadError("It was cut off.")], ids=["loads", "fails"])
def test_a_model_whose_spec_changed_while_it_was_loaded_is_not_kept(
    failure: ModelLoadError | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MODELS_DIR is read again during the load: neither the old model nor the failure of the old one is recorded."""
    recorded: list[str] = []

    class Family:
        @classmethod
        def load(cls, spec: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> Any:
            options.report(0.5)
            if failure is not None:
                raise failure
            return SimpleNamespace(spec=spec)

    monkeypatch.setattr(registry_module, "_family_class", lambda spec: Family)
    options = LoadOptions(
        models=specs("a"),
        on_demand=("a",),
        on_loaded=lambda spec: recorded.append(spec.name),
        on_failed=lambda name, why: recorded.append(why),
    )
    registry = load(tmp_path, "cpu", 1, options)
    monkeypatch.setattr(registry.residents, "_measure", lambda spec: ModelNeed(0))
    new = {"a": replace(specs("a")["a"], default_steps=77)}
    with pytest.raises(ModelChanged if failure is None else ModelLoadError):
        registry.load("a", (), lambda share: registry.replace_specs(new))
    assert not registry.is_loaded("a")
    assert recorded == []


def resident(name: str, weights: int) -> LoadedFamily:
    """A loaded model whose weights stay on the device, without anything that could draw."""
    return replace(offloaded(name, weights, 4, Residency.RESIDENT, turn=0, moved=0), offloaded=None)


@pytest.mark.parametrize(("least", "left"), [(9009, ["a", "b"]), (9008, [])])
def test_nothing_is_unloaded_for_a_model_without_room_in_an_empty_memory(least: int, left: list[str]) -> None:
    """It is refused with the numbers; otherwise each request for it would unload all other models."""

    def load_one(spec: ModelSpec, progress: Any) -> LoadedFamily:
        if spec.name == "c":
            raise ModelTooLarge("The model needs more than is free.")
        return resident(spec.name, 4000)

    needs = {"a": ModelNeed(4000), "b": ModelNeed(4000), "c": ModelNeed(100_000, least=least)}
    residents = ResidentModels(
        specs(*NAMES), MemoryBudget(10_000), load_one, lambda spec: needs[spec.name], free=lambda: 1000
    )
    for name in ("a", "b"):
        assert residents.load(name, (), ignore)
    assert residents.bytes_used() == 8008
    with pytest.raises(ModelTooLarge):
        residents.load("c", (), ignore)
    assert [model.spec.name for model in residents.loaded] == left


def test_the_budget_holds_at_the_start_too(folder: Path, size: int) -> None:
    """A model larger than MODEL_MEMORY is refused; what does not fit beside the first one waits for its request."""
    with pytest.raises(ModelTooLarge, match="MODEL_MEMORY allows"):
        load(folder, "cpu", 1, LoadOptions(models=specs("a"), memory=size // 2))
    registry = load(folder, "cpu", 1, LoadOptions(models=specs("a", "c"), memory=int(1.2 * size)))
    assert list(registry.models) == ["a"]
    assert not registry.unusable
    assert registry.load("c", (), ignore)
    assert list(registry.models) == ["c"]


def test_other_specs_during_a_load_leave_the_need_of_a_loaded_model() -> None:
    """`refresh` runs on another thread; without its need, no model could be chosen any more."""
    residents = ResidentModels(specs("a", "c"), MemoryBudget(10_000), measure=lambda spec: ModelNeed(4000))
    residents.add(resident("a", 4000))
    residents.measure("c")
    changed = {name: replace(spec, file_bytes=9) for name, spec in specs("a", "c").items()}
    residents.replace_specs(changed)
    assert [residents.need_of(name).weights for name in ("a", "c")] == [4004, 9]
    assert residents.has_room_for("c", None)


def test_a_model_takes_its_share_and_no_more(folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MODEL_SHARES: within its share of what was free at the start, although more is free; the other takes the rest."""
    with pytest.raises(ModelTooLarge, match=r"The model needs .* are free"):
        load(folder, "cpu", 1, LoadOptions(models=specs("a"), shares={"a": 1e-6}))
    both = load(folder, "cpu", 1, LoadOptions(models=specs("a", "c"), shares={"a": 1e-6, "c": 0.9}))
    assert "are free" in both.unusable["a"]
    assert list(both.models) == ["c"]


def test_a_batch_is_not_larger_than_the_memory_it_was_placed_with(folder: Path) -> None:
    """Up to MAX_BATCH images of 1024² in a pass, more of smaller ones, and at least one of any size."""
    registry = load(folder, "cpu", 1, LoadOptions(models=specs("a"), max_batch=4, largest_pixels=512 * 512))
    request = request_of(registry, "a", 1)
    assert registry.batch_limit(replace(request, width=1024, height=1024)) == 4
    assert registry.batch_limit(replace(request, width=512, height=512)) == 16
    assert registry.batch_limit(replace(request, width=4096, height=4096)) == 1
