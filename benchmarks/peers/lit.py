"""The stock pipeline under LitServe with its batching, as its documentation has it: setup, batch, predict, encode.

Set by MODEL, PORT, THREADS (of each worker), WORKERS, BATCH (most orders in one call) and PICTURES.
"""

from __future__ import annotations

import os
from typing import Any

import litserve
from drawing import draw, keep, load
from PIL import Image


class Painter(litserve.LitAPI):
    """One worker's pipeline."""

    def setup(self, device: str) -> None:
        """Load it, in the worker's process."""
        self.pipeline = load(os.environ["MODEL"], int(os.environ["THREADS"]))

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Orders go to the pipeline as a list."""
        return inputs

    def predict(self, orders: list[dict[str, Any]]) -> list[tuple[Image.Image, dict[str, Any]]]:
        """Draw together what came together."""
        return list(zip(draw(self.pipeline, orders), orders, strict=True))

    def unbatch(self, output: list[tuple[Image.Image, dict[str, Any]]]) -> list[tuple[Image.Image, dict[str, Any]]]:
        """One picture an order."""
        return output

    def encode_response(self, output: tuple[Image.Image, dict[str, Any]]) -> dict[str, str]:
        """Store it, tell where."""
        return keep(*output)


if __name__ == "__main__":
    painter = Painter(max_batch_size=int(os.environ["BATCH"]), batch_timeout=0.01, api_path="/draw")
    server = litserve.LitServer(
        painter, accelerator="cpu", devices=1, workers_per_device=int(os.environ["WORKERS"]), timeout=600
    )
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning", generate_client_file=False)
