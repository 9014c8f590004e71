"""The engine: starts the worker threads, accepts requests, reports its state, stops."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic

from stable_diffusion_server.concurrency import describe_caller, may_hold_more
from stable_diffusion_server.engine.batch_tuner import BatchSizeTuner, CoreSharing, StepTimings
from stable_diffusion_server.engine.events import EventDispatcher
from stable_diffusion_server.engine.interface import Denoiser, EngineResult, EngineState, P
from stable_diffusion_server.engine.scheduler import OccupancyCallback, Scheduler
from stable_diffusion_server.engine.ticket import Ticket, request_to_load
from stable_diffusion_server.engine.worker import EngineWorker
from stable_diffusion_server.errors import ModelLoadError, ModelStays, NotReady, QueueFull
from stable_diffusion_server.types import DiffusionRequest, EngineEvent


class Engine(Generic[P]):
    """Runs requests on a device. Requests of one shape share batches (continuous batching per denoising step).

    The first engine thread calls `load`, then `on_loaded` with the denoiser, before the engine accepts requests, then
    `on_ready`. `workers` is the number of threads that run batches in parallel; 0 takes the denoiser's own choice, and
    divides the cores among the workers as `CoreSharing` does. With `learn`, batches grow from one request as far as
    that is faster, up to `max_batch`.
    The engine calls `on_device_lost` when only a new process can use the device again, and `on_occupancy`, on its
    threads, whenever the set of requests on the device changes. A request waits `switch_patience` seconds for its
    model before requests of loaded models wait for it.
    """

    def __init__(
        self,
        load: Callable[[], Denoiser[Any, P]],
        *,
        queue_limit: int,
        max_batch: int,
        workers: int = 1,
        learn: bool = False,
        observe: Callable[[EngineEvent], None] = lambda event: None,
        on_loaded: Callable[[Denoiser[Any, P]], object] = lambda denoiser: None,
        on_ready: Callable[[], object] = lambda: None,
        on_device_lost: Callable[[], object] = lambda: None,
        on_occupancy: OccupancyCallback = lambda labels, alone: None,
        switch_patience: float = 30.0,
    ) -> None:
        self._load = load
        self._queue_limit = queue_limit
        self._max_batch = max_batch
        self._workers = workers
        self._on_loaded = on_loaded
        self._on_ready = on_ready
        self._scheduler: Scheduler[P] = Scheduler(
            BatchSizeTuner(max_batch, learn=learn),
            EventDispatcher(observe),
            on_device_lost,
            on_occupancy,
            switch_patience,
        )
        self._threads: list[threading.Thread] = []

    @property
    def state(self) -> EngineState:
        """Lifecycle state."""
        return self._scheduler.state

    @property
    def reason(self) -> str:
        """Why the engine does not run, as a sentence; empty while it runs."""
        return self._scheduler.reason

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        with self._scheduler.changed:
            return len(self._scheduler.queue)

    @property
    def running(self) -> int:
        """Number of requests on the device."""
        return len(self._scheduler.on_device)

    def step_timings(self) -> list[StepTimings]:
        """Return step times and batch caps by shape."""
        return self._scheduler.tuner.step_timings()

    def start(self) -> None:
        """Start the first worker thread, which loads the models. Returns at once."""
        self._scheduler.enter(EngineState.LOADING, "The models are loading.")
        self._start_thread(self._load_and_run, 1)

    def drain(self) -> None:
        """Accept no more requests, fail the requests that were not started, and let the others finish."""
        if self.state is not EngineState.FAILED:
            self._scheduler.enter(EngineState.STOPPED, "The server is going down.")
        self._scheduler.fail_all(running=False)

    def stop(self, grace: float) -> None:
        """Drain, wait up to `grace` seconds for started requests, and fail the rest with `NotReady`."""
        self.drain()
        end = time.monotonic() + grace
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._scheduler.fail_all(running=True)

    def check_open(self, owner: str = "", *, background: bool = False) -> None:
        """Raise what `submit` would raise: `NotReady` until the models are loaded, `QueueFull` while the queue is full.

        Also raises `QueueFull` for an owner that holds most of a nearly full queue, so that others find places.
        This share does not apply to background requests: the job manager limits them when it accepts a job.
        """
        scheduler = self._scheduler
        with scheduler.changed:
            if scheduler.state is not EngineState.READY:
                raise NotReady(scheduler.reason, retry_after=5)
            waiting = len(scheduler.queue)
            held = scheduler.queue.held_by(owner) if owner and not background else 0
            if waiting < self._queue_limit and may_hold_more(held, self._queue_limit - waiting):
                return
            retry_after = max(1, math.ceil(scheduler.etas()[-1] or waiting / self._max_batch))
            share = f", {held} of them for {describe_caller(owner)}: its share of {self._queue_limit}" if held else ""
            raise QueueFull(f"{waiting} pictures are waiting already{share}.", retry_after=retry_after)

    def submit(
        self,
        job: DiffusionRequest,
        *,
        owner: str = "",
        background: bool = False,
        previews: bool = False,
        watch: Callable[[EngineEvent], None] | None = None,
        wants_picture: Callable[[], bool] | None = None,
        label: str = "",
        exclusive: bool = False,
    ) -> Ticket[P]:
        """Queue a request. Raises `NotReady` and `QueueFull` as `check_open` does.

        Owners share the device fairly; background requests run after all others. `watch` receives the request's
        events, on any thread: queued (again at each new position), started, step, and its end. `wants_picture` is asked
        after each step whether that event carries the unfinished picture. An `exclusive` request
        runs with no other on the device; `label` names it to `on_occupancy`.
        """
        scheduler = self._scheduler
        with scheduler.changed:
            self.check_open(owner, background=background)
            ticket: Ticket[P] = Ticket(
                job,
                owner=owner,
                background=background,
                wants_previews=previews,
                watch=watch,
                wants_picture=wants_picture,
                alone=job.alone or exclusive,
                exclusive=exclusive,
                label=label,
            )
            scheduler.admit(ticket)
        ticket.result.add_done_callback(lambda result: scheduler.forget(ticket) if result.cancelled() else None)
        return ticket

    def load_model(
        self,
        model: str,
        *,
        owner: str = "",
        background: bool = False,
        watch: Callable[[EngineEvent], None] | None = None,
        label: str = "",
        exclusive: bool = False,
    ) -> Ticket[P]:
        """Have a model loaded; the ticket is done when it is. Raises `NotReady` and `QueueFull` as `check_open` does.

        `background`, `label` and `exclusive` are those of the request that needs the model. Cancelling the ticket
        ends the load, unless others wait for it.
        """
        scheduler = self._scheduler
        with scheduler.changed:
            self.check_open(owner, background=background)
            ticket: Ticket[P] = Ticket(
                request_to_load(model),
                owner=owner,
                background=background,
                watch=watch,
                alone=True,
                exclusive=exclusive,
                label=label,
                load_only=True,
            )
            if scheduler.is_there(model):
                ticket.succeed(EngineResult(None, {}, batched=False))  # type: ignore[arg-type]  # no image
                return ticket
            scheduler.admit(ticket)
        ticket.result.add_done_callback(lambda result: scheduler.forget(ticket) if result.cancelled() else None)
        return ticket

    def unload_model(self, model: str) -> Future[None]:
        """Have a model unloaded as soon as no request uses it. Raises `NotReady`, and `ModelStays` if it cannot be."""
        scheduler = self._scheduler
        with scheduler.changed:  # nobody settles what is asked after the engine has ended
            if scheduler.state is not EngineState.READY:
                raise NotReady(scheduler.reason, retry_after=5)
            if not scheduler.on_demand:
                raise ModelStays(
                    f"{model} was loaded at the start and stays loaded: no model is loaded on demand here."
                )
            return scheduler.ask_to_unload(model)

    def _start_thread(self, run: Callable[[], None], number: int) -> None:
        self._threads.append(threading.Thread(target=run, name=f"engine-{number}", daemon=True))
        self._threads[-1].start()

    def _load_denoiser(self) -> Denoiser[Any, P]:
        denoiser = self._load()
        chosen, self._workers = self._workers > 0, self._workers or denoiser.best_workers
        if self._workers > 1 and denoiser.unshareable:
            raise ModelLoadError(f"ENGINE_WORKERS={self._workers} is not possible: {denoiser.unshareable}")
        # Cores are divided as needed only where nobody chose the number of workers, and there are cores to divide.
        sharing = CoreSharing(self._workers, fixed=chosen or denoiser.cpu_threads < 2, is_large=denoiser.is_large)
        if self._workers > 1 and chosen:
            denoiser.share_cores(self._workers)
        self._scheduler.use_models(denoiser, sharing)
        self._on_loaded(denoiser)
        return denoiser

    def _load_and_run(self) -> None:
        """First worker thread: load the models, start the other workers, run batches."""
        scheduler = self._scheduler
        try:
            denoiser = self._load_denoiser()
        except BaseException as error:  # /readyz has to report any error
            scheduler.shut_down(error, "The models could not be loaded.")
            return
        scheduler.tuner.memory_limit = denoiser.batch_limit
        prepare_lock = threading.Lock()
        workers = [EngineWorker(scheduler, denoiser, prepare_lock, self._workers) for _ in range(self._workers)]
        with scheduler.changed:
            if scheduler.state is EngineState.LOADING:
                scheduler.enter(EngineState.READY, "")
        self._on_ready()
        for number, worker in enumerate(workers[1:], 2):
            self._start_thread(worker.run, number)
        workers[0].run()
