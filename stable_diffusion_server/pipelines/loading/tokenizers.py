"""Counts a text's tokens as a model reads them, from any thread."""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Lock
from typing import Any


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """A function that counts a text's tokens, special ones included, on a copy of `tokenizer` of its own.

    The copy and the lock are needed: fast tokenizers keep truncation settings inside and are not shared by threads.
    """
    own, lock = copy.deepcopy(tokenizer), Lock()
    # Counting texts that are too long is the very purpose, so its warning about them says nothing.
    own.model_max_length = int(1e9)

    def count(text: str) -> int:
        with lock:
            return len(own(text, truncation=False).input_ids)

    return count
