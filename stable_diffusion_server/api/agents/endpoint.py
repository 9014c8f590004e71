"""The endpoint `/mcp`: sessions of the official `mcp` package, in bounded number, behind our own checks of bodies."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from stable_diffusion_server.api.agents.tool_schemas import DRAWING_TOOLS, LOOKING_TOOLS, READ_ONLY
from stable_diffusion_server.api.agents.tools import AgentTools
from stable_diffusion_server.api.concurrency import run_if_large
from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.middleware.access_policy import AGENT_BYTES
from stable_diffusion_server.api.request_parsing import limits_of
from stable_diffusion_server.errors import NotFound, NotReady, RateLimited, UnsupportedMedia
from stable_diffusion_server.parsing import parse_object
from stable_diffusion_server.types import Caller

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

_log = structlog.get_logger(__name__)

_MAX_SESSIONS, _MAX_PER_CALLER, _IDLE_SECONDS = 256, 16, 600.0
_SESSION = b"mcp-session-id"
_INSTRUCTIONS = (
    "Tools that draw, edit, repaint and enlarge images. Each answers the URL of the image, how it was made, and a "
    "small picture of it. URLs can be given to the next tool."
)


class SessionBook:
    """Who opened which session, so that one caller cannot open all of them. For one event loop."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def check(self, share: str) -> None:
        """Raise `RateLimited` if a caller has as many sessions as one may have; those idle for 10 minutes are over."""
        now = time.monotonic()
        while self._sessions and next(iter(self._sessions.values()))[1] + _IDLE_SECONDS < now:
            self._sessions.popitem(last=False)
        if sum(owner == share for owner, _ in self._sessions.values()) >= _MAX_PER_CALLER:
            raise RateLimited(f"You have {_MAX_PER_CALLER} sessions: end one by DELETE.", retry_after=60)

    def used(self, session: str, share: str) -> None:
        """Note that a caller uses a session now."""
        self._sessions[session] = (share, time.monotonic())
        self._sessions.move_to_end(session)

    def ended(self, session: str) -> None:
        """Forget a session."""
        self._sessions.pop(session, None)


@dataclass
class AgentEndpoint:
    """ASGI app of `/mcp`. The `mcp` package is imported, and its sessions start, with the first request.

    Access, origins and keys are checked by the middleware, as for every route; a session belongs to the caller that
    opened it. Stop it with `close`: calls that run then leave their jobs alone.
    """

    tools: AgentTools
    version: str
    _book: SessionBook = field(default_factory=SessionBook)
    _manager: StreamableHTTPSessionManager | None = None
    _running: asyncio.Task[None] | None = None
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises `ServerError` for one that is refused before the protocol sees it."""
        request = Request(scope, receive)
        caller = caller_of(request)
        manager = await self._started()
        await self._check_body(request)
        session = request.headers.get(_SESSION.decode(), "")
        if not session and request.method == "POST":
            self._book.check(caller.share)
        body, replayed = await request.body(), False

        async def receive_again() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._note(request, caller, session, message)
            await send(message)

        await manager.handle_request({**scope, "user": _user_of(caller)}, receive_again, send_noting)

    def drain(self) -> None:
        """End all sessions and refuse new ones; the jobs of calls that run go on."""
        self._closing.set()

    async def close(self) -> None:
        """Drain, and wait for the end."""
        self.drain()
        if self._running is not None:
            with suppress(asyncio.CancelledError):
                await self._running

    async def _started(self) -> StreamableHTTPSessionManager:
        """Return the manager of the sessions. Raises `NotReady` at the end, and 501 without the package."""
        if self._closing.is_set():
            raise NotReady("The server is going down.", retry_after=5)
        async with self._starting:
            if self._manager is None:
                try:
                    manager = await asyncio.to_thread(_manager_of, self.tools, self.version, self._closing)
                except ImportError as error:
                    raise HTTPException(501, "MCP needs the packages of agent-requirements.txt.") from error
                ready = asyncio.Event()
                self._running = asyncio.create_task(self._run(manager, ready))
                await ready.wait()
                self._manager = manager
        return self._manager

    async def _run(self, manager: StreamableHTTPSessionManager, ready: asyncio.Event) -> None:
        async with manager.run():  # its tasks must end where they began, so in a task of its own
            ready.set()
            await self._closing.wait()

    async def _check_body(self, request: Request) -> None:
        """Refuse what the package would parse without bounds. Raises the errors of a JSON body."""
        body = await request.body()
        if not body:
            return
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMedia("Send application/json.")
        await run_if_large(len(body), parse_object, body, limits_of(request).for_json(frozenset({"params"})))

    def _note(self, request: Request, caller: Caller, session: str, message: Message) -> None:
        """Note which session an answer belongs to."""
        opened = dict(message["headers"]).get(_SESSION, b"").decode("latin-1")
        if request.method == "DELETE" or message["status"] == NotFound.status:
            self._book.ended(session)
        elif message["status"] < 400 and (opened or session):
            self._book.used(opened or session, caller.share)


def _user_of(caller: Caller) -> object:
    """Return the caller as the package has it: a session is refused to another one."""
    from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
    from mcp.server.auth.provider import AccessToken

    return AuthenticatedUser(AccessToken(token="", client_id=caller.share, scopes=[]))


def _manager_of(tools: AgentTools, version: str, closing: asyncio.Event) -> StreamableHTTPSessionManager:
    """Import the package and build the server with its tools. Slow; raises `ImportError` without the package."""
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    return StreamableHTTPSessionManager(
        app=_server_of(tools, version, closing),
        session_idle_timeout=_IDLE_SECONDS,
        max_request_body_size=AGENT_BYTES,
        max_sessions=_MAX_SESSIONS,
    )


def _server_of(tools: AgentTools, version: str, closing: asyncio.Event) -> Server[Any]:
    import mcp_types as types
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel import Server
    from mcp.shared.exceptions import MCPError

    def described(name: str, description: str, schema: dict[str, Any]) -> types.Tool:
        hints = types.ToolAnnotations(read_only_hint=name in READ_ONLY, destructive_hint=name == "cancel_job")
        return types.Tool(name=name, description=description, input_schema=schema, annotations=hints)

    limits = tools.context.limits
    listed = [described(tool.name, tool.description, tool.input_schema(limits)) for tool in DRAWING_TOOLS.values()]
    listed += [described(name, *known) for name, known in LOOKING_TOOLS.items()]
    names = {tool.name for tool in listed}

    async def list_tools(
        context: ServerRequestContext[Any], params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=listed)

    async def call_tool(
        context: ServerRequestContext[Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        if params.name not in names:
            raise MCPError(code=types.INVALID_PARAMS, message=f"There is no tool {params.name[:100]!r}.")
        request, report = context.request, context.session.report_progress
        if request is None:
            raise MCPError(code=types.INTERNAL_ERROR, message="This server speaks HTTP only.")
        try:
            answer = await tools.call(params.name, params.arguments or {}, request, report, closing.is_set)
        except Exception as error:
            _log.error("unexpected error in a tool", tool=params.name, exc_info=error)
            raise MCPError(
                code=types.INTERNAL_ERROR, message="An unexpected error happened; the log has more."
            ) from None
        content: list[types.ContentBlock] = [types.TextContent(text=answer.text)]
        if answer.picture:
            encoded = base64.b64encode(answer.picture).decode()
            content.append(types.ImageContent(data=encoded, mime_type="image/webp"))
        return types.CallToolResult(content=content, structured_content=dict(answer.body), is_error=answer.failed)

    return Server(
        "stable-diffusion-server",
        version=version,
        instructions=_INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
