"""What is known of the time things take: seconds a step by shape and group size, and from it the largest group."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from stable_diffusion_server.engine.interface import P
from stable_diffusion_server.engine.ticket import RunningRequest, Ticket
from stable_diffusion_server.types import DiffusionRequest

# Samples kept of each group size, how many are enough to compare sizes, and how many shapes are remembered.
KEPT, ENOUGH, SHAPES = 8, 4, 64
# A larger group has to draw a picture in less than this share of the time, a smaller one may take this much of it.
WORTH = 0.95
# Steps of the largest size memory allows before twice as much is allowed again; twice as many after each failure.
RECOVERY = 2048
# Full steps before a size that did not pay is tried again (four times as many each time, a few times), and before a
# smaller one is, to see whether the size still pays.
PATIENCE, LONGEST_PATIENCE = 64, 4096
AUDIT = 512


@dataclass(slots=True)
class ShapeProfile:
    """One shape's step times, and the largest group that is known to pay.

    `cap` is in force: `base` is settled, and another value is on trial. `ceiling` is where memory ended, `most` what
    was allowed before.
    """

    label: str
    model: str
    pixels: int
    most: int
    ceiling: int
    cap: int
    base: int
    times: dict[int, deque[float]] = field(default_factory=dict)
    costs: dict[int, deque[float]] = field(default_factory=dict)
    around: float = 0.0
    patience: int = 0
    audit: int = AUDIT
    misses: int = 0
    shortages: int = 0
    recovery: int = 0

    def sizes(self) -> list[int]:
        """The group sizes that were measured."""
        return sorted(size for size, times in self.times.items() if times)

    def seconds(self, size: int) -> float | None:
        """Seconds of one step of a group of that size, or of the measured size next to it."""
        if not self.sizes():
            return None
        return _quickest(self.times[min(self.sizes(), key=lambda n: abs(n - size))])

    def add(self, size: int, seconds: float, cost: float) -> None:
        """Take note of a step; the first one of a size warms things up and does not count."""
        if size not in self.times:
            self.times[size], self.costs[size] = deque(maxlen=KEPT), deque(maxlen=KEPT)
        else:
            self.times[size].append(seconds)
            self.costs[size].append(cost)
        if size == self.ceiling < self.most:
            self.recovery -= 1
            if self.recovery <= 0:
                self.ceiling, self.recovery = min(2 * self.ceiling, self.most), RECOVERY * 2**self.shortages

    def known(self, size: int) -> bool:
        """Whether enough was measured to judge a size."""
        return len(self.times.get(size, ())) >= ENOUGH

    def learn(self, size: int, more_wait: bool) -> None:
        """Go on trial with another cap, or judge the one that is, after a step of `size`."""
        if size != self.cap or not self.known(size):
            return
        if self.cap != self.base:
            self._judge()
        elif more_wait:
            self.patience -= 1
            self.audit -= 1
            larger = min(2 * self.cap, self.ceiling)
            if self.patience <= 0 and larger > self.cap:
                self._try(larger)
            elif self.audit <= 0 and self.cap > 1:
                self._try(self.cap // 2)

    def _try(self, size: int) -> None:
        self.times.pop(size, None)
        self.costs.pop(size, None)
        self.cap, self.audit = size, AUDIT

    def _judge(self) -> None:
        pays = False
        if (base := self.costs.get(self.base)) and (cap := self.costs.get(self.cap)):
            now, before = _quickest(cap) / self.cap, _quickest(base) / self.base
            # A smaller one may be a little slower and still be the better size.
            pays = now < WORTH * before if self.cap > self.base else WORTH * now < before
        if pays:
            self.base, self.misses, self.patience = self.cap, 0, 0
            return
        if self.cap > self.base:
            self.patience = min(PATIENCE * 4**self.misses, LONGEST_PATIENCE)
            self.misses += 1
        self.cap = self.base

    def lower(self, ceiling: int) -> None:
        """Run out of memory: no more than `ceiling` for a long time."""
        self.shortages += 1
        self.recovery = RECOVERY * 2**self.shortages
        self.ceiling = max(1, min(self.ceiling, ceiling))
        self.cap, self.base = min(self.cap, self.ceiling), min(self.base, self.ceiling)


def _quickest(samples: Iterable[float]) -> float:
    """The lower quartile: other work on the machine only adds."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 4]


