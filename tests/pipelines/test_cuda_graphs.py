"""The parts of CUDA graph recording that need no accelerator: call signatures, and the fallback."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers.modeling_outputs import BaseModelOutput

from stable_diffusion_server.pipelines.acceleration.apply import _unless_altered
from stable_diffusion_server.pipelines.acceleration.call_signature import rebuild, signature, tensors_of
from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner, _Recording, record
from stable_diffusion_server.pipelines.adapters.lora_deltas import LayerChange
from stable_diffusion_server.pipelines.adapters.lora_hooks import LayerHook, applied
from stable_diffusion_server.pipelines.adapters.lora_rows import Adapter, RowPlan, WeightedAdapter

pytestmark = pytest.mark.slow

BASE: dict[str, Any] = {
    "sample": torch.zeros(2, 3),
    "added": {"ids": torch.zeros(1, 6)},
    "more": (torch.zeros(4), None),
    "as_dict": False,
}


def test_calls_of_other_numbers_are_alike() -> None:
    """A recording is replayed with other values."""
    other = {**BASE, "sample": torch.ones(2, 3), "added": {"ids": torch.ones(1, 6)}}
    assert signature(((), other)) == signature(((), BASE))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample": torch.zeros(3, 3)},
        {"sample": torch.zeros(2, 3, dtype=torch.float64)},
        {"sample": torch.zeros(3, 2).t()},
        {"sample": torch.zeros(2, 3, device="meta")},
        {"added": {"ids": torch.zeros(1, 5)}},
        {"added": {"other": torch.zeros(1, 6)}},
        {"more": (torch.zeros(4), torch.zeros(4))},
        {"as_dict": 0},
        {"one_more": 1},
    ],
    ids=["shape", "type", "strides", "device", "deeper shape", "name", "one more", "equal of another type", "argument"],
)
def test_calls_of_other_shapes_and_arguments_are_not(changes: dict[str, Any]) -> None:
    """They get their own recordings."""
    assert signature(((), {**BASE, **changes})) != signature(((), BASE))


def test_tensors_are_put_in_the_places_they_came_from() -> None:
    """In arguments, and in output objects of diffusers and transformers."""
    answer = (BaseModelOutput(last_hidden_state=torch.zeros(1), hidden_states=(torch.ones(1), 2 * torch.ones(1))), 7)
    again = rebuild(answer, (tensor + 10 for tensor in tensors_of(answer)))
    assert isinstance(again[0], BaseModelOutput)
    assert again[1] == 7
    assert [float(tensor) for tensor in tensors_of(again)] == [10, 11, 12]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    """With one warning, the same outputs and the same signature."""
    module = torch.nn.Linear(3, 2)
    wanted = module(torch.ones(1, 3))
    signature = inspect.signature(module.forward)
    record(module)
    assert inspect.signature(module.forward) == signature
    with capture_logs() as logs:
        for _ in range(4):
            torch.testing.assert_close(module(torch.ones(1, 3)), wanted)
    assert [entry["event"] for entry in logs] == ["not recorded as a CUDA graph"]


def test_a_pass_with_adapters_is_neither_replayed_nor_compiled() -> None:
    """What was recorded or compiled has no rows of adapters: the module itself runs while a pass has some."""
    layer, given = torch.nn.Linear(4, 4), torch.randn(2, 4)
    change = LayerChange((4, 4), down=torch.randn(1, 4), up=torch.randn(4, 1))
    layer.register_forward_hook(LayerHook(("unet", "layer")))
    plain, compiled = layer(given), _unless_altered(lambda rows: torch.zeros(2, 4), layer)
    runner = CudaGraphRunner(layer.__call__)
    recorded = _Recording(SimpleNamespace(replay=lambda: None), [given.clone()], torch.zeros(2, 4))
    runner._recordings[signature(((given,), {}))] = recorded  # as a device would have it
    adapter = WeightedAdapter(Adapter({("unet", "layer"): change}), {"unet": 1.0})
    for recording in (runner, compiled):
        assert torch.equal(recording(given), torch.zeros(2, 4))
        with applied(RowPlan([(adapter,), ()], [0, 1])):
            changed = recording(given)
        assert torch.allclose(changed[1], plain[1])
        assert not torch.allclose(changed[0], plain[0])
