"""Counts results that are not finite, which a lost device gives for every request."""

from __future__ import annotations

from stable_diffusion_server.errors import DeviceLost

# After this many non-finite results in a row, the device counts as lost.
MAX_NOT_FINITE = 6


class DeviceHealth:
    """Non-finite results in a row. Those of requests with LoRAs count apart, since the LoRA may be the cause.

    `in_doubt` is whether there were any since the last finite result. Its caller holds a lock.
    """

    def __init__(self) -> None:
        self._plain = 0
        self._with_loras = 0
        self.in_doubt = False

    def record_success(self) -> None:
        """Record a finite result."""
        self._plain = self._with_loras = 0
        self.in_doubt = False

    def record_not_finite(self, error: Exception, *, loras: bool) -> None:
        """Record a result that is not finite. Raises `DeviceLost` after `MAX_NOT_FINITE` without LoRAs."""
        self.in_doubt = True
        if loras:
            self._with_loras += 1
            return
        self._plain += 1
        if self._plain >= MAX_NOT_FINITE:
            raise DeviceLost("The device gives numbers that are not finite, whatever is drawn.") from error

    def suspects_loras(self) -> bool:
        """Whether `MAX_NOT_FINITE` results with LoRAs in a row were not finite; true once, then the count restarts.

        The caller runs a request without LoRAs to find out whether the device is the cause.
        """
        if self._with_loras < MAX_NOT_FINITE:
            return False
        self._with_loras = 0
        return True
