"""Runs one training stage: steps, learning-rate schedule, weight averaging, checkpoints, progress.

A stage passes its modules and a function from a step to a loss. All random numbers come from generators seeded by
(seed, first step of this process), so two runs that resume at the same steps are identical.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from training.muon import Muon

RUNS = Path(__file__).parent / "runs"
"""Where checkpoints, logs and sample sheets lie; ignored by git."""


@dataclass(frozen=True)
class Plan:
    """How long and how a stage trains.

    ``rate`` is the peak learning rate: reached after ``warmup`` steps, held, and reduced to 2 % by a cosine over
    the last part ``cooling`` of the steps. ``average`` is the decay of the moving average of the weights. ``every``
    is the number of seconds between checkpoints, each with a sheet of samples. ``compiled``: compile the denoiser
    for 256², which is a sixth faster and needs a C++ compiler. ``muon``: the learning rate of Muon for the matrices
    of hidden blocks, as a multiple of AdamW's rate for the rest; 0 means AdamW only. ``reduced``: matrix products
    in bfloat16, with weights and accumulations in fp32.
    """

    name: str
    steps: int
    rate: float
    warmup: int = 100
    cooling: float = 0.25
    average: float = 0.998
    seed: int = 0
    device: str = "cpu"
    every: float = 240.0
    weight_decay: float = 0.0
    compiled: bool = False
    muon: float = 0.0
    reduced: bool = False


def rate_at(plan: Plan, step: int) -> float:
    """Return the learning rate of a step (0 ≤ step < plan.steps)."""
    fraction = max(0.0, 1 - (1 - step / plan.steps) / plan.cooling)
    return plan.rate * min(1.0, (step + 1) / plan.warmup) * (0.49 * (1 + math.cos(math.pi * fraction)) + 0.02)


class Averaged:
    """The exponential moving average of some parameters, which can temporarily replace them."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters' current values."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters' values and the average; a second call reverts it."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint atomically: a crash leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)


def optimizers(plan: Plan, modules: dict[str, nn.Module]) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the trainable parameters: AdamW, and Muon for matrices of hidden blocks if planned."""
    named = [(name, p) for module in modules.values() for name, p in module.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if plan.muon and p.ndim > 1 and "block" in name and ".norm" not in name]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    adam = torch.optim.AdamW(rest, lr=plan.rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True)
    return [adam, Muon(hidden, plan.rate)] if hidden else [adam]


class Session:
    """One stage's modules with their optimizer, average and folder; saves and resumes them together."""

    def __init__(self, plan: Plan, modules: dict[str, nn.Module], show: Callable[[Path], None]) -> None:
        self.plan, self.modules, self.show = plan, modules, show
        self.folder = RUNS / plan.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.optimizers = optimizers(plan, modules)
        self.average = Averaged(self.parameters, plan.average)

    def resume(self) -> int:
        """Load the last checkpoint if it exists; returns the step to continue with."""
        last = self.folder / "last.pt"
        if not last.exists():
            return 0
        state = torch.load(last, map_location=self.plan.device, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self.average.values = [value.to(self.plan.device) for value in state["average"]]
        return int(state["step"])

    def keep(self, step: int) -> None:
        """Save a checkpoint."""
        state: dict[str, object] = {
            "step": step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average.values,
        }
        save_checkpoint(self.folder / "last.pt", state)

    def display(self) -> None:
        """Write samples made with the averaged weights."""
        self.average.swap()
        self.set_training(False)
        self.show(self.folder)
        self.set_training(True)
        self.average.swap()

    def set_training(self, on: bool) -> None:
        """Switch every module to training or evaluation mode."""
        for module in self.modules.values():
            module.train(on)

    def learn(self, loss: Tensor, step: int) -> float:
        """Take one optimizer step on a loss; returns its value."""
        rate = rate_at(self.plan, step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (self.plan.muon if isinstance(optimizer, Muon) else 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(step)
        return loss.item()

    def note(self, step: int, loss: float, seconds: float) -> None:
        """Append a line to the log: step, mean loss, seconds since this process began to train."""
        line = {"step": step, "loss": round(loss, 5), "seconds": round(seconds, 1)}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


@contextmanager
def cheaply(plan: Plan) -> Iterator[None]:
    """Run the block with bfloat16 products if planned; on a CPU without fused attention, whose gradient is slower."""
    with torch.autocast(plan.device, torch.bfloat16, enabled=plan.reduced):
        if plan.device == "cpu":
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            yield


def train(
    plan: Plan,
    modules: dict[str, nn.Module],
    loss_of: Callable[[int, np.random.Generator], Tensor],
    show: Callable[[Path], None],
    fresh: bool = False,
) -> Path:
    """Train ``modules`` until ``plan.steps``, from the last checkpoint unless ``fresh``. Returns the stage's folder.

    ``loss_of`` gets the step and a generator and returns a scalar. ``show`` writes samples into a folder and is
    called with the averaged weights in place; the modules also hold those at the end. On SIGTERM it writes a
    checkpoint and ends the process.
    """
    stopping: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    session = Session(plan, modules, show)
    first = 0 if fresh else session.resume()
    torch.manual_seed(plan.seed * 1_000_003 + first)
    rng = np.random.default_rng((plan.seed, first))
    losses: list[float] = []
    started = saved = time.monotonic()
    session.set_training(True)
    with tqdm(total=plan.steps, initial=first, desc=plan.name, mininterval=10, dynamic_ncols=True) as bar:
        for step in range(first, plan.steps):
            with cheaply(plan):
                loss = loss_of(step, rng)
            losses.append(session.learn(loss, step))
            bar.update()
            if (step + 1) % 100 == 0:
                recent = float(np.mean(losses[-100:]))
                session.note(step + 1, recent, time.monotonic() - started)
                bar.set_postfix(loss=round(recent, 5))
            if stopping:
                session.keep(step + 1)
                raise SystemExit(f"{plan.name} stopped after step {step + 1}; the same command goes on")
            if time.monotonic() - saved > plan.every:
                session.keep(step + 1)
                session.display()
                saved = time.monotonic()
    signal.signal(signal.SIGTERM, before)
    session.keep(plan.steps)
    session.display()
    session.average.swap()
    session.set_training(False)
    return session.folder
