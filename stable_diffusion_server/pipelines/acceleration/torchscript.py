"""Runs a module's forward pass on the CPU as TorchScript, without holding Python's lock."""

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
from cachetools import LRUCache

from stable_diffusion_server.pipelines.acceleration.call_signature import rebuild, signature, structure, tensors_of
from stable_diffusion_server.pipelines.wrapping import is_altered

_log = structlog.get_logger(__name__)

# Traces are compared with the module itself, which replaces the tracer's own warnings.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
# TorchScript has no successor that needs neither Python nor a compiler at run time (docs/decisions/0034).
warnings.filterwarnings("ignore", message=".torch.jit", category=DeprecationWarning)

# Python takes about 10 ms of a pass; for a pass longer than this, tracing gains too little.
_WORTH_SECONDS = 0.5
# Call signatures that are remembered; the least recently used is evicted, and may reuse an existing trace later.
_MAX_SIGNATURES = 512
# Traces per module, discarded ones included: TorchScript never frees the 20 MB that one takes.
_MAX_TRACES = 16


@dataclass(frozen=True, slots=True)
class _Trace:
    """A traced pass, the structure of the calls it was made for, and an output as a template."""

    function: Any
    structure: Hashable
    output: Any

    def run(self, call: Any) -> Any:
        """The output for a call of its structure."""
        tensors = self.function(*tensors_of(call))
        return rebuild(self.output, iter((tensors,) if isinstance(tensors, torch.Tensor) else tensors))


@dataclass(slots=True)
class _Signature:
    """The state of one call signature. `settled` is true once it is decided whether the trace is used."""

    calls: int = 0
    trace: _Trace | None = None
    settled: bool = False


class TorchScriptRunner:
    """A replacement for a module's `forward` that traces it and runs the trace from then on. Thread-safe.

    The second call of a signature looks for a trace with bit-identical output, or makes one; the third call must agree
    as well. Later calls run that trace, which does not hold Python's lock, so threads compute in parallel.

    The weights must not change. A pass that has LoRAs or wraps, that cannot be traced, whose trace differs, or that
    takes too long to gain from it runs normally.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # diffusers inspects the signature
        self._forward = forward
        self._name = forward.__qualname__
        self._signatures: LRUCache[Hashable, _Signature] = LRUCache(_MAX_SIGNATURES)
        self._signatures_lock = threading.Lock()
        self._traces: list[_Trace] = []
        self._made = 0
        self._comparing = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the forward pass."""
        if is_altered():
            return self._forward(*args, **kwargs)
        call = (args, kwargs)
        known = self._known(signature(call))
        # Read once: another thread may still discard the trace.
        if known.settled and (trace := known.trace) is not None:
            return trace.run(call)
        started = time.perf_counter()
        output = self._forward(*args, **kwargs)
        seconds = time.perf_counter() - started
        if not known.settled and self._comparing.acquire(blocking=False):
            try:
                self._compare(known, call, output, seconds)
            finally:
                self._comparing.release()
        return output

    def _known(self, key: Hashable) -> _Signature:
        with self._signatures_lock:
            return self._signatures.setdefault(key, _Signature())

    def _compare(self, known: _Signature, call: Any, output: Any, seconds: float) -> None:
        """Compare the trace with one more call of its signature, and decide whether to use it."""
        if not _is_conclusive(output):
            return
        known.calls += 1
        if known.calls == 1:  # a single call is not worth a trace, and the first pass includes warm-up
            return
        if known.calls == 2:
            known.trace = self._trace_for(call, output) if seconds < _WORTH_SECONDS else None
            known.settled = known.trace is None
        else:
            if known.trace is not None and not _matches(known.trace, call, output):
                known.trace = None  # values of the traced call became constants
            known.settled = True

    def _trace_for(self, call: Any, output: Any) -> _Trace | None:
        """A trace whose output for a call is bit-identical; `None` if there is none."""
        call_structure = structure(call)
        for trace in self._traces:
            if trace.structure == call_structure and _matches(trace, call, output):
                return trace
        if self._made == _MAX_TRACES:
            return None
        self._made += 1
        try:
            trace = _Trace(self._traced(call), call_structure, rebuild(output, itertools.repeat(torch.empty(0))))
        except Exception as error:  # torch raises many types for what it cannot trace
            _log.info("not traced", module=self._name, exc_info=error)
            return None
        if not _matches(trace, call, output):
            _log.info("a trace gave other numbers and is not used", module=self._name)
            return None
        self._traces.append(trace)
        return trace

    def _traced(self, call: Any) -> Any:
        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = rebuild(call, iter(tensors))
            return tuple(tensors_of(self._forward(*args, **kwargs)))

        return torch.jit.trace(run, tuple(tensors_of(call)), check_trace=False)


def trace(module: torch.nn.Module) -> None:
    """Replace a module's `forward` by one that traces it; its weights get no gradients."""
    module.requires_grad_(False)
    module.forward = TorchScriptRunner(module.forward)


def _is_conclusive(output: Any) -> bool:
    """Whether an output distinguishes traces: any trace may give zeros or numbers that are not finite."""
    return all(bool(torch.isfinite(tensor).all()) and bool(tensor.any()) for tensor in tensors_of(output))


def _matches(trace: _Trace, call: Any, output: Any) -> bool:
    """Whether a trace gives the same bits in the same layout."""
    try:
        traced = trace.run(call)
    except RuntimeError:  # the trace does not accept this size
        return False
    return signature(traced) == signature(output) and all(map(torch.equal, tensors_of(traced), tensors_of(output)))
