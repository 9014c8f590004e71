"""Runs a stock pipeline's own call one step at a time, in a thread that waits after each step."""

from __future__ import annotations

import threading
import traceback
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from stable_diffusion_server.pipelines.stock.calls import run_call

# Seconds to wait until the thread of a call that is cancelled has ended; it takes 0.3 ms.
_PATIENCE = 5.0
_SHOWN_FRAMES = 12


class _CallCancelled(BaseException):
    """Raised inside the stock call. No `Exception`, so that no handler on its way takes it for an error."""


class StockCall:
    """One call of a pipeline object that belongs to this call alone. For one controlling thread.

    The call runs until its loop opens its progress bar (`start`), then to one callback for each `step`. When the last
    reference to a `StockCall` goes, its call is cancelled and its thread ends.
    """

    def __init__(self, pipeline: Any, arguments: Mapping[str, Any], device: torch.device) -> None:
        self._shared = shared = _Shared()
        place = _ComputePlace(device)
        # The thread holds what is shared and not this object, so that losing this object is noticed.
        self._thread = threading.Thread(
            target=_run, args=(shared, place, pipeline, dict(arguments)), name="stock-call", daemon=True
        )
        self._cancel = weakref.finalize(self, _cancel, shared, self._thread)
        self._cancel.atexit = False

    @property
    def index(self) -> int:
        """Number of finished steps."""
        return self._shared.index

    @property
    def steps(self) -> int:
        """Number of steps that the loop takes; some schedulers take more than were asked for."""
        return max(self._shared.total, self._shared.index)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        shared = self._shared
        return shared.ended or (shared.total > 0 and shared.index >= shared.total)

    @property
    def failed(self) -> bool:
        """Whether the call ended without returning anything."""
        return self._shared.ended and self._shared.returned is None

    @property
    def latents(self) -> torch.Tensor | None:
        """The latents after the last step, as the pipeline's loop has them."""
        return self._shared.latents

    @property
    def previous(self) -> torch.Tensor | None:
        """The latents before the last step."""
        return self._shared.previous

    def start(self) -> None:
        """Run up to the first step. Raises what the call raises, as `step` and `finish` do."""
        self._shared.threads = torch.get_num_threads()
        self._thread.start()
        self._shared.wait_for_call()

    def step(self) -> None:
        """Run one step."""
        self._shared.threads = torch.get_num_threads()
        self._shared.resume_call()
        self._shared.wait_for_call()

    def finish(self) -> Any:
        """Run what is left of the call; what it returned."""
        while not self._shared.ended:
            self.step()
        return self._shared.returned

    def cancel(self) -> None:
        """End the call where it waits, and its thread. Without effect on a call that has ended."""
        self._cancel()


class _Shared:
    """What both threads use. Bare locks, taken from the start, hand over in half the time of semaphores."""

    def __init__(self) -> None:
        self.latents: torch.Tensor | None = None
        self.previous: torch.Tensor | None = None
        self.returned: Any = None
        self.index = self.total = 0
        self.threads = 1
        self.ended = self.cancelled = False
        self.error: BaseException | None = None
        self._call_may_run, self._call_waits = threading.Lock(), threading.Lock()
        self._call_may_run.acquire()
        self._call_waits.acquire()

    def resume_call(self) -> None:
        self._call_may_run.release()

    def wait_for_call(self) -> None:
        self._call_waits.acquire()
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # a circle by this frame, which would hold the state until the collector runs

    def hand_back(self) -> None:
        """In the call's thread: let the controlling thread go on, and wait for it."""
        self._call_waits.release()
        self._call_may_run.acquire()
        if self.cancelled:
            raise _CallCancelled
        self.share_cores()

    def share_cores(self) -> None:
        """Compute with as many threads as the controlling thread would: the setting is that of each thread."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)

    def end(self) -> None:
        self.ended = True
        self._call_waits.release()


class _ComputePlace:
    """The controlling thread's device and stream, which are local to each thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run a block in inference mode, on this device and stream."""
        with torch.inference_mode():
            if self._stream is None:
                yield
                return
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                yield


def _cancel(shared: _Shared, thread: threading.Thread) -> None:
    """End a call that waits, is not started, or has ended. The collector may run this in any thread."""
    shared.cancelled = True
    shared.latents = shared.previous = shared.returned = None
    if thread.ident is None:
        return
    if not shared.ended:
        shared.resume_call()
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)


def _run(shared: _Shared, place: _ComputePlace, pipeline: Any, arguments: dict[str, Any]) -> None:
    """The thread of a call."""
    try:
        with place.entered():
            shared.share_cores()
            shared.returned = run_call(pipeline, arguments, _Seams(shared))
    except _CallCancelled:
        pass
    except BaseException as error:
        shared.error = _without_frames(error)
        shared.latents = shared.previous = None
    finally:
        shared.end()


class _Seams:
    """What the call's thread does where it hands control back."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._before = 0

    def opened(self, steps: int, later: int) -> None:
        """Before the first step of a loop of so many steps; `later` is what other loops after it will take."""
        shared = self._shared
        first, self._before = not shared.total, shared.index
        shared.total = self._before + steps + later
        if first:
            shared.hand_back()

    def stepped(self, index: int, latents: torch.Tensor | None) -> None:
        """After the step of this index in its loop."""
        shared = self._shared
        shared.index = self._before + index + 1
        shared.previous, shared.latents = shared.latents, latents
        shared.hand_back()


def _without_frames(error: BaseException) -> BaseException:
    """An error without its frames, which hold the tensors of the call; a note says where it was raised."""
    places = traceback.format_tb(error.__traceback__)[-_SHOWN_FRAMES:]
    error.add_note("In the stock pipeline's call:\n" + "".join(places))
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            waiting += [one.__cause__, one.__context__]
    return error
