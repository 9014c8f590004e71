"""The engine as others see it: started, handed jobs, asked how it is, stopped. Its lanes do the drawing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Generic

from stable_diffusion_server.concurrency import describe_caller, may_hold_more
from stable_diffusion_server.engine.batch_tuner import BatchSizeTuner, StepTimings
from stable_diffusion_server.engine.events import EventDispatcher
from stable_diffusion_server.engine.interface import Denoiser, DenoiserCapabilities, EngineState, P, S
from stable_diffusion_server.engine.scheduler import OccupancyCallback, Scheduler
from stable_diffusion_server.engine.ticket import Ticket
from stable_diffusion_server.engine.worker import EngineWorker
from stable_diffusion_server.errors import InvalidInput, ModelLoadError, NotReady, QueueFull
from stable_diffusion_server.types import DiffusionRequest, EngineEvent


class Engine(Generic[S, P]):
    """Draws jobs, those of one shape together; see `waiting` for the order and `lane` for the steps.

    `load` is called on the engine's first thread, then `begin` with what it made and its abilities, as a lane would
    draw, before any job is taken; `ready` once jobs are. `lanes` threads draw side by side, as many
    as the denoiser finds best when it is 0. With `learn`
    groups grow from one as far as it pays, up to `max_batch`. `poisoned` is called when the device can only be used
    again by another process, and `occupied`, on the engine's threads, whenever another job is on the device.
    """

    def __init__(
        self,
        load: Callable[[], Denoiser[S, P]],
        *,
        queue_limit: int,
        max_batch: int,
        workers: int = 1,
        learn: bool = False,
        observe: Callable[[EngineEvent], None] = lambda event: None,
        on_loaded: Callable[[Denoiser[S, P], DenoiserCapabilities], object] = lambda denoiser, abilities: None,
        on_ready: Callable[[], object] = lambda: None,
        on_device_lost: Callable[[], object] = lambda: None,
        on_occupancy: OccupancyCallback = lambda labels, alone: None,
    ) -> None:
        self._load = load
        self._queue_limit = queue_limit
        self._max_batch = max_batch
        self._lanes = workers
        self._begin = on_loaded
        self._ready = on_ready
        self._desk: Scheduler[S, P] = Scheduler(
            BatchSizeTuner(max_batch, learn=learn), EventDispatcher(observe), on_device_lost, on_occupancy
        )
        self._threads: list[threading.Thread] = []

    @property
    def state(self) -> EngineState:
        """Where it is in its life."""
        return self._desk.state

    @property
    def reason(self) -> str:
        """Why it does not draw, in a sentence; empty while it does."""
        return self._desk.reason

    @property
    def waiting(self) -> int:
        """Jobs accepted and not on the device."""
        with self._desk.changed:
            return len(self._desk.queue)

    @property
    def running(self) -> int:
        """Jobs on the device."""
        return len(self._desk.on_device)

    def step_timings(self) -> list[StepTimings]:
        """Step times and batch caps by shape."""
        return self._desk.tuner.step_timings()

    def start(self) -> None:
        """Start the device threads, the first of which loads the models. Returns at once."""
        self._desk.enter(EngineState.LOADING, "The models are loading.")
        self._start(self._run, 1)

    def drain(self) -> None:
        """Take no more work and fail what was not begun; what was goes on to its end."""
        if self.state is not EngineState.FAILED:
            self._desk.enter(EngineState.STOPPED, "The server is going down.")
        self._desk.fail_all(running=False)

    def stop(self, grace: float) -> None:
        """Drain, give what was begun `grace` seconds to end, and fail the rest with `NotReady`."""
        self.drain()
        end = time.monotonic() + grace
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._desk.fail_all(running=True)

    def check_open(self, owner: str = "", *, background: bool = False) -> None:
        """Raise `NotReady` until the models are loaded, `QueueFull` while the line is full, as `submit` would.

        `QueueFull` too for an owner who holds most of a line that is nearly full: others are to find room. Background
        work is held to its share where it was accepted.
        """
        desk = self._desk
        with desk.changed:
            if desk.state is not EngineState.READY:
                raise NotReady(desk.reason, retry_after=5)
            waiting, held = len(desk.queue), desk.queue.held_by(owner) if owner and not background else 0
            if waiting < self._queue_limit and may_hold_more(held, self._queue_limit - waiting):
                return
            retry_after = max(1, math.ceil(desk.etas()[-1] or waiting / self._max_batch))
            whose = f", {held} of them for {describe_caller(owner)}: its share of {self._queue_limit}" if held else ""
            raise QueueFull(f"{waiting} pictures are waiting already{whose}.", retry_after=retry_after)

    def submit(
        self,
        job: DiffusionRequest,
        *,
        owner: str = "",
        background: bool = False,
        previews: bool = False,
        watch: Callable[[EngineEvent], None] | None = None,
        label: str = "",
        exclusive: bool = False,
    ) -> Ticket[P]:
        """Accept a job. Raises `NotReady` until the models are loaded, `QueueFull` as `check_open` does.

        With `exclusive` nothing else is on the device while it is; `label` names it to `occupied`. Owners take turns,
        and background work lets all other go first. `watch` is told of the job's events, on whichever thread they
        happen: queued again and again as it moves up, started, step, and its end. Raises `InvalidInput` for adapters
        where several lanes share the weights.
        """
        desk = self._desk
        with desk.changed:
            self.check_open(owner, background=background)
            if job.loras and self._lanes > 1:
                raise InvalidInput(
                    "Adapters change the weights that all workers share; they need ENGINE_WORKERS=1.", field="lora"
                )
            ticket: Ticket[P] = Ticket(
                job,
                owner=owner,
                background=background,
                wants_previews=previews,
                watch=watch,
                alone=job.alone or exclusive,
            )
            ticket.label, ticket.exclusive = label, exclusive
            desk.admit(ticket)
        ticket.result.add_done_callback(lambda result: desk.forget(ticket) if result.cancelled() else None)
        return ticket

    def _start(self, run: Callable[[], None], number: int) -> None:
        self._threads.append(threading.Thread(target=run, name=f"engine-{number}", daemon=True))
        self._threads[-1].start()

    def _check_lanes(self, abilities: DenoiserCapabilities) -> None:
        if self._lanes > 1 and abilities.unshareable:
            raise ModelLoadError(f"ENGINE_WORKERS={self._lanes} is not possible: {abilities.unshareable}")

    def _run(self) -> None:
        """The first lane: load, let the others begin, draw."""
        desk = self._desk
        try:
            denoiser = self._load()
            abilities = DenoiserCapabilities.of(denoiser)
            self._lanes = self._lanes or abilities.best_workers
            self._check_lanes(abilities)
            if self._lanes > 1:
                abilities.enter_worker(self._lanes)
            self._begin(denoiser, abilities)
        except BaseException as error:  # whatever it is, /readyz has to say that no model will come
            desk.shut_down(error, "The models could not be loaded.")
            return
        prepare_lock = threading.Lock()
        lanes = [EngineWorker(desk, denoiser, abilities, prepare_lock, self._lanes) for _ in range(self._lanes)]
        with desk.changed:
            if desk.state is EngineState.LOADING:
                desk.enter(EngineState.READY, "")
        self._ready()
        for number, lane in enumerate(lanes[1:], 2):
            self._start(lane.run, number)
        lanes[0].run()
