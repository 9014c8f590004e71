"""How long the head of a request may be, whatever server reads it: its address, its headers, each and together."""

from __future__ import annotations

from starlette.types import Scope

from stable_diffusion_server.errors import HeadersTooLarge

# uvicorn's h11 takes 64 KiB of all together; its httptools, where that is installed, and other servers take any length.
_MOST_BYTES, _MOST_HEADERS, _LONGEST = 65_536, 128, 16_384


def check_header_limits(scope: Scope) -> None:
    """Raise `HeadersTooLarge` for a head that is too long to be looked into."""
    address = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
    # One more than are taken is enough to know: what is beyond costs nothing.
    sizes = [len(name) + len(value) for name, value in scope["headers"][: _MOST_HEADERS + 1]]
    if len(sizes) > _MOST_HEADERS or address + sum(sizes) > _MOST_BYTES:
        raise HeadersTooLarge(f"The head of a request may have {_MOST_BYTES} bytes and {_MOST_HEADERS} headers.")
    if max(sizes, default=0) > _LONGEST:
        raise HeadersTooLarge(f"A header may have {_LONGEST} bytes.")
