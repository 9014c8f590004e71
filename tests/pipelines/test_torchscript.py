"""TorchScript traces: when one is used, that its output is bit-exact, and what is never traced."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import TRAINED
from drawing import MODELS_DIR, disc_mask, draw, draw_together, job_for, scene
from lora_layouts import write

from stable_diffusion_server.pipelines.acceleration import torchscript
from stable_diffusion_server.pipelines.acceleration.torchscript import TorchScriptRunner, trace
from stable_diffusion_server.pipelines.registry import LoadOptions, Registry, load

pytestmark = pytest.mark.slow


class Counting(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A layer that counts its Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.passes = 0

    def forward(self, given: dict[str, torch.Tensor], *, double: bool = False) -> tuple[torch.Tensor, None]:
        """Rows × 3 → rows × 2, and None."""
        self.passes += 1
        made = self.layer(given["sample"])
        return (2 * made if double else made), None


class Branching(Counting):
    """Computes differently for many rows, which a tracer does not see."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # another pass on purpose
        """Rows × 3 → rows × 2."""
        self.passes += 1
        made: torch.Tensor = self.layer(given)
        return made + len(made) if len(made) > 4 else made


class Looking(Counting):
    """Reads tensor values, which a tracer takes for constants."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # another pass on purpose
        """Rows × 3 → rows × 2."""
        made: torch.Tensor = self.layer(given) * float(given[0, 0])
        return made


class Dicing(Counting):
    """Random output."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # another pass on purpose
        """Rows × 3 → rows × 2."""
        made: torch.Tensor = self.layer(given) + torch.rand(2)
        return made


class Refusing(Counting):
    """Cannot be traced at all."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # another pass on purpose
        """Rows × 3 → rows × 2."""
        if torch.jit.is_tracing():
            raise TypeError("not with me")
        made: torch.Tensor = self.layer(given)
        return made


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


def test_the_fourth_call_of_a_kind_is_answered_without_python() -> None:
    """Bit-exact, in the output's structure; two calls are compared before."""
    module = Counting()
    signature = inspect.signature(module.forward)
    trace(module)
    assert inspect.signature(module.forward) == signature
    passes = []
    for _ in range(6):
        sample = torch.randn(4, 3)
        made, nothing = module({"sample": sample})
        assert torch.equal(made, module.layer(sample))
        assert nothing is None
        passes.append(module.passes)
    assert passes[:1] == [1]
    assert passes[2:] == passes[2:3] * 4  # tracing ran the module once more


def test_other_sizes_share_a_trace_where_it_gives_their_bits() -> None:
    """And other arguments do not."""
    module = Counting()
    trace(module)
    for rows in (1, 2, 5, 8):
        for _ in range(4):
            module({"sample": torch.ones(rows, 3)})
    assert len(module.forward._traces) == 1
    for _ in range(4):
        made, _ = module({"sample": torch.ones(2, 3)}, double=True)
    assert torch.equal(made, 2 * module.layer(torch.ones(2, 3)))
    assert len(module.forward._traces) == 2


def test_branches_on_sizes_have_traces_of_their_own() -> None:
    """A trace for few rows is wrong for many; that is detected, and its output never used."""
    module = Branching()
    trace(module)
    for rows in (2, 8, 3, 5, 6):
        for _ in range(4):
            wanted = module.layer(torch.ones(rows, 3)) + (rows if rows > 4 else 0)
            assert torch.equal(module(torch.ones(rows, 3)), wanted)
    assert all(kind.settled and kind.trace for kind in module.forward._signatures.values())


@pytest.mark.parametrize("kind", [Looking, Dicing, Refusing])
def test_what_a_trace_cannot_tell_runs_as_it_is(kind: type[Counting]) -> None:
    """Data-dependent values, randomness, and modules that cannot be traced."""
    module = kind()
    trace(module)
    for n in range(1, 6):
        sample = torch.full((2, 3), float(n))
        torch.manual_seed(n)
        made = module(sample)
        torch.manual_seed(n)
        assert torch.equal(made, type(module).forward(module, sample))
    assert [kind.trace for kind in module.forward._signatures.values()] == [None]


def test_passes_that_take_long_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's overhead is negligible there."""
    monkeypatch.setattr(torchscript, "_WORTH_SECONDS", 0.0)
    module = Branching()
    trace(module)
    for n in range(5):
        module(torch.ones(2, 3))
        assert module.passes == n + 1


