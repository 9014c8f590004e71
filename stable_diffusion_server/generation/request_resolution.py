"""Takes a request in: which model draws it, the words of its prompts, its defaults, and what it is known by."""

from __future__ import annotations

import asyncio
from functools import lru_cache

from stable_diffusion_server.generation.expansion import PromptExpander
from stable_diffusion_server.generation.permissions import permitted_request, spec_for
from stable_diffusion_server.generation.resolver import GenerationOptions, ResolvedRequest, resolve_request
from stable_diffusion_server.generation.results import is_long
from stable_diffusion_server.types import Caller, GenerationRequest

_CACHE_SIZE = 1024


class RequestResolver:
    """Expands and resolves requests, on threads where that takes time, and caches the short ones. Thread-safe."""

    def __init__(self, options: GenerationOptions, expander: PromptExpander) -> None:
        self._options = options
        self._expander = expander
        # The cache key includes the model's spec, because the spec changes when the weights are loaded.
        self._resolve_cached = lru_cache(_CACHE_SIZE)(lambda request, spec: resolve_request(request, options))

    async def admit(self, request: GenerationRequest, caller: Caller, *, expands: bool = True) -> GenerationRequest:
        """Return the request with a model that the caller may use, and with its prompts expanded.

        `expands` is false for a stored request, whose prompts were expanded before. Raises `InvalidInput`, `Forbidden`.
        """
        request = permitted_request(request, caller, self._options)
        if expands and self._may_expand(request):
            return await asyncio.to_thread(self._expander.expand, request)
        return request

    async def resolve(self, request: GenerationRequest) -> ResolvedRequest:
        """Resolve an admitted request. Raises `InvalidInput`."""
        # Input files are hashed, LoRAs, embeddings and long prompts read in a thread; for less, a switch costs more.
        if self._reads_files(request) or is_long(request):
            return await asyncio.to_thread(resolve_request, request, self._options)
        return resolve_request(request, self._options) if request.seed == "random" else self._resolve_words(request)

    def resolve_at_once(self, request: GenerationRequest, caller: Caller) -> ResolvedRequest | None:
        """Admit and resolve a request without I/O; `None` if that cannot be. Raises `InvalidInput`, `Forbidden`."""
        if self._reads_files(request) or request.seed == "random" or is_long(request):
            return None
        if self._may_expand(request):
            return None
        return self._resolve_words(permitted_request(request, caller, self._options))

    def _reads_files(self, request: GenerationRequest) -> bool:
        parts = request.sources, request.loras, request.controls, request.repairs, request.hires_upscaler
        return any(parts) or self._options.embeddings.is_offered

    def _may_expand(self, request: GenerationRequest) -> bool:
        """Whether the request asks for styles or wildcards, and has any. Reads no file."""
        wildcards = self._expander.by_default if request.wildcards is None else request.wildcards
        return bool(request.styles or wildcards) and self._expander.changes(request)

    def _resolve_words(self, request: GenerationRequest) -> ResolvedRequest:
        """Resolve a request that reads no files, from the cache if possible."""
        return self._resolve_cached(request, spec_for(request, self._options))
