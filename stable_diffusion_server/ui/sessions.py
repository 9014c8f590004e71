"""Sessions of visitors who entered an API key: a random token in a cookie represents the key."""

from __future__ import annotations

import secrets
import threading

from cachetools import TTLCache

MAX_SESSIONS = 1000
SESSION_SECONDS = 86_400


class SessionStore:
    """API keys by session token, in memory. A full store drops the least recently used session. Thread-safe."""

    def __init__(self) -> None:
        self._keys: TTLCache[str, str] = TTLCache(MAX_SESSIONS, SESSION_SECONDS)
        self._lock = threading.Lock()

    def start(self, key: str) -> str:
        """Start a session for a key, and return its token."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._keys[token] = key
        return token

    def key_of(self, token: str) -> str | None:
        """Return the API key of a session; `None` for an unknown token."""
        with self._lock:
            return self._keys.get(token)

    def end(self, token: str) -> None:
        """End a session."""
        with self._lock:
            self._keys.pop(token, None)