def test_the_least_recent_signatures_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And recognised when they recur, by existing traces; also if each occurs only once."""
    monkeypatch.setattr(torchscript, "_MAX_SIGNATURES", 3)
    module = Branching()
    trace(module)
    for calls in (1, 4, 4):
        for rows in range(1, 12):
            for _ in range(calls):
                assert torch.equal(module(torch.ones(rows, 3)), type(module).forward(module, torch.ones(rows, 3)))
            assert len(module.forward._signatures) <= 3
    assert module.forward._made == len(module.forward._traces) <= 8  # one for few rows, and one for each larger number


def test_no_more_traces_are_made_than_memory_is_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript never frees them; signatures beyond the limit, and after failures, run untraced."""
    monkeypatch.setattr(torchscript, "_MAX_TRACES", 2)
    for module, useful in ((Branching(), 2), (Dicing(), 0)):
        trace(module)
        for rows in (5, 6, 7, 8):
            for _ in range(4):
                module(torch.ones(rows, 3))
        assert module.forward._made == 2
        assert len(module.forward._traces) == useful
        assert sum(kind.trace is not None for kind in module.forward._signatures.values()) == useful


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_answers_that_are_not_finite_are_not_compared(number: float) -> None:
    """Any trace reproduces constant outputs: one for other sizes would seem correct."""
    module = Branching()
    trace(module)
    for _ in range(4):
        module(torch.ones(2, 3))
    for _ in range(4):
        module(torch.full((8, 3), number))
    for _ in range(4):
        assert torch.equal(module(torch.ones(8, 3)), module.layer(torch.ones(8, 3)) + 8)


def test_threads_may_call_at_once() -> None:
    """Each gets its own output, whichever thread makes the trace."""
    module = Branching()
    trace(module)

    def ask(n: int) -> bool:
        with torch.inference_mode():
            sample = torch.full((1 + n % 7, 3), float(n))
            return torch.equal(module(sample), type(module).forward(module, sample))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))


@pytest.fixture(scope="module")
def traced() -> Registry:
    """The embedded models with a server's default settings."""
    return load(MODELS_DIR, "cpu", 1, LoadOptions(performance="safe"))


@pytest.fixture(scope="module")
def eager() -> Registry:
    """The same, without traces."""
    return load(MODELS_DIR, "cpu", 1, LoadOptions(performance="layout,onednn"))


@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize(
    "pictures",
    [
        {},
        {"image": scene(), "strength": 0.6},
        {"image": scene(), "mask": disc_mask(), "strength": 0.8},
        {"image": scene(), "control": scene(), "strength": 0.8},
    ],
    ids=["text", "style", "inpainting", "edges"],
)
def test_pictures_are_the_same_to_the_bit(
    traced: Registry, eager: Registry, model: str, pictures: dict[str, Any]
) -> None:
    """For every task, from the first image to those from traces; each has its own prompt."""
    for seed in range(4):
        job = job_for(model, seed=seed, prompt=f"a circle, {seed}", **pictures)
        np.testing.assert_array_equal(draw(traced, job), draw(eager, job))


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_pictures_drawn_together_are_the_same_to_the_bit(traced: Registry, eager: Registry, model: str) -> None:
    """Also for small batches with odd numbers of rows, whose products PyTorch splits in different ways."""
    for scales in ((2.0, 1.0), (2.0, 2.0, 1.0), (1.0, 1.0, 1.0)):
        for seed in range(4):
            jobs = [
                job_for(model, seed=seed + n, width=64, height=128, guidance_scale=scale if model == "sdxl" else 0.0)
                for n, scale in enumerate(scales)
            ]
            for one, other in zip(draw_together(traced, jobs), draw_together(eager, jobs), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_the_models_can_be_traced(traced: Registry, model: str) -> None:
    """All their components, so that no library update breaks tracing unnoticed."""
    for seed in range(4):
        draw(traced, job_for(model, seed=seed, prompt=f"a square, {seed}"))
    pipeline = traced.residents[model].family.pipeline
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    passes = {name: part.forward for name, part in parts.items() if name != "vae"} | {
        "vae": pipeline.vae.decoder.forward
    }
    assert len(passes) == 4
    for name, forward in passes.items():
        assert isinstance(forward, TorchScriptRunner), name
        assert any(kind.trace and kind.settled for kind in forward._signatures.values()), name


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_passes_with_adapters_go_around_traces(model: str, tmp_path: Path) -> None:
    """What was recorded has no adapters: they act all the same, on each layer, and plain passes are as before."""
    registry = load(MODELS_DIR, "cpu", 1, LoadOptions(lora_dir=tmp_path, performance="safe"))
    plain = load(MODELS_DIR, "cpu", 1, LoadOptions(lora_dir=tmp_path, performance="off"))
    pipeline = registry.residents[model].family.pipeline
    trained = TRAINED[model]["kohya LoCon" if model == "sdxl" else "kohya"]
    write(tmp_path / "style.safetensors", trained.file(plain.residents[model].family.pipeline)[0])
    jobs = [job_for(model, seed=seed, prompt=f"a square, {seed}") for seed in range(4)]
    before = [draw(registry, job) for job in jobs]
    assert isinstance((getattr(pipeline, "unet", None) or pipeline.transformer).forward, TorchScriptRunner)
    adapted = [replace(job, loras=(("style", 1.0),)) for job in jobs]
    for job, drawn in zip(adapted, before, strict=True):
        changed = draw(registry, job)
        assert abs(changed.astype(int) - draw(plain, job)).max() <= 1
        assert abs(changed.astype(int) - drawn).max() >= 4
    for job, drawn in zip(jobs, before, strict=True):
        np.testing.assert_array_equal(draw(registry, job), drawn)