@dataclass(frozen=True, slots=True)
class StepTimings:
    """A shape's figures for people: the cap in force, and seconds a step by group size."""

    label: str
    cap: int
    step_seconds: dict[int, float]


class BatchSizeTuner:
    """The paces of all shapes, safe from any thread.

    With `learn` a shape's groups begin at one and grow while a picture takes less time in a larger one; else
    `max_batch` is the cap of all but those that ran out of memory.
    """

    def __init__(self, max_batch: int, *, learn: bool = False) -> None:
        self._max_batch = max_batch
        self._learn = learn
        self._paces: OrderedDict[Hashable, ShapeProfile] = OrderedDict()
        self._lock = threading.Lock()

    def cap(self, job: DiffusionRequest) -> int:
        """How many jobs of this shape may share a forward pass."""
        with self._lock:
            return self._of(job).cap

    def record_step(self, job: DiffusionRequest, size: int, seconds: float, cost: float, *, more_wait: bool) -> None:
        """A group of `size` took a step; `more_wait` tells whether more of its shape would have joined.

        Sizes are judged by the `cost`: the seconds, or what of them the processor was the group's own.
        """
        with self._lock:
            pace = self._of(job)
            pace.add(size, seconds, cost)
            if self._learn:
                pace.learn(size, more_wait)
            else:
                pace.cap = pace.base = pace.ceiling

    def record_overhead(self, job: DiffusionRequest, seconds: float) -> None:
        """A picture took so long beside its steps."""
        with self._lock:
            pace = self._of(job)
            pace.around = 0.8 * (pace.around or seconds) + 0.2 * seconds

    def record_out_of_memory(self, job: DiffusionRequest, size: int) -> None:
        """A group of `size` was too large for the memory: halve it."""
        with self._lock:
            self._of(job).lower(size // 2)

    def seconds_for(self, job: DiffusionRequest, steps: int, size: int = 1) -> float | None:
        """How long so many steps of a job take in a group of that size, and what is around them.

        For a shape that was not measured yet: by another one of its model, by the number of pixels; else `None`.
        """
        with self._lock:
            return self._seconds_for(job, steps, size)

    def etas(self, line: Iterable[Ticket[P]], seats: Iterable[RunningRequest[Any, P]]) -> list[float | None]:
        """Seconds until each ticket of the line is drawn, with groups as large as they may be.

        What cannot be known counts as nothing for those behind it, and has no answer itself.
        """
        with self._lock:
            left = [self._seconds_for(seat.ticket.request, seat.steps_left, 1) or 0.0 for seat in seats]
            before, etas = max(left, default=0.0), list[float | None]()
            for ticket in line:
                cap = self._of(ticket.request).cap
                own = self._seconds_for(ticket.request, ticket.steps_left, cap)
                etas.append(None if own is None else before + own)
                before += (own or 0.0) / cap
            return etas

    def _seconds_for(self, job: DiffusionRequest, steps: int, size: int) -> float | None:
        pace, scale = self._paces.get(job.shape), 1.0
        if pace is None or not pace.sizes():
            known = [other for other in self._paces.values() if other.model == job.model and other.sizes()]
            if not known:
                return None
            pace = known[-1]
            scale = job.width * job.height / pace.pixels
        return scale * (steps * (pace.seconds(size) or 0.0) + pace.around)

    def step_timings(self) -> list[StepTimings]:
        """What is known, one figure for each label."""
        with self._lock:
            return [
                StepTimings(pace.label, pace.cap, {n: s for n in pace.sizes() if (s := pace.seconds(n)) is not None})
                for pace in {pace.label: pace for pace in self._paces.values()}.values()
            ]

    def _of(self, job: DiffusionRequest) -> ShapeProfile:
        if job.shape not in self._paces:
            label = f"{job.model} {job.width}x{job.height}" + (" with adapters" if job.loras else "")
            start = 1 if self._learn else self._max_batch
            self._paces[job.shape] = ShapeProfile(
                label, job.model, job.width * job.height, self._max_batch, self._max_batch, start, start
            )
            if len(self._paces) > SHAPES:
                self._paces.popitem(last=False)
        self._paces.move_to_end(job.shape)
        return self._paces[job.shape]
