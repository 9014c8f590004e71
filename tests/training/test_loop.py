"""The training loop: it resumes where it stopped, and writes the averaged weights."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from training import loop

pytestmark = pytest.mark.slow


def learn_a_line(steps: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[float, list[int]]:
    """Train one weight towards 3; return it and the steps that ran."""
    monkeypatch.setattr(loop, "RUNS", folder)
    torch.manual_seed(0)
    line, seen = torch.nn.Linear(1, 1, bias=False), []

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        seen.append(step)
        x = torch.tensor(rng.normal(size=(8, 1)), dtype=torch.float32)
        return ((line(x) - 3 * x) ** 2).mean()

    plan = loop.Plan("line", steps, 0.1, warmup=5, average=0.9)
    loop.train(plan, {"line": line}, loss_of, lambda folder: None)
    return line.weight.item(), seen


def test_a_stage_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second run with more steps starts after the first one's last step, with its weights."""
    _, first = learn_a_line(40, monkeypatch, tmp_path)
    weight, second = learn_a_line(300, monkeypatch, tmp_path)
    assert first == list(range(40))
    assert second == list(range(40, 300))
    assert weight == pytest.approx(3, abs=0.1)


def test_a_stage_that_is_stopped_leaves_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SIGTERM ends it after the current step, and the next run resumes from there."""
    monkeypatch.setattr(loop, "RUNS", tmp_path)
    line = torch.nn.Linear(1, 1)

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        return line(torch.ones(1)).square().sum()

    with pytest.raises(SystemExit, match="stopped after step 8"):
        loop.train(loop.Plan("line", 20, 0.1), {"line": line}, loss_of, lambda folder: None)
    _, seen = learn_a_line_on(line, 20)
    assert seen == list(range(8, 20))


def learn_a_line_on(line: torch.nn.Module, steps: int) -> tuple[torch.nn.Module, list[int]]:
    """Resume a stage; return the trained weight and the steps that ran."""
    seen: list[int] = []

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        seen.append(step)
        return line(torch.ones(1)).square().sum()

    loop.train(loop.Plan("line", steps, 0.1), {"line": line}, loss_of, lambda folder: None)
    return line, seen


def test_the_rate_warms_up_is_held_and_falls_to_two_percent() -> None:
    """It is highest from the warm-up to the decay; the last step has 2 % of it."""
    plan = loop.Plan("any", 1000, 1.0, warmup=100, cooling=0.25)
    assert loop.rate_at(plan, 0) == pytest.approx(0.01, rel=0.01)
    assert {loop.rate_at(plan, step) for step in range(100, 751)} == {1.0}
    assert loop.rate_at(plan, 999) == pytest.approx(0.02, rel=0.02)
