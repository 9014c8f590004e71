"""Loads and unloads models between batches, on the worker's thread, and reports the progress to those who wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic

import structlog

from stable_diffusion_server.engine.interface import Denoiser, EngineResult, EngineState, LoadStopped, P
from stable_diffusion_server.engine.scheduler import Scheduler
from stable_diffusion_server.engine.ticket import Ticket
from stable_diffusion_server.errors import DeviceLost
from stable_diffusion_server.types import EngineEventKind

_log = structlog.get_logger(__name__)


class ModelLoader(Generic[P]):
    """Changes the loaded models of a denoiser as the scheduler's queue requires."""

    def __init__(
        self, scheduler: Scheduler[P], denoiser: Denoiser[Any, P], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._scheduler = scheduler
        self._denoiser = denoiser
        self._clock = clock

    def change_models(self) -> bool:
        """Unload a model that a caller wants unloaded, or load the one that is due. Returns whether one was due."""
        if (model := self._scheduler.next_unload()) is not None:
            self._unload(model)
        elif (model := self._scheduler.next_load()) is not None:
            self._load(model)
        return model is not None

    def _unload(self, model: str) -> None:
        try:
            self._denoiser.unload(model)
        except DeviceLost:
            raise
        except Exception as error:  # answers those who asked for it
            self._scheduler.unloaded(model, error)
        else:
            self._scheduler.unloaded(model)

    def _load(self, model: str) -> None:
        scheduler, started = self._scheduler, self._clock()

        def progress(share: float) -> None:
            if not self._report(model, share):
                raise LoadStopped(model)

        with scheduler.changed:
            scheduler.report_occupancy(self._waiting_for(model))
        try:
            progress(0.0)
            done = self._denoiser.load(model, scheduler.busy_models(), progress)
        except LoadStopped:
            _log.info("nobody waits for a model any more; its load ends", model=model)
        except DeviceLost:
            raise
        except Exception as error:  # a load may raise anything; it fails the requests of this model only
            _log.warning("a model could not be loaded", model=model, exc_info=error)
            self._fail(model, error)
        else:
            if done:
                seconds = self._clock() - started
                _log.info("a model was loaded", model=model, seconds=round(seconds, 2))
                self._settle(model, seconds)
        with scheduler.changed:
            scheduler.report_occupancy()

    def _report(self, model: str, share: float) -> bool:
        """Report the loaded share (0..1) to the tickets that wait for a model. Returns whether there are any."""
        scheduler = self._scheduler
        with scheduler.changed:
            waiting = self._waiting_for(model)
            for ticket in waiting:
                scheduler.events.dispatch(EngineEventKind.LOADING, ticket, loaded=share)
            return bool(waiting) and scheduler.state is not EngineState.FAILED

    def _settle(self, model: str, seconds: float) -> None:
        """Settle the tickets that only wait for a load, and record which ones the model is loaded for."""
        scheduler = self._scheduler
        with scheduler.changed:
            waiting = self._waiting_for(model)
            for ticket in (ticket for ticket in waiting if ticket.load_only):
                scheduler.queue.remove(ticket)
                if ticket.succeed(EngineResult(None, {"load": seconds}, batched=False)):
                    scheduler.events.dispatch(EngineEventKind.DONE, ticket)
            scheduler.switcher.loaded(model, (ticket for ticket in waiting if not ticket.load_only), seconds)
            scheduler.report_positions()

    def _fail(self, model: str, error: Exception) -> None:
        """Fail the tickets that wait for a model that cannot be loaded."""
        scheduler = self._scheduler
        with scheduler.changed:
            for ticket in self._waiting_for(model):
                scheduler.queue.remove(ticket)
                scheduler.fail(ticket, error)
            scheduler.report_positions()

    def _waiting_for(self, model: str) -> list[Ticket[Any]]:
        """Return the tickets that cannot start before a model is loaded."""
        tickets = self._scheduler.waiting_tickets()
        return [ticket for ticket in tickets if ticket.request.model == model and ticket.suspended is None]
