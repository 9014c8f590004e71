"""Engine worker thread: admits requests into a batch, runs one denoising step at a time, returns finished images."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic

import structlog

from stable_diffusion_server.engine.interface import Denoiser, EngineState, P
from stable_diffusion_server.engine.model_loading import ModelLoader
from stable_diffusion_server.engine.previews import PreviewScheduler
from stable_diffusion_server.engine.scheduler import Scheduler
from stable_diffusion_server.engine.ticket import RunningRequest, Ticket
from stable_diffusion_server.errors import DeviceLost, NotFinite, OutOfMemory
from stable_diffusion_server.types import DiffusionRequest, EngineEventKind

# Steps after which a batch yields the device to waiting requests; background requests yield earlier.
TIME_SLICE, BACKGROUND_TIME_SLICE = 32, 8
# Maximum number of starts of a request, after failures of its batch or of the device.
MAX_ATTEMPTS = 10

_log = structlog.get_logger(__name__)


class EngineWorker(Generic[P]):
    """Runs batches until the engine stops.

    With resident weights, requests join and leave the batch at every step. Otherwise the batch runs in phases, since
    moving weights is slow: prepare all requests, run all steps, decode all.
    """

    def __init__(
        self, scheduler: Scheduler[P], denoiser: Denoiser[Any, P], prepare_lock: threading.Lock, workers: int
    ) -> None:
        self._scheduler = scheduler
        self._denoiser = denoiser
        # Tokenizers are not thread-safe, so only one worker prepares at a time.
        self._prepare_lock = prepare_lock
        self._cpu_threads = denoiser.cpu_threads
        # PyTorch starts the threads of several workers with the number that another one set last.
        self._shares = 1 if workers == 1 else 0
        self._previews = PreviewScheduler(denoiser)
        self._loader = ModelLoader(scheduler, denoiser)
        self._batch: list[RunningRequest[P]] = []
        self._waiting_steps = 0

    def run(self) -> None:
        """Run batches until the engine stops. Shuts the engine down on an error that no single request caused."""
        try:
            while self._scheduler.wait_for_work():
                if not (self._scheduler.on_demand and self._loader.change_models()):
                    self._run_batch()
        except BaseException as error:  # without this thread callers would wait forever
            self._scheduler.shut_down(error, "Drawing has ended unexpectedly; the server has to be restarted.")

    def _run_batch(self) -> None:
        """Run the first waiting request and all requests that can join, until the batch is empty or preempted."""
        self._waiting_steps = 0
        self._admit()
        if self._denoiser.resident:
            self._run_continuously()
        else:
            self._run_in_phases()

    def _is_running(self) -> bool:
        return bool(self._batch) and self._scheduler.state is not EngineState.FAILED

    def _run_continuously(self) -> None:
        while self._is_running():
            self._step()
            for running in self._take_done():
                self._finish(running)
            self._drop_settled()
            if self._time_slice_expired():
                self._scheduler.preempt(self._batch)
                self._batch = []
                return
            self._admit()

    def _run_in_phases(self) -> None:
        finished: list[RunningRequest[P]] = []
        while self._is_running():
            self._step()
            finished += self._take_done()
            self._drop_settled()
        for running in finished:
            self._finish(running)
        self._denoiser.release_memory()

    def _take_done(self) -> list[RunningRequest[P]]:
        done = [running for running in self._batch if running.state.done]
        self._batch = [running for running in self._batch if not running.state.done]
        return done

    def _drop_settled(self) -> None:
        self._batch = [running for running in self._batch if not self._scheduler.drop_if_settled(running)]

    def _time_slice_expired(self) -> bool:
        """Whether a request that this batch blocks has waited a full time slice."""
        first = self._scheduler.first_waiting()
        if first is None or not self._batch or not self._conflicts_with(first):
            self._waiting_steps = 0
            return False
        self._waiting_steps += 1
        lower_class = all(running.ticket.background for running in self._batch) and not first.background
        return self._waiting_steps >= (BACKGROUND_TIME_SLICE if lower_class else TIME_SLICE)

    def _conflicts_with(self, first: Ticket[P]) -> bool:
        tickets = [running.ticket for running in self._batch]
        return (
            first.alone
            or first.request.shape != tickets[0].request.shape
            or first.owner not in {ticket.owner for ticket in tickets}
            or (not first.background and all(ticket.background for ticket in tickets))
        )

    def _admit(self) -> None:
        """Add waiting requests to the batch while there are compatible ones."""
        while (ticket := self._scheduler.pop_next(self._batch)) is not None:
            running = ticket.suspended or self._prepare(ticket)
            if running is not None and not self._scheduler.drop_if_settled(running):
                ticket.suspended = None
                self._scheduler.on_device[ticket] = running
                self._batch.append(running)

    def _prepare(self, ticket: Ticket[P]) -> RunningRequest[P] | None:
        """Prepare a request. Returns `None` if it failed or went back into the queue."""
        scheduler = self._scheduler
        ticket.attempts += 1
        started = time.perf_counter()
        self._take_cores()
        try:
            with self._prepare_lock:
                state = self._denoiser.prepare(ticket.request)
        except DeviceLost:
            raise
        except OutOfMemory as error:
            self._out_of_memory([ticket], len(self._batch) + 1, error)
            return None
        except Exception as error:  # fails this request only
            scheduler.fail(ticket, error)
            return None
        now = time.perf_counter()
        timings = {"queue": started - ticket.accepted_at, "prepare": now - started, "denoise": 0.0}
        running: RunningRequest[P] = RunningRequest(ticket, state, timings)
        eta = scheduler.tuner.seconds_for(ticket.request, running.steps_left)
        scheduler.events.dispatch(EngineEventKind.STARTED, ticket, state, eta_seconds=eta)
        return running

    def _take_cores(self) -> int:
        """Take this worker's share of the cores. Returns its number of CPU threads, 0 if another device computes."""
        with self._scheduler.changed:
            shares = self._scheduler.sharing.shares_for(threading.get_ident())
        if shares != self._shares:
            self._shares = shares
            self._denoiser.share_cores(shares)
        return max(1, self._cpu_threads // shares) if self._cpu_threads else 0

    def _step(self) -> None:
        batch, threads = self._batch, self._take_cores()
        # With one CPU thread, its CPU time excludes the load of other processes.
        cost_clock = time.thread_time if threads == 1 else time.perf_counter
        started, cost_before = time.perf_counter(), cost_clock()
        try:
            self._denoiser.step([running.state for running in batch])
        except DeviceLost:
            raise
        except OutOfMemory as error:
            self._batch = []
            self._out_of_memory([running.ticket for running in batch], len(batch), error)
            return
        except Exception as error:  # a model may raise anything; fail requests, not the thread
            self._batch = []
            self._step_failed(batch, error)
            return
        seconds, cost = time.perf_counter() - started, cost_clock() - cost_before
        self._scheduler.tuner.record_step(
            batch[0].ticket.request,
            len(batch),
            seconds,
            cost,
            more_wait=self._scheduler.could_grow(batch),
            threads=threads,
        )
        with self._scheduler.changed:
            self._scheduler.sharing.record_step(threading.get_ident(), self._shares, seconds / len(batch))
        for running in batch:
            running.timings["denoise"] += seconds
            running.attributed_step_seconds += seconds / len(batch)
            running.batched |= len(batch) > 1
            self._report_step(running, len(batch))

    def _report_step(self, running: RunningRequest[P], batch_size: int) -> None:
        self._scheduler.events.dispatch(
            EngineEventKind.STEP,
            running.ticket,
            running.state,
            eta_seconds=self._scheduler.tuner.seconds_for(running.ticket.request, running.steps_left, batch_size),
            preview=self._previews.preview_of(running),
            picture=self._unfinished_picture(running),
            batch_size=batch_size,
        )

    def _unfinished_picture(self, running: RunningRequest[P]) -> P | None:
        """Decode a request that is not done, if its caller wants that; once for each time it is wanted."""
        wanted = running.ticket.wants_picture is not None and running.ticket.wants_picture()
        if not wanted or running.pictured or running.state.done:
            running.pictured = running.pictured and wanted
            return None
        try:
            picture = self._retry_with_less_memory(running.state, shrink=False)
        except DeviceLost:
            raise
        except Exception as error:  # the request itself goes on
            _log.warning("an unfinished picture could not be decoded", exc_info=error)
            return None
        running.pictured = True
        return picture

    def _step_failed(self, batch: Sequence[RunningRequest[P]], error: Exception) -> None:
        """Fail a single request; restart the requests of a larger batch alone, since one of them may be the cause."""
        if len(batch) == 1:
            self._scheduler.fail(batch[0].ticket, error)
            return
        _log.warning("a batched step failed; its requests run one by one", exc_info=error)
        for running in batch:
            running.ticket.alone = True
        self._scheduler.requeue((running.ticket for running in batch), error)

    def _out_of_memory(self, tickets: Sequence[Ticket[P]], batch_size: int, error: OutOfMemory) -> None:
        """Restart in batches of half the size; restart a single request once, with the memory that was freed."""
        request = tickets[0].request
        self._scheduler.tuner.record_out_of_memory(request, batch_size)
        self._denoiser.release_memory()
        retry = batch_size > 1 or tickets[0].attempts == 1
        _log.warning("out of memory", batch_size=batch_size, retry=retry, size=f"{request.width}x{request.height}")
        failed = [ticket for ticket in tickets if not retry or ticket.attempts >= MAX_ATTEMPTS]
        for ticket in failed:
            self._scheduler.fail(ticket, error)
        self._scheduler.requeue((ticket for ticket in tickets if ticket not in failed), error)

    def _finish(self, running: RunningRequest[P]) -> None:
        if self._scheduler.drop_if_settled(running):
            return
        started = time.perf_counter()
        self._take_cores()
        try:
            product = self._retry_with_less_memory(running.state, shrink=True)
        except DeviceLost:
            raise
        except Exception as error:  # as in _step
            self._scheduler.fail(running.ticket, error)
            if self._scheduler.health.suspects_loras():
                self._try_without_loras(running.ticket.request)
            return
        running.timings["decode"] = time.perf_counter() - started
        self._scheduler.succeed(running, product)

    def _try_without_loras(self, request: DiffusionRequest) -> None:
        """Run a request without its LoRAs to test the device. Raises `DeviceLost` if that is not finite either."""
        plain = replace(request, loras=(), lora_digests=())
        _log.warning("images with LoRAs are not finite; trying one without", model=request.model)
        try:
            state = self._denoiser.prepare(plain)
            while not state.done:
                self._denoiser.step([state])
            self._denoiser.finish(state)
        except NotFinite as error:
            raise DeviceLost("The device gives numbers that are not finite, whatever is drawn.") from error
        except DeviceLost:
            raise
        except Exception as error:  # not evidence against the device; no caller waits for this trial
            _log.warning("the trial without LoRAs failed", exc_info=error)

    def _retry_with_less_memory(self, state: Any, *, shrink: bool) -> P:
        """Finish a state; after memory was freed again, and then, with `shrink`, with less memory for this state."""
        released = False
        while True:
            try:
                return self._denoiser.finish(state)
            except OutOfMemory:
                self._denoiser.release_memory()
                if released and not (shrink and self._denoiser.shrink(state)):
                    raise
                released = True
