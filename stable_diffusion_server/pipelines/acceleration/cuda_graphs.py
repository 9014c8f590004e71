"""Replays a module's forward pass as a CUDA graph: one launch instead of a thousand. Knows tensors, and no jobs."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from stable_diffusion_server.pipelines.acceleration.call_signature import rebuild, signature, tensors_of

_log = structlog.get_logger(__name__)

# Kinds of calls that stay recorded; the one used longest ago goes first.
KEPT = 16


@dataclass(frozen=True, slots=True)
class _Recording:
    """A graph, the tensors it reads and the answer it writes, in memory that stays where it is."""

    graph: Any
    inputs: list[torch.Tensor]
    answer: Any


class CudaGraphRunner:
    """A forward pass that is recorded for each kind of call, and replayed: put it in place of a module's `forward`.

    A kind is the arguments with shapes, types and strides in place of tensors. The first call of a kind runs as it is,
    so that compilers and tuners are done by the second, which is recorded. Answers are the caller's own copies.

    The weights must stay where they are, and the calls on one thread. What cannot be recorded, for a lack of memory
    too, runs as it is from then on, and a warning says so.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # its signature is looked at
        self._forward = forward
        self._name = forward.__qualname__
        self._kinds: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self._recordable = True
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The answer of the forward pass."""
        call = (args, kwargs)
        kind = signature(call)
        if not self._recordable or kind not in self._kinds:
            self._remember(kind, None)
            return self._forward(*args, **kwargs)
        recording = self._kinds[kind]
        if recording is None:
            recording = self._record(call)
            if recording is None:
                return self._forward(*args, **kwargs)
        self._remember(kind, recording)
        for place, given in zip(recording.inputs, tensors_of(call), strict=True):
            place.copy_(given)
        recording.graph.replay()
        return rebuild(recording.answer, (tensor.clone() for tensor in tensors_of(recording.answer)))

    def forget(self) -> None:
        """Give back the memory of all recordings."""
        self._kinds.clear()
        self._pool = None

    def give_up(self) -> None:
        """Run as it is from now on."""
        self._recordable = False
        self.forget()

    def _remember(self, kind: Hashable, recording: _Recording | None) -> None:
        self._kinds[kind] = recording
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KEPT:
            self._kinds.popitem(last=False)

    def _record(self, call: tuple[Any, Any]) -> _Recording | None:
        try:
            return self._recorded(call)
        except RuntimeError as error:  # a lack of memory is one
            self.give_up()
            _log.warning("not recorded as a CUDA graph", module=self._name, exc_info=error)
            return None

    def _recorded(self, call: tuple[Any, Any]) -> _Recording:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        inputs = [tensor.clone() for tensor in tensors_of(call)]
        args, kwargs = rebuild(call, iter(inputs))
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(*args, **kwargs)  # libraries get their memory for this stream outside of the recording
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            answer = self._forward(*args, **kwargs)
        return _Recording(graph, inputs, answer)


def record(module: torch.nn.Module) -> CudaGraphRunner:
    """Have a module's forward pass recorded from now on."""
    graphs = CudaGraphRunner(module.forward)
    module.forward = graphs
    return graphs
