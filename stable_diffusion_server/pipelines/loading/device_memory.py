"""How much memory a device has left, and how much of it is ours. Knows no models."""

from __future__ import annotations

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes a model may take on `device`: what is free of the accelerator's memory, or of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def memory_of(device: torch.device) -> dict[str, int]:
    """Bytes by kind: `used` by tensors (on the CPU: by the process), `reserved` for them, `free` for anyone.

    Nothing of a device that cannot tell any more.
    """
    try:
        if device.type == "cuda":
            used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        else:
            used = reserved = psutil.Process().memory_info().rss
        return {"used": used, "reserved": reserved, "free": free_memory(device)}
    except RuntimeError:
        return {}
