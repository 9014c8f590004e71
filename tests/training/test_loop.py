"""The training loop: it goes on where it stopped, and leaves the averaged weights behind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training import loop


def learn_a_line(steps: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[float, list[int]]:
    """Train one weight towards 3 and return it with the steps that were run."""
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
    """A second run with more steps begins after the first one's last step, with its weights."""
    _, first = learn_a_line(40, monkeypatch, tmp_path)
    weight, second = learn_a_line(300, monkeypatch, tmp_path)
    assert first == list(range(40))
    assert second == list(range(40, 300))
    assert weight == pytest.approx(3, abs=0.1)


def test_the_rate_warms_up_and_falls_to_three_percent() -> None:
    """The highest rate is reached after the warm-up; the last step has 3 % of it."""
    plan = loop.Plan("any", 1000, 1.0, warmup=100)
    assert loop.rate_at(plan, 0) == pytest.approx(0.01, rel=0.01)
    assert max(loop.rate_at(plan, step) for step in range(1000)) < 1.0
    assert loop.rate_at(plan, 999) == pytest.approx(0.03, rel=0.01)
