"""What `models fetch` is asked for: a repository of the hub with files of it, or an address."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePath, PurePosixPath
from urllib.parse import unquote, urlsplit

from stable_diffusion_server.pipelines import hub_page

_REPOSITORY = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,200}))?")
_PAGE = re.compile(r"/([\w.-]{1,96}/[\w.-]{1,96})(?:/(?:resolve|blob|tree)/([^/]{1,200})(?:/(.{1,400}))?)?/?")
_HUB_HOSTS = ("huggingface.co", "hf.co")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


class FetchRefused(Exception):
    """The command asks for something that is not done. The message is a sentence."""


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """The arguments of `models fetch`.

    Attributes:
        source: `owner/name`, `owner/name@revision`, a page of the hub, or the http(s) address of a file.
        files: Files of the repository; none for all that a diffusers folder needs, or its only model file.
        name: Name of the file or folder, instead of its own.
        folder: Folder below MODELS_DIR, instead of the one for its kind.
        sha256: The expected digest of a single file, or empty.
        variant: Preferred weights of a diffusers folder, such as `fp16`; empty for the plain ones.
        replace: Whether another file of that name is replaced.
    """

    source: str
    files: tuple[str, ...] = ()
    name: str = ""
    folder: str = ""
    sha256: str = ""
    variant: str = "fp16"
    replace: bool = False

    def checked(self) -> FetchOrder:
        """The order with a page of the hub as repository, revision and file. Raises `FetchRefused`."""
        order = _with_page(self)
        for option, value in (("--name", order.name), ("--folder", order.folder)):
            parts = PurePath(value).parts
            if not value.isprintable() or "\\" in value or any(part in ("/", "..") or part[0] == "." for part in parts):
                raise FetchRefused(f"{option} must be a name within MODELS_DIR that does not begin with a dot.")
        if "/" in order.name:
            raise FetchRefused("--name must not hold a slash; --folder names a folder below MODELS_DIR.")
        if order.sha256 and not _DIGEST.fullmatch(order.sha256):
            raise FetchRefused("--sha256 must be 64 hexadecimal digits.")
        if (order.name or order.sha256) and len(order.files) > 1:
            raise FetchRefused("--name and --sha256 belong to one file; fetch the files one by one.")
        if order.is_url and order.files:
            raise FetchRefused("An address is one file already; files are named after a repository.")
        if not order.is_url and not _REPOSITORY.fullmatch(order.source):
            raise FetchRefused(
                f"{order.source[:100]!a} is neither a repository, such as stabilityai/sdxl-turbo, nor an http or "
                "https address."
            )
        return replace(order, sha256=order.sha256.lower())

    @property
    def is_url(self) -> bool:
        """Whether the source is an address and not a repository."""
        return self.source.lower().startswith(("http://", "https://"))

    @property
    def repository(self) -> tuple[str, str]:
        """The repository and the revision, which may be empty."""
        repo, _, revision = self.source.partition("@")
        return repo, revision


def names_of(order: FetchOrder) -> list[str]:
    """The names in MODELS_DIR that an order of a repository's files, or of its folder, will have."""
    if order.files:
        return [named(order.name, PurePosixPath(name).name) for name in order.files]
    return [order.name or order.repository[0].rpartition("/")[2]]


def named(wanted: str, own: str) -> str:
    """The wanted name, with the ending of its own name if it has none that is known."""
    if not wanted:
        return own
    suffix = PurePath(own).suffix
    return wanted if PurePath(wanted).suffix.lower() in (suffix.lower(), ".safetensors", ".gguf") else wanted + suffix


def _with_page(order: FetchOrder) -> FetchOrder:
    if not order.is_url:
        return order
    parts = urlsplit(order.source)
    if parts.netloc.lower() not in (*_HUB_HOSTS, urlsplit(hub_page()).netloc):
        return order
    page = _PAGE.fullmatch(unquote(parts.path))
    if page is None or page[1].startswith(("datasets/", "spaces/", "api/")):
        return order
    source = f"{page[1]}@{page[2]}" if page[2] else page[1]
    return replace(order, source=source, files=(*order.files, page[3]) if page[3] else order.files)
