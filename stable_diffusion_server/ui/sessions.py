"""Who has shown a key: a cookie's random token stands for it as long as this process lives. Knows no pages."""

from __future__ import annotations

import secrets
from collections import OrderedDict

_MOST = 1000


class SessionStore:
    """The keys of visitors by their tokens; the longest absent go first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, str] = OrderedDict()

    def start(self, key: str) -> str:
        """A token for a key."""
        token = secrets.token_urlsafe(32)
        self._keys[token] = key
        while len(self._keys) > _MOST:
            self._keys.popitem(last=False)
        return token

    def key_of(self, token: str) -> str | None:
        """The key a token stands for."""
        if token not in self._keys:
            return None
        self._keys.move_to_end(token)
        return self._keys[token]

    def end(self, token: str) -> None:
        """Forget a token."""
        self._keys.pop(token, None)
