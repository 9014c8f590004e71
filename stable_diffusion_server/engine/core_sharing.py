"""Divides the CPU's cores among the workers that compute, by measured step times."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

from stable_diffusion_server.types import DiffusionRequest

# A step that takes longer with all cores (seconds for each request in it) fills them: two of them side by side would
# each take almost twice as long (SDXL at full size, 512²: 11.3 s on one core, 6.1 s on two).
LONG_STEP = 0.5
# Samples that decide instead of the model's size, samples that are kept, and shapes that are remembered.
MIN_SAMPLES, MAX_SAMPLES, MAX_SHAPES = 2, 8, 64


class CoreSharing:
    """Which workers compute, and into how many equal shares the cores are divided. Its caller holds a lock.

    With `fixed`, all `workers` may compute, each on its share of the cores. Otherwise long steps run alone, on all
    cores; short ones side by side. A large model alone has all cores too. Small tensors gain little from several cores,
    and keep one share so that the same request gives the same bits: the number of cores changes the rounding.
    `is_large` tells a model by its name; a shape that was not measured counts as long if its model is large. For a
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
        if request.alone or len(times) < MIN_SAMPLES:
            return self._is_large(request.model)
        return times[len(times) // 4] > LONG_STEP  # other work on the machine can only make a step slower
