"""Adds the LoRAs of a pass to the outputs of layers, by a forward hook on each layer that some LoRA changes.

So the weights that all requests and threads share never change. Which row has which LoRAs is known to the thread that
runs the pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stable_diffusion_server.pipelines.adapters.lora_rows import Layer, RowAdapters, RowPlan, with_adapters

_pass = threading.local()


class LayerHook:
    """Adds to the output of one layer what the pass of this thread has for it, and what `always` applies."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.always: RowAdapters = ()

    def __call__(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """The output of the layer for this pass."""
        made = with_adapters(self.always, self.layer, module, given[0], output) if self.always else output
        plan = None if torch.compiler.is_compiling() else current_plan()
        return made if plan is None else plan(self.layer, module, given[0], made)


@contextmanager
def applied(plan: RowPlan | None) -> Iterator[None]:
    """Run the passes of this thread with these adapters."""
    before = current_plan()
    _pass.plan = plan
    try:
        yield
    finally:
        _pass.plan = before


def current_plan() -> RowPlan | None:
    """The plan of the pass that this thread runs; `None` without adapters.

    What was recorded or compiled knows nothing of it: a recorder runs the module itself while there is one.
    """
    return getattr(_pass, "plan", None)


def is_changed(layer: torch.nn.Module) -> bool:
    """Whether adapters change this layer in the present pass, so that nothing else may compute its product."""
    present = not torch.compiler.is_compiling() and current_plan() is not None
    hooks = [hook for hook in layer._forward_hooks.values() if isinstance(hook, LayerHook)]
    return any(present or hook.always for hook in hooks)
