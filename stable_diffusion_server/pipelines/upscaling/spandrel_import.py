"""Imports spandrel, which knows the networks of upscaler files, without torchvision.

Two of its 42 architectures, which no upscaler uses (LaMa, RestoreFormer), import three names of torchvision; that has
no build beside every torch, and one that does not fit breaks transformers, which imports it wherever it is found.
"""

from __future__ import annotations

import builtins
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from stable_diffusion_server.errors import ModelLoadError

_NEEDED = "torchvision.transforms.functional"
_lock = threading.Lock()


def import_spandrel() -> Any:
    """The module `spandrel`. Raises `ModelLoadError` if it is not installed."""
    with _lock, _stand_in_for_torchvision():
        try:
            import spandrel
        except ImportError as error:
            raise ModelLoadError(
                "This upscaler needs spandrel: pip install --no-deps spandrel einops. The embedded upscaler and "
                "files of Real-ESRGAN's compact network do without."
            ) from error
    return spandrel


@contextmanager
def _stand_in_for_torchvision() -> Iterator[None]:
    """Give the modules of spandrel, and no others, a stand-in when they import torchvision.

    In `sys.modules` other threads would find it, and other libraries would take it for the real one.
    """
    hooks = vars(builtins)
    usual = hooks["__import__"]
    stand_in = types.ModuleType(_NEEDED)
    vars(stand_in).update(InterpolationMode=types.SimpleNamespace(), rotate=_refuse, normalize=_refuse)

    def importing(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        by = str((globals or {}).get("__name__", ""))
        if name == _NEEDED and by.startswith("spandrel."):
            return stand_in
        module: types.ModuleType = usual(name, globals, locals, fromlist or (), level)
        return module

    hooks["__import__"] = importing
    try:
        yield
    finally:
        hooks["__import__"] = usual


def _refuse(*args: object, **kwargs: object) -> NoReturn:
    raise ModelLoadError("LaMa and RestoreFormer need torchvision, and are no upscalers.")
