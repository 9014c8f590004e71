"""Titles of models in AUTOMATIC1111's clients, and the model that a checkpoint name means."""

from __future__ import annotations

from collections.abc import Iterator

from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import Forbidden, InvalidInput
from stable_diffusion_server.generation import NAME_MAX
from stable_diffusion_server.pipelines import ModelSpec

_ENDINGS = (".safetensors", ".ckpt", ".sft", ".gguf", ".pth", ".pt", ".bin")
# AUTOMATIC1111 shows this many characters of a file's SHA-256, and older versions 8.
_SHORT_HASHES = (10, 8)


def title_of(spec: ModelSpec) -> str:
    """Return the title of a model in AUTOMATIC1111's clients; as there, without a revision before the first load."""
    return spec.name if spec.unread else f"{spec.name} [{spec.revision}]"


def model_named(name: str, context: DialectContext, field: str = "override_settings") -> str:
    r"""Return the name of the model that a checkpoint name means, for example `sdxl` for `XL\sdxl.safetensors [31e3]`.

    A model is known by its title, name, folder, repository, revision, SHA-256 and aliases, without regard to case.
    Folders and file endings before a hash in brackets are ignored. The hash decides only where the name is unknown.
    Raises `InvalidInput` for `field`, or `Forbidden` if the caller may use some models only.
    """
    wanted = name.strip()
    if len(wanted) > NAME_MAX:
        raise InvalidInput(f"sd_model_checkpoint must be a text of up to {NAME_MAX} characters.", field=field)
    known = {alias: spec.name for spec in context.models.values() for alias in _names_of(spec)}
    aliases = {alias.lower(): alias for alias in context.aliases}
    for spelling in _spellings(wanted):
        if spelling.lower() in known:
            return known[spelling.lower()]
        if spelling.lower() in aliases:
            return context.model(aliases[spelling.lower()]).name
    try:
        return context.model(wanted).name
    except (InvalidInput, Forbidden) as error:
        raise type(error)(f"sd_model_checkpoint: {error.detail}", field=field) from error


def _names_of(spec: ModelSpec) -> set[str]:
    """Return the names of a model, in lower case."""
    names = {title_of(spec), spec.name, spec.folder, spec.repo or "", spec.revision, spec.weights}
    names |= {name.rpartition("/")[2] for name in (spec.folder, spec.repo or "")}
    names |= {spec.weights[:length] for length in _SHORT_HASHES}
    return {name.lower() for name in names if name}


def _spellings(name: str) -> Iterator[str]:
    """Return what a name may mean, most literal first: without hash, without folders, without ending, the hash."""
    yield name
    head, bracket, tag = name.removesuffix("]").rpartition("[") if name.endswith("]") else (name, "", "")
    head = head.strip()
    file = head.replace("\\", "/").rpartition("/")[2]
    ending = next((ending for ending in _ENDINGS if file.lower().endswith(ending)), "")
    yield from (text for text in (head, file, file[: len(file) - len(ending)]) if text)
    if bracket and tag.strip():
        yield tag.strip()
