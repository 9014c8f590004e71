"""Follows measured step times: finds the largest worthwhile batch, and divides the CPU's cores among the workers."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from stable_diffusion_server.concurrency import moving_average
from stable_diffusion_server.engine.interface import P
from stable_diffusion_server.engine.ticket import RunningRequest, Ticket
from stable_diffusion_server.types import DiffusionRequest

# Maximum samples per batch size, minimum samples to compare two sizes, and maximum number of shapes.
MAX_SAMPLES, MIN_SAMPLES, MAX_SHAPES = 8, 4, 64
# A larger batch is accepted if its time per image is below this factor of the smaller batch's. A smaller batch is
# accepted if its time per image times this factor is below the larger batch's.
WORTHWHILE = 0.95
# Steps at the memory ceiling before the tuner tries a ceiling twice as high; doubled after each out-of-memory error.
RECOVERY_STEPS = 2048
# Full-batch steps before a batch size that proved slower is retried (×4 after each failure, up to the maximum), and
# before the next smaller size is re-tested.
PATIENCE, MAX_PATIENCE = 64, 4096
RETEST_STEPS = 512
# A step that takes longer with all cores (seconds for each request in it) fills them: two of them side by side would
# each take almost twice as long (SDXL at full size, 512²: 11.3 s on one core, 6.1 s on two). As many samples decide
# instead of the model's size.
LONG_STEP, FEWEST_SAMPLES = 0.5, 2


@dataclass(slots=True)
class ShapeProfile:
    """Step times of one shape, and the largest batch size known to be worthwhile.

    `cap` is the current limit: `base`, the accepted size, or a size under test. `ceiling` is the limit by memory,
    `max_batch` the configured limit. `costs` are by batch size and number of CPU threads, since only steps of equal
    threads compare.
    """

    label: str
    model: str
    pixels: int
    max_batch: int
    ceiling: int
    cap: int
    base: int
    times: dict[int, deque[float]] = field(default_factory=dict)
    costs: dict[tuple[int, int], deque[float]] = field(default_factory=dict)
    overhead: float | None = None
    patience: int = 0
    steps_to_retest: int = RETEST_STEPS
    failed_tests: int = 0
    out_of_memory_errors: int = 0
    steps_to_recovery: int = 0

    def sizes(self) -> list[int]:
        """Return the measured batch sizes, ascending."""
        return sorted(size for size, times in self.times.items() if times)

    def seconds(self, size: int) -> float | None:
        """Return seconds per step of a batch of `size`, or of the nearest measured size; `None` without samples."""
        if not self.sizes():
            return None
        return _lower_quartile(self.times[min(self.sizes(), key=lambda n: abs(n - size))])

    def add(self, size: int, seconds: float, cost: float, threads: int = 0) -> None:
        """Record a step. The first step of a size includes warm-up and is not counted."""
        if size not in self.times:
            self.times[size] = deque(maxlen=MAX_SAMPLES)
        else:
            self.times[size].append(seconds)
            self.costs.setdefault((size, threads), deque(maxlen=MAX_SAMPLES)).append(cost)
        if size == self.ceiling < self.max_batch:
            self.steps_to_recovery -= 1
            if self.steps_to_recovery <= 0:
                self.ceiling = min(2 * self.ceiling, self.max_batch)
                self.steps_to_recovery = RECOVERY_STEPS * 2**self.out_of_memory_errors

    def is_measured(self, size: int, threads: int = 0) -> bool:
        """Whether there are enough samples of a size to compare it."""
        return len(self.costs.get((size, threads), ())) >= MIN_SAMPLES

    def tune(self, size: int, more_wait: bool, threads: int = 0) -> None:
        """After a step of `size`: compare the size under test, or start to test another size."""
        if size != self.cap or not self.is_measured(size, threads):
            return
        if self.cap != self.base:
            self._compare(threads)
        elif more_wait:
            self.patience -= 1
            self.steps_to_retest -= 1
            larger = min(2 * self.cap, self.ceiling)
            if self.patience <= 0 and larger > self.cap:
                self._test(larger)
            elif self.steps_to_retest <= 0 and self.cap > 1:
                self._test(self.cap // 2)

    def _test(self, size: int) -> None:
        self.times.pop(size, None)
        self.costs = {key: costs for key, costs in self.costs.items() if key[0] != size}
        self.cap, self.steps_to_retest = size, RETEST_STEPS

    def _compare(self, threads: int) -> None:
        worthwhile = False
        if (base := self.costs.get((self.base, threads))) and (cap := self.costs.get((self.cap, threads))):
            now, before = _lower_quartile(cap) / self.cap, _lower_quartile(base) / self.base
            # A smaller batch has less latency, so it may take slightly more time per image.
            worthwhile = now < WORTHWHILE * before if self.cap > self.base else WORTHWHILE * now < before
        if worthwhile:
            self.base, self.failed_tests, self.patience = self.cap, 0, 0
            return
        if self.cap > self.base:
            self.patience = min(PATIENCE * 4**self.failed_tests, MAX_PATIENCE)
            self.failed_tests += 1
        self.cap = self.base

    def lower_ceiling(self, ceiling: int) -> None:
        """Limit batches to `ceiling` for a long time, after an out-of-memory error."""
        self.out_of_memory_errors += 1
        self.steps_to_recovery = RECOVERY_STEPS * 2**self.out_of_memory_errors
        self.ceiling = max(1, min(self.ceiling, ceiling))
        self.cap, self.base = min(self.cap, self.ceiling), min(self.base, self.ceiling)


def _lower_quartile(samples: Iterable[float]) -> float:
    """Return the lower quartile, because other work on the machine can only make a step slower."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 4]


