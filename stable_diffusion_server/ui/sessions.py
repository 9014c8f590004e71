"""Sessions of visitors who entered an API key: a random token in a cookie stands for the key."""

from __future__ import annotations

import secrets
import threading

from cachetools import TTLCache

MAX_SESSIONS = 1000
SESSION_SECONDS = 86_400


class SessionStore:
    """API keys by session token, in memory. When it is full, the session unused for longest is dropped. Thread-safe."""

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
        """Return the key of a session; None if there is no such session."""
        with self._lock:
            return self._keys.get(token)

    def end(self, token: str) -> None:
        """End a session."""
        with self._lock:
            self._keys.pop(token, None)
