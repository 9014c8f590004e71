"""Says who made an image, by its Content Credentials, and what the history knows of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from pydantic import TypeAdapter, ValidationError

from stable_diffusion_server.errors import InvalidInput, ServerError, TooLarge, UnsupportedMedia
from stable_diffusion_server.generation.interfaces import FetchImage
from stable_diffusion_server.imaging import DEFAULT_FORMATS, ContentSigner, Sandbox, describe_formats, matches_signature
from stable_diffusion_server.parsing import JsonLimits, parse_object
from stable_diffusion_server.storage import HistoryEntry
from stable_diffusion_server.types import Caller

_LIMITS = JsonLimits(max_text_bytes=1_000_000)


class Verdict(StrEnum):
    """What the credentials of an image show."""

    OURS = "ours"
    ANOTHERS = "anothers"
    TAMPERED = "tampered"
    UNREADABLE = "unreadable"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class CredentialSigner:
    """The names that a certificate gives its owner; only the certificate of this server was compared."""

    issuer: str
    common_name: str
    cert_serial_number: str
    time: str


@dataclass(frozen=True, slots=True)
class CredentialAction:
    """A step that a manifest tells of; empty texts where it does not say."""

    action: str
    source_type: str
    software: str
    version: str
    when: str
    digest: str


@dataclass(frozen=True, slots=True)
class CredentialIngredient:
    """An input of an image; `active_manifest` is the label of its own manifest, or empty."""

    title: str
    relationship: str
    active_manifest: str


@dataclass(frozen=True, slots=True)
class CredentialManifest:
    """What one signed manifest of an image says."""

    label: str
    generator: str
    signer: CredentialSigner
    actions: tuple[CredentialAction, ...]
    ingredients: tuple[CredentialIngredient, ...]


@dataclass(frozen=True, slots=True)
class _ReadCredentials:
    state: str
    failures: tuple[str, ...] = ()
    manifests: tuple[CredentialManifest, ...] = ()


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on an image. `manifests` are those in the file, the active one first.

    `failures` are C2PA's codes. `entry` is the history's, where the signed digest is known and the caller may read it.
    `certificate` is the SHA-256 of this server's own certificate, empty if it signs nothing.
    """

    verdict: Verdict
    failures: tuple[str, ...]
    manifests: tuple[CredentialManifest, ...]
    entry: HistoryEntry | None
    certificate: str

    @property
    def intact(self) -> bool | None:
        """Whether the image is as it was signed; `None` where nothing can be checked."""
        if self.verdict in (Verdict.NONE, Verdict.UNREADABLE):
            return None
        return self.verdict is not Verdict.TAMPERED


_ANSWERS = TypeAdapter(_ReadCredentials)


class VerificationService:
    """Verifies images in the sandbox. `find` looks a digest up in the history, as far as the caller may read it."""

    def __init__(
        self,
        fetch: FetchImage,
        sandbox: Sandbox,
        signer: ContentSigner | None,
        find: Callable[[str, Caller], HistoryEntry | None],
        max_bytes: int,
    ) -> None:
        self._fetch = fetch
        self._sandbox = sandbox
        self._signer = signer
        self._find = find
        self._max_bytes = max_bytes

    async def download(self, url: str, field: str, caller: Caller) -> bytes:
        """Return the file at a public URL. Raises `InvalidInput`, `RemoteFetchFailed`, `TooLarge`."""
        return await self._fetch(url, field, share=caller.share)

    async def verify(self, file: bytes, field: str, caller: Caller) -> Verification:
        """Return the verdict on a file. Raises `TooLarge`, `UnsupportedMedia`, `InvalidInput`, `NotReady`."""
        if len(file) > self._max_bytes:
            raise TooLarge(f"{field} is larger than {self._max_bytes} bytes.", field=field)
        if not matches_signature(file, DEFAULT_FORMATS):
            raise UnsupportedMedia(f"{field} is not a {describe_formats(DEFAULT_FORMATS)} picture.", field=field)
        anchor = self._signer.anchor if self._signer is not None else ""
        certificate = self._signer.fingerprint if self._signer is not None else ""
        answer = await self._sandbox({"anchor": anchor}, (file,), field, share=caller.share)
        try:
            read = _ANSWERS.validate_python(parse_object(answer, _LIMITS))
        except (ServerError, ValidationError) as error:  # another program answers in place of ours
            raise InvalidInput(f"{field} is a broken picture.", field=field) from error
        verdict = self._verdict(read)
        entry = await asyncio.to_thread(self._entry, verdict, read, caller)
        return Verification(verdict, read.failures, read.manifests, entry, certificate)

    def _verdict(self, read: _ReadCredentials) -> Verdict:
        match read.state:
            case "Trusted" | "Valid" if read.manifests:
                serial = read.manifests[0].signer.cert_serial_number
                known = self._signer is not None and serial == self._signer.serial
                return Verdict.OURS if known and read.state == "Trusted" else Verdict.ANOTHERS
            case "Invalid":
                return Verdict.TAMPERED
            case "None":
                return Verdict.NONE
        return Verdict.UNREADABLE

    def _entry(self, verdict: Verdict, read: _ReadCredentials, caller: Caller) -> HistoryEntry | None:
        """Return the history entry of what this server signed; anyone can write a digest into another file."""
        if verdict is not Verdict.OURS:
            return None
        digests = [action.digest for action in read.manifests[0].actions if action.digest]
        return self._find(digests[-1], caller) if digests else None
