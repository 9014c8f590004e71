"""Logs, metrics, traces, console progress bar, heartbeat files and crash reports."""

from __future__ import annotations

from stable_diffusion_server.observability.console_progress import ConsoleProgress, ProgressHeartbeat, broadcast
from stable_diffusion_server.observability.crash_reports import (
    CrashCause,
    CrashReport,
    DeviceRecord,
    current_run_id,
    report_crash,
)
from stable_diffusion_server.observability.event_loop_heartbeat import HEARTBEAT_FILE, LoopHeartbeat
from stable_diffusion_server.observability.logs import configure_logging
from stable_diffusion_server.observability.metrics import Metrics, RequestSample, Sample, UsageMetrics
from stable_diffusion_server.observability.tracing import Tracing

__all__ = [
    "HEARTBEAT_FILE",
    "ConsoleProgress",
    "CrashCause",
    "CrashReport",
    "DeviceRecord",
    "LoopHeartbeat",
    "Metrics",
    "ProgressHeartbeat",
    "RequestSample",
    "Sample",
    "Tracing",
    "UsageMetrics",
    "broadcast",
    "configure_logging",
    "current_run_id",
    "report_crash",
]
