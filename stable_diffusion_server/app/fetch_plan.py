"""What `models fetch` will download: the files of a repository of the hub, or the one of an address."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath, PurePosixPath
from urllib.parse import urlsplit

from stable_diffusion_server.app.fetch_order import FetchOrder, FetchRefused, named
from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.net import RemoteFile
from stable_diffusion_server.pipelines import HubListing, hub_headers, hub_refusal, list_repository, refusal_of_name

INDEX, CONFIG = "model_index.json", "config.json"
# Configurations and tokenizers that may be fetched one by one.
_TEXTS = (".json", ".txt", ".model", ".jinja")
_LISTED = 12
# SHA-256, or git's SHA-1.
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What is fetched under one name.

    Attributes:
        name: Of the file or folder in MODELS_DIR, before its own ending is known empty.
        files: Path within the folder → file; of a single file the path is empty.
        origin: What the spec beside the model will say of it.
    """

    name: str
    files: Mapping[str, RemoteFile]
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether a folder is fetched."""
        return "" not in self.files


def listing_of(repo: str, revision: str) -> HubListing:
    """The files of a repository at a revision. Raises `ModelLoadError` with a sentence."""
    try:
        return list_repository(repo, revision)
    except Exception as error:  # the client raises a dozen unrelated classes for connection failures
        raise hub_refusal(repo, revision, error, f"{repo}@REVISION names one that there is") from error


def remote_file(listing: HubListing, name: str, sha256: str = "") -> RemoteFile:
    """A file of a repository, with the digest that the hub lists for it."""
    digest = listing.blobs[name].lower()
    known = digest if _DIGEST.fullmatch(digest) else ""
    return RemoteFile(listing.url(name), name, hub_headers(), listing.sizes[name] or None, sha256 or known)


def plans_of_files(listing: HubListing, order: FetchOrder) -> list[FetchPlan]:
    """A plan for each file of the order, or for the only model file. Raises `FetchRefused`, `ModelLoadError`."""
    names = order.files or (_only_file(listing),)
    for name in names:
        if name not in listing.sizes:
            near = difflib.get_close_matches(name, listing.sizes, 3, 0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"it holds {_some(sorted(listing.sizes))}."
            raise ModelLoadError(f"{listing.repo} has no file {name}; {hint}")
        if not name.endswith(_TEXTS) and (reason := refusal_of_name(name)):
            raise FetchRefused(f"{name} {reason}.")
    return [
        FetchPlan(
            named(order.name, PurePosixPath(name).name),
            {"": remote_file(listing, name, order.sha256)},
            {"source": f"{listing.repo}/{name}"[:300], "revision": listing.commit},
        )
        for name in names
    ]


def plan_of_url(order: FetchOrder, offered: str, file: RemoteFile) -> FetchPlan:
    """The plan for an address whose server offers the file under this name. Raises `FetchRefused`."""
    name = named(order.name, offered)
    if reason := refusal_of_name(name):
        if PurePath(name).suffix.lower() in (*_TEXTS, "") or not offered:
            raise FetchRefused(f"The address names no model file ({name or 'nothing'}); give it a name by --name.")
        raise FetchRefused(f"{name} {reason}.")
    parts = urlsplit(order.source)
    # Without the query, which may hold a token.
    return FetchPlan(name, {"": file}, {"source": f"{parts.scheme}://{parts.netloc}{parts.path}"[:300]})


def has_weights_beside_config(listing: HubListing) -> bool:
    """Whether a repository is a single network in diffusers' or transformers' layout."""
    stems = ("diffusion_pytorch_model", "model")
    return CONFIG in listing.sizes and any(
        name.startswith(stems) and name.endswith(".safetensors") for name in listing.sizes if "/" not in name
    )


def _only_file(listing: HubListing) -> str:
    usable = sorted(name for name in listing.sizes if not refusal_of_name(name))
    if len(usable) == 1:
        return usable[0]
    if usable:
        raise FetchRefused(f"{listing.repo} holds several model files; name one or more of {_some(usable)}.")
    pickled = sorted(name for name in listing.sizes if "pickled" in refusal_of_name(name))
    if pickled:
        raise FetchRefused(f"{pickled[0]} {refusal_of_name(pickled[0])}; {listing.repo} holds no others.")
    raise FetchRefused(f"{listing.repo} holds no model file; it holds {_some(sorted(listing.sizes))}.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "nothing"
