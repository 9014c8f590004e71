"""Configures structured logs on standard error."""

from __future__ import annotations

import io
import logging
import sys
from contextlib import suppress
from typing import TextIO

import structlog

# Maximum characters of a logged text and of a traceback. JSON takes up to 6 bytes per character, 12 beyond U+FFFF.
MAX_VALUE = 512
MAX_TRACEBACK = 16_384


def configure_logging(level: str, log_format: str) -> None:
    """Configure the format on standard error: `log_format` "console", JSON, or "auto" (console on a terminal)."""
    human_readable = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        shorten_values,
    ]
    # Tracebacks omit local variables, which hold prompts and may hold keys.
    if human_readable:
        processors += [
            escape_values,
            structlog.dev.ConsoleRenderer(exception_formatter=_escaped_traceback),
        ]
    else:
        processors += [structlog.processors.format_exc_info, shorten_values, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    if not human_readable:
        _redirect_library_logs()
    # uvicorn's access log holds query strings, and so prompts; the access middleware logs requests instead.
    logging.getLogger("uvicorn.access").disabled = True


def _redirect_library_logs() -> None:
    """Route the logs of libraries, including uvicorn and asyncio, to our log."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, LibraryLogHandler)]:
        root.removeHandler(handler)
    root.addHandler(LibraryLogHandler(logging.WARNING))
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.handlers.clear()
    uvicorn.propagate = True


class LibraryLogHandler(logging.Handler):
    """Writes log records of libraries to our log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line for any record; never raises if the line cannot be written."""
        try:
            text = record.getMessage()
        except Exception:  # arguments that do not fit the message
            text = str(record.msg)
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] is not None else None
        with suppress(OSError, ValueError):  # a stream that is closed
            structlog.get_logger().log(record.levelno, text, logger=record.name, exc_info=exc_info)


def shorten_values(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Shorten the texts of a line, so that callers cannot make lines of any length.

    A text keeps its first `MAX_VALUE` characters and gets its original length; a traceback keeps its last
    `MAX_TRACEBACK`. A prompt stays whole: MAX_PROMPT_CHARACTERS bounds it. Other values are shortened as `repr`.
    """
    for name, value in event.items():
        if isinstance(value, bool | int | float | None) or name in ("exc_info", "prompt"):
            continue
        text = value if isinstance(value, str) else repr(value)
        if name == "exception" and len(text) > MAX_TRACEBACK:
            event[name] = f"({len(text)} characters) … {text[-MAX_TRACEBACK:]}"
        elif name != "exception" and len(text) > MAX_VALUE:
            event[name] = f"{text[:MAX_VALUE]}… ({len(text)} characters)"
    return event


def escape_values(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape the characters of each text that a terminal would obey or show as none, as paths of callers may have.

    JSON has escapes of its own.
    """
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _escaped(value)
    return event


def _escaped_traceback(target: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Write a traceback, whose messages may quote callers."""
    written = io.StringIO()
    structlog.dev.plain_traceback(written, exc_info)
    target.write("\n".join(map(_escaped, written.getvalue().split("\n"))))


def _escaped(text: str) -> str:
    """Return a text with backslash escapes for what is not printable: controls, directions of writing, line ends."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