@dataclass(frozen=True, slots=True)
class StepTimings:
    """Timings of one shape for metrics: the current batch cap, and seconds per step by batch size."""

    label: str
    cap: int
    step_seconds: dict[int, float]


class BatchSizeTuner:
    """Profiles of all shapes. Thread-safe.

    With `learn`, the batches of a shape start at one request and grow while a larger batch takes less time per image;
    otherwise the cap is `max_batch`, lowered by out-of-memory errors.
    """

    def __init__(self, max_batch: int, *, learn: bool = False) -> None:
        self._max_batch = max_batch
        self._learn = learn
        # In order of use, because the estimates need that order; cachetools.LRUCache does not expose it.
        self._profiles: OrderedDict[Hashable, ShapeProfile] = OrderedDict()
        self._lock = threading.Lock()
        # How many requests of a size there is memory for; the engine sets it with its denoiser.
        self.memory_limit: Callable[[DiffusionRequest], int] = lambda request: max_batch

    def cap(self, request: DiffusionRequest) -> int:
        """Return the maximum number of requests of this shape that may share a forward pass."""
        with self._lock:
            return self._cap_of(request)

    def record_step(
        self, request: DiffusionRequest, size: int, seconds: float, cost: float, *, more_wait: bool, threads: int = 0
    ) -> None:
        """Record a step of a batch of `size`; `more_wait` says whether more compatible requests were waiting.

        Sizes are compared by `cost`: the seconds, or the CPU seconds of the worker's own thread. `threads` is the
        number of CPU threads that computed it, 0 if another device did.
        """
        with self._lock:
            profile = self._profile_of(request)
            profile.add(size, seconds, cost, threads)
            if self._learn:
                profile.tune(size, more_wait, threads)
            else:
                profile.cap = profile.base = profile.ceiling

    def record_overhead(self, request: DiffusionRequest, seconds: float) -> None:
        """Record the seconds of a request outside its steps: preparing and decoding."""
        with self._lock:
            profile = self._profile_of(request)
            profile.overhead = moving_average(profile.overhead, seconds)

    def record_out_of_memory(self, request: DiffusionRequest, size: int) -> None:
        """Halve the ceiling after a batch of `size` was too large for the memory."""
        with self._lock:
            self._profile_of(request).lower_ceiling(size // 2)

    def seconds_for(self, request: DiffusionRequest, steps: int, size: int = 1) -> float | None:
        """Return estimated seconds of `steps` steps in a batch of `size`, overhead included.

        A shape without samples uses another shape of the same model, scaled by pixels; `None` if there is none.
        """
        with self._lock:
            return self._seconds_for(request, steps, size)

    def etas(self, waiting: Iterable[Ticket[P]], running: Iterable[RunningRequest[P]]) -> list[float | None]:
        """Return the seconds until each waiting ticket is done, if batches are as large as allowed.

        A ticket without an estimate gets `None`, and counts as 0 s for later tickets.
        """
        with self._lock:
            left = [self._seconds_for(one.ticket.request, one.steps_left, 1) or 0.0 for one in running]
            before, etas = max(left, default=0.0), list[float | None]()
            for ticket in waiting:
                if ticket.load_only:
                    etas.append(None)
                    continue
                cap = self._cap_of(ticket.request)
                own = self._seconds_for(ticket.request, ticket.steps_left, cap)
                etas.append(None if own is None else before + own)
                before += (own or 0.0) / cap
            return etas

    def _cap_of(self, request: DiffusionRequest) -> int:
        return min(self._profile_of(request).cap, self.memory_limit(request))

    def _seconds_for(self, request: DiffusionRequest, steps: int, size: int) -> float | None:
        profile, scale = self._profiles.get(request.shape), 1.0
        if profile is None or not profile.sizes():
            known = [other for other in self._profiles.values() if other.model == request.model and other.sizes()]
            if not known:
                return None
            profile = known[-1]
            scale = request.width * request.height / profile.pixels
        passes = steps * request.passes_per_step
        return scale * (passes * (profile.seconds(size) or 0.0) + (profile.overhead or 0.0))

    def step_timings(self) -> list[StepTimings]:
        """Return the timings of all shapes, one entry per label."""
        with self._lock:
            return [
                StepTimings(
                    profile.label,
                    profile.cap,
                    {size: seconds for size in profile.sizes() if (seconds := profile.seconds(size)) is not None},
                )
                for profile in {profile.label: profile for profile in self._profiles.values()}.values()
            ]

    def _profile_of(self, request: DiffusionRequest) -> ShapeProfile:
        if request.shape not in self._profiles:
            start = 1 if self._learn else self._max_batch
            self._profiles[request.shape] = ShapeProfile(
                label=f"{request.model} {request.width}x{request.height}",
                model=request.model,
                pixels=request.width * request.height,
                max_batch=self._max_batch,
                ceiling=self._max_batch,
                cap=start,
                base=start,
            )
            if len(self._profiles) > MAX_SHAPES:
                self._profiles.popitem(last=False)
        self._profiles.move_to_end(request.shape)
        return self._profiles[request.shape]


class CoreSharing:
    """Which workers compute, and into how many equal shares the cores are divided. Its caller holds a lock.

    With `fixed`, all `workers` may compute, each on its share of the cores. Otherwise long steps run alone, on all
    cores; short ones side by side. A large model alone has all cores too. Small tensors gain little from several cores,
    and keep one share so that the same request gives the same bits: the number of cores changes the rounding.
    `is_large` takes a model's name; a shape that was not measured counts as long if its model is large. For a
    request that asks to be `alone`, so that it can be drawn again bit for bit, only the model's size counts.
    """

    def __init__(
        self, workers: int = 1, *, fixed: bool = True, is_large: Callable[[str], bool] = lambda model: False
    ) -> None:
        self._workers = workers
        self._fixed = fixed or workers == 1
        self._is_large = is_large
        self._computing: dict[Hashable, DiffusionRequest] = {}
        self._times: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def may_start(self, worker: Hashable, request: DiffusionRequest) -> bool:
        """Whether a worker may compute a request now."""
        others = [other for name, other in self._computing.items() if name != worker]
        return self._fixed or not others or not any(map(self._is_long, (request, *others)))

    def start(self, worker: Hashable, request: DiffusionRequest) -> None:
        """Record that a worker computes requests like this one."""
        self._computing[worker] = request

    def rest(self, worker: Hashable) -> bool:
        """Record that a worker has nothing to compute. Returns whether that is new."""
        return self._computing.pop(worker, None) is not None

    def shares_for(self, worker: Hashable) -> int:
        """Into how many shares the cores are divided for a worker that computes."""
        request = self._computing.get(worker)
        if self._fixed or request is None or len(self._computing) > 1:
            return self._workers
        if request.alone:
            return 1 if self._is_large(request.model) else self._workers
        return 1 if self._is_large(request.model) or self._is_long(request) else self._workers

    def record_step(self, worker: Hashable, shares: int, seconds: float) -> None:
        """Record the seconds of a worker's step, for each request in it. The first of a shape includes warm-up."""
        shape = self._computing[worker].shape
        if shape in self._times:
            self._times[shape].append(seconds / shares)  # at most what it takes with all cores
        else:
            self._times[shape] = deque(maxlen=MAX_SAMPLES)
        self._times.move_to_end(shape)
        if len(self._times) > MAX_SHAPES:
            self._times.popitem(last=False)

    def _is_long(self, request: DiffusionRequest) -> bool:
        times = sorted(self._times.get(request.shape, ()))
        if request.alone or len(times) < FEWEST_SAMPLES:
            return self._is_large(request.model)
        return times[len(times) // 4] > LONG_STEP  # other work on the machine can only make a step slower
