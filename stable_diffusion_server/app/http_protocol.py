"""uvicorn's HTTP protocol with limits for the number of chunks and for the time until a request's head is complete."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from stable_diffusion_server.api import response_without_request
from stable_diffusion_server.errors import HeadersTooLarge, MalformedRequest, ServerError

# A chunk of one byte costs the event loop as much as one of a thousand bytes. After the free chunks, chunks must have
# this average size.
FREE_CHUNKS, LEAST_CHUNK_BYTES = 1024, 256
_HEAD_BYTES = 65_536
# Seconds and bytes of a refused request that are read and dropped. Without this the system resets the connection, and
# a client that still sends does not see the response.
_DISCARD_SECONDS, _DISCARD_BYTES = 2.0, 4 * 2**20


class BoundedConnection(h11.Connection):
    """h11 server connection that refuses requests in too many small chunks."""

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self._chunks = 0
        self._bytes = 0
        self.status_hint = HTTPStatus.BAD_REQUEST

    def next_event(self) -> Any:
        """Return the next event. Raises `h11.RemoteProtocolError` for invalid HTTP and for too many small chunks."""
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.status_hint = HTTPStatus(error.error_status_hint)
            raise
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_end
            self._bytes += len(event.data)
            if self._chunks > FREE_CHUNKS + self._bytes // LEAST_CHUNK_BYTES:
                raise h11.RemoteProtocolError("too many small chunks", error_status_hint=400)
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 for clients that may be hostile; also for `uvicorn main:app --http MODULE:BoundedProtocol`.

    Closes a connection if the head of a request is not complete within `head_seconds` of its first byte, or of the
    start of the connection. Answers invalid HTTP with a problem document; after the start of a response it closes the
    connection without a second response.
    """

    head_seconds = 30.0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.conn: BoundedConnection = BoundedConnection(self.config.h11_max_incomplete_event_size or _HEAD_BYTES)
        self._head_timer: asyncio.TimerHandle | None = None
        # Bytes that may still be discarded; `None` until a request was refused.
        self._to_discard: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's signature
        """Start the timer for the first head."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        super().connection_lost(exc)
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        """Process received bytes and update the timer."""
        if self._to_discard is not None:
            self._discard(len(data))
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self.conn.trailing_data[0]:
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with 400 or 431, or close the connection if a response has already begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        refusal: ServerError = MalformedRequest("The request is not valid HTTP.")
        if self.conn.status_hint is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            refusal = HeadersTooLarge(f"The head of a request may have {_HEAD_BYTES} bytes.")
        response = response_without_request(refusal)
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=refusal.status, headers=headers, reason=HTTPStatus(refusal.status).phrase),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._to_discard = _DISCARD_BYTES
        self.flow.resume_reading()
        self.loop.call_later(_DISCARD_SECONDS, self.transport.close)

    def _discard(self, received: int) -> None:
        """Count bytes after a refusal; close the connection when there are too many."""
        assert self._to_discard is not None  # noqa: S101  # narrows the type
        self._to_discard -= received
        if self._to_discard < 0:
            self.transport.close()

    def _start_timer(self) -> None:
        """Start the timer unless it is running: a head that arrives in pieces gets no extra time."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._close_if_no_head)

    def _close_if_no_head(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
