"""What the stock pipelines draw for our requests, and a guard against sockets."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest
import torch
from drawing import job_for, largest_difference

from stable_diffusion_server.types import DiffusionRequest


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Any socket that is opened fails the test."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def sdxl_job(**changes: Any) -> DiffusionRequest:
    """A request for SDXL."""
    return job_for("sdxl", **{"guidance_scale": 5.0, "scheduler": "euler", **changes})


def stock_pixels(pipeline: Any, job: DiffusionRequest, **arguments: Any) -> Any:
    """What the stock call draws."""
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": job.prompt, "num_inference_steps": job.num_inference_steps, "height": 128, "width": 128}
    given |= {"guidance_scale": job.guidance_scale, "generator": torch.Generator().manual_seed(job.seed), **arguments}
    return np.asarray(pipeline(**given).images[0])


def assert_equal(ours: Any, stock: Any) -> None:
    """The images differ by at most 2 of 255, and are pictures."""
    assert stock.std() > 5, "a flat picture would prove nothing"
    assert largest_difference(ours, stock) <= 2
