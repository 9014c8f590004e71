"""Replays a module's forward pass as a CUDA graph: one launch instead of a thousand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from cachetools import LRUCache

from stable_diffusion_server.pipelines.acceleration.call_signature import rebuild, signature, tensors_of
from stable_diffusion_server.pipelines.wrapping import is_altered

_log = structlog.get_logger(__name__)

# Call signatures that stay recorded; the least recently used is evicted first.
MAX_RECORDINGS = 16


@dataclass(frozen=True, slots=True)
class _Recording:
    """A graph, the tensors it reads and the output it writes, at fixed addresses."""

    graph: Any
    inputs: list[torch.Tensor]
    output: Any


class CudaGraphRunner:
    """A replacement for a module's `forward` that records it once per call signature and replays it afterwards.

    The first call of a signature runs normally, so that compilers and tuners are done before the second, which is
    recorded. Outputs are copies. A pass that has LoRAs or wraps runs normally: a recording has no rows.

    Weights must not move, and all calls must be on one thread. When recording fails, for lack of memory too, the
    module runs normally from then on and a warning is logged.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # diffusers inspects the signature
        self._forward = forward
        self._name = forward.__qualname__
        self._recordings: LRUCache[Hashable, _Recording | None] = LRUCache(MAX_RECORDINGS)
        self._recordable = True
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the forward pass."""
        if is_altered():
            return self._forward(*args, **kwargs)
        call = (args, kwargs)
        key = signature(call)
        if not self._recordable or key not in self._recordings:
            self._recordings[key] = None
            return self._forward(*args, **kwargs)
        recording = self._recordings[key]
        if recording is None:
            recording = self._record(call)
            if recording is None:
                return self._forward(*args, **kwargs)
            self._recordings[key] = recording
        for recorded, given in zip(recording.inputs, tensors_of(call), strict=True):
            recorded.copy_(given)
        recording.graph.replay()
        return rebuild(recording.output, (tensor.clone() for tensor in tensors_of(recording.output)))

    def clear(self) -> None:
        """Free the memory of all recordings."""
        self._recordings.clear()
        self._pool = None

    def disable(self) -> None:
        """Free all recordings and record no more."""
        self._recordable = False
        self.clear()

    def _record(self, call: tuple[Any, Any]) -> _Recording | None:
        try:
            return self._capture(call)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self.disable()
            _log.warning("not recorded as a CUDA graph", module=self._name, exc_info=error)
            return None

    def _capture(self, call: tuple[Any, Any]) -> _Recording:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        inputs = [tensor.clone() for tensor in tensors_of(call)]
        args, kwargs = rebuild(call, iter(inputs))
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(*args, **kwargs)  # libraries must allocate their memory for this stream before the recording
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = self._forward(*args, **kwargs)
        return _Recording(graph, inputs, output)


def record(module: torch.nn.Module) -> CudaGraphRunner:
    """Replace a module's `forward` by one that records CUDA graphs."""
    runner = CudaGraphRunner(module.forward)
    module.forward = runner
    return runner
