"""Runs a module's forward pass on the CPU without Python, as TorchScript. Knows tensors, and no jobs."""

from __future__ import annotations

import functools
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from stable_diffusion_server.pipelines.acceleration.call_signature import rebuild, signature, structure, tensors_of

_log = structlog.get_logger(__name__)

# What the tracer doubts is found out by comparing.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
# TorchScript has no successor that needs neither Python nor a compiler at run time (docs/decisions/0034).
warnings.filterwarnings("ignore", message=".torch.jit", category=DeprecationWarning)

# Python takes some ten milliseconds of a pass: of one that takes longer than this, less than tracing it is worth.
_WORTH_SECONDS = 0.5
# Beyond these all kinds of calls are forgotten, and get to know the traces there are anew.
_MOST_KINDS = 512
# A module's traces, counting those that were of no use: TorchScript never gives back the 20 MB that one takes.
_MOST_TRACES = 16


@dataclass(frozen=True, slots=True)
class _Trace:
    """A traced pass, the form of the calls it was made for, and what its answers look like."""

    function: Any
    form: Hashable
    answer: Any

    def run(self, call: Any) -> Any:
        """The answer to a call of its form."""
        given = self.function(*tensors_of(call))
        return rebuild(self.answer, iter((given,) if isinstance(given, torch.Tensor) else given))


@dataclass(slots=True)
class _Kind:
    """What is known of a kind of call; `settled` once it is known how to answer it, by the trace or without one."""

    calls: int = 0
    trace: _Trace | None = None
    settled: bool = False


class TorchScriptRunner:
    """A forward pass that is traced, and run by the trace from then on: put it in place of a module's `forward`.

    A kind of call is its arguments with shapes, types and strides in place of tensors. The second call of a kind looks
    for a trace that gives the same bits as the pass itself, and makes one where there is none yet; the third has to
    agree as well. The calls after it are answered by that trace, which does not hold Python's lock: threads compute
    side by side.

    The weights must stay as they are; calls may come from any thread. What cannot be traced, what answers otherwise
    and what takes so long that nothing is gained runs as it is.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # its signature is looked at
        self._forward = forward
        self._name = forward.__qualname__
        self._kinds: dict[Hashable, _Kind] = {}
        self._traces: list[_Trace] = []
        self._made = 0
        self._judging = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The answer of the forward pass."""
        call = (args, kwargs)
        kind = self._kind(signature(call))
        # Read once: another thread that was already judging may still take it back.
        if kind.settled and (trace := kind.trace) is not None:
            return trace.run(call)
        began = time.perf_counter()
        answer = self._forward(*args, **kwargs)
        seconds = time.perf_counter() - began
        if not kind.settled and self._judging.acquire(blocking=False):
            try:
                self._judge(kind, call, answer, seconds)
            finally:
                self._judging.release()
        return answer

    def _kind(self, name: Hashable) -> _Kind:
        kinds = self._kinds
        if name not in kinds and len(kinds) >= _MOST_KINDS:
            self._kinds = kinds = {}
        return kinds.setdefault(name, _Kind())

    def _judge(self, kind: _Kind, call: Any, answer: Any, seconds: float) -> None:
        """Get to know a kind by one more of its calls."""
        if not _tells(answer):
            return
        kind.calls += 1
        if kind.calls == 1:  # sizes that come once are not worth a trace, nor is a pass judged that warms up
            return
        if kind.calls == 2:
            kind.trace = self._trace_for(call, answer) if seconds < _WORTH_SECONDS else None
            kind.settled = kind.trace is None
        else:
            if kind.trace is not None and not _same(kind.trace, call, answer):
                kind.trace = None  # it holds numbers of the call it was made by
            kind.settled = True

    def _trace_for(self, call: Any, answer: Any) -> _Trace | None:
        """A trace that answers a call to the bit, if there can be one."""
        form = structure(call)
        for trace in self._traces:
            if trace.form == form and _same(trace, call, answer):
                return trace
        if self._made == _MOST_TRACES:
            return None
        self._made += 1
        try:
            made = _Trace(self._traced(call), form, rebuild(answer, itertools.repeat(torch.empty(0))))
        except Exception as error:  # what a tracer cannot follow shows in many ways
            _log.info("not traced", module=self._name, exc_info=error)
            return None
        if not _same(made, call, answer):
            _log.info("a trace gave other numbers and is not used", module=self._name)
            return None
        self._traces.append(made)
        return made

    def _traced(self, call: Any) -> Any:
        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = rebuild(call, iter(tensors))
            return tuple(tensors_of(self._forward(*args, **kwargs)))

        return torch.jit.trace(run, tuple(tensors_of(call)), check_trace=False)


def trace(module: torch.nn.Module) -> None:
    """Have a module's forward pass traced from now on; its weights need no gradients then."""
    module.requires_grad_(False)
    module.forward = TorchScriptRunner(module.forward)


def _tells(answer: Any) -> bool:
    """Whether an answer tells traces apart: numbers that are not finite, or all nought, any trace may give."""
    return all(bool(torch.isfinite(tensor).all()) and bool(tensor.any()) for tensor in tensors_of(answer))


def _same(trace: _Trace, call: Any, answer: Any) -> bool:
    """Whether a trace answers a call with the very same bits, laid out the same."""
    try:
        given = trace.run(call)
    except RuntimeError:  # a size the trace cannot take
        return False
    return signature(given) == signature(answer) and all(map(torch.equal, tensors_of(given), tensors_of(answer)))
