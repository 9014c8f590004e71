"""Downloads large files by URL: resumes, checks size and digest, and follows redirects to public addresses only."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import shutil
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

import httpx

from stable_diffusion_server.errors import InvalidInput, RemoteFetchFailed
from stable_diffusion_server.files import MIN_FREE_BYTES
from stable_diffusion_server.net.answer_headers import (
    advice_for,
    last_name,
    offered_name,
    safe_name,
    start_and_size,
    validator_of,
)
from stable_diffusion_server.net.partial_file import PartialFile, discard
from stable_diffusion_server.net.resume_note import ResumeNote
from stable_diffusion_server.net.safe_client import Resolve, SafeClient, describe_http_error
from stable_diffusion_server.net.url_policy import REDIRECTS, AllowedTarget, UrlTarget, parse_url, redirect_target

# No model is larger; a sparse file of this size can be made on every file system.
MAX_BYTES = 2 * 2**40
# Signed addresses of object storage are longer than what callers may name.
_MAX_URL = 16_384
_MAX_REDIRECTS = 8
_TIMEOUT = httpx.Timeout(60.0, connect=15.0)
_HEADERS = {"User-Agent": "stable-diffusion-server", "Accept": "*/*", "Accept-Encoding": "identity"}
_LATER = (408, 425, 429, 500, 502, 503, 504)
_PARTS = (206, 416)


class DownloadFailed(Exception):
    """A download cannot go on. The message is a sentence; `status` and `code` are the server's, else 0 and empty."""

    def __init__(self, sentence: str, status: int = 0, code: str = "") -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code


class _BrokenOff(Exception):
    """The connection ended early, or the server asks to come later. The message is the reason."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to download.

    Attributes:
        url: http or https; its own host may be any, also a private one.
        shown: What sentences call it; URLs may hold tokens.
        headers: Sent to the host of `url` only, not to hosts that it redirects to.
        size: Bytes, if known.
        digest: SHA-256 in 64 hexadecimal digits, or git's SHA-1 of a blob in 40; empty if unknown.
    """

    url: str
    shown: str
    headers: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class FileBeginning:
    """The first bytes of a remote file, its size if the server says so, and a safe name for it, possibly empty."""

    data: bytes
    size: int | None
    name: str


class FileDownloader:
    """Downloads files. Redirects lead to public addresses and to those in `allowed`. Use it on one event loop.

    `report` receives the bytes that are there and the bytes of the file. After a broken connection it goes on after
    each of `pauses`, in seconds, in turn. Proxies of the environment are used; they then decide what they reach.
    Raises `DownloadFailed` with a sentence for everything that can go wrong.
    """

    def __init__(
        self,
        allowed: Sequence[AllowedTarget] = (),
        report: Callable[[int, int | None], None] = lambda done, size: None,
        *,
        pauses: Sequence[float] = (1.0, 2.0, 5.0, 10.0),
        resolve: Resolve | None = None,
    ) -> None:
        self._allowed = tuple(allowed)
        self._report = report
        self._pauses = tuple(pauses)
        self._resolve = resolve
        self._tls: ssl.SSLContext | None = None

    async def look(self, file: RemoteFile, needed: Callable[[bytes], int]) -> FileBeginning:
        """Read the beginning of a file: as many bytes as `needed` says of those that are there."""
        data, size, name = b"", file.size, ""
        with _explained(file):
            while (size is None or len(data) < size) and (wanted := needed(data)) > len(data):
                had = len(data)
                async with self._open(file, {"Range": f"bytes={had}-{wanted - 1}"}) as (response, target):
                    start, size = self._checked(response, file)
                    if start not in (0, had):
                        raise DownloadFailed(f"{file.shown} is answered with another part than was asked for.")
                    name = safe_name(offered_name(response)) or last_name(
                        parse_url(file.url, "", _MAX_URL).path, target.path
                    )
                    data = await _first_bytes(response, data[:start], needed)
                if len(data) <= had or response.status_code == httpx.codes.OK:
                    break
        return FileBeginning(data, size, name)

    async def download(self, file: RemoteFile, partial: Path) -> str:
        """Download a file into `partial`, or what of it is not there yet; returns its SHA-256.

        `finish` gives it its name. A file of a wrong digest is deleted.
        """
        with _explained(file), PartialFile(partial) as target:
            try:
                target.take_up(_source(file), file.digest)
                await self._fill(file, target, partial.parent)
                target.sync()
            except BaseException:
                if not target.position:
                    discard(partial)
                raise
            found, sha256 = target.digest_like(file.digest), target.digest_like("")
            if file.digest and found != file.digest:
                discard(partial)
                raise DownloadFailed(
                    f"{file.shown} is damaged, or another file: its digest is {found}, and {file.digest} was "
                    "expected. What came is deleted."
                )
        return sha256

    async def _fill(self, file: RemoteFile, target: PartialFile, folder: Path) -> None:
        """Download until all is there; a broken connection is taken up again while more comes each time."""
        furthest, failures = target.position, 0
        while not target.is_complete:
            try:
                await self._go_on(file, target, folder)
                return
            except (_BrokenOff, httpx.TransportError) as error:
                reason = describe_http_error(error) if isinstance(error, httpx.TransportError) else str(error)
                failures = failures + 1 if target.position <= furthest else 1
                furthest = max(furthest, target.position)
                if failures > len(self._pauses):
                    raise DownloadFailed(
                        f"{file.shown} broke off at {_size_text(target.position)}: {reason}. The same command resumes "
                        "it."
                    ) from error
                await asyncio.sleep(self._pauses[failures - 1])

    async def _go_on(self, file: RemoteFile, target: PartialFile, folder: Path) -> None:
        """One request for what is not there yet, or for all if the file has changed or cannot be resumed."""
        headers = {}
        if target.position and target.note is not None:
            headers = {"Range": f"bytes={target.position}-"}
            headers |= {"If-Range": target.note.validator} if target.note.validator else {}
        async with self._open(file, headers) as (response, _):
            if not headers or response.status_code not in _PARTS or _continues(response, target):
                await self._receive(response, file, target, folder)
                return
        target.drop()
        await self._go_on(file, target, folder)

    async def _receive(self, response: httpx.Response, file: RemoteFile, target: PartialFile, folder: Path) -> None:
        start, size = self._checked(response, file)
        if start != 0 and start != target.position:
            raise DownloadFailed(f"{file.shown} is answered with another part than was asked for.")
        if start == 0:
            target.begin(ResumeNote(_source(file), size, validator_of(response), file.digest))
        _check_disk(folder, (size or 0) - target.position, file.shown)
        async for chunk in response.aiter_raw():
            _check_disk(folder, len(chunk) if size is None else 0, file.shown)
            target.write(chunk)
            self._report(target.position, size)
            if target.position > (size or MAX_BYTES):
                target.drop()
                raise DownloadFailed(f"{file.shown} is larger than the server said.")
        if size is not None and target.position < size:
            raise _BrokenOff("the answer ended early")

    def _checked(self, response: httpx.Response, file: RemoteFile) -> tuple[int, int | None]:
        """Where an answer's body begins, and the size of the file. Raises for answers that are no file."""
        status, code = response.status_code, response.headers.get("x-error-code", "")[:100]
        if status in _LATER:
            raise _BrokenOff(f"the server answers with status {status}")
        if status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise DownloadFailed(f"{file.shown} is empty.", status)
        if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
            raise DownloadFailed(f"{file.shown} is answered with status {status}{advice_for(status)}.", status, code)
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise DownloadFailed(f"{file.shown} is answered compressed, which was not asked for.")
        if response.headers.get("content-type", "").strip().lower().startswith(("text/html", "application/xhtml")):
            raise DownloadFailed(
                f"{file.shown} is answered with a web page and not a file; the download needs a login (a token in the "
                "address or in HF_TOKEN) or another address."
            )
        start, size = start_and_size(response)
        if size is not None and size > MAX_BYTES:
            raise DownloadFailed(f"{file.shown} has {size:,} bytes, and {MAX_BYTES:,} at most are fetched.")
        if size is not None and file.size is not None and size != file.size:
            raise DownloadFailed(f"{file.shown} has {size:,} bytes, and {file.size:,} are listed for it.")
        return start, size

    @asynccontextmanager
    async def _open(
        self, file: RemoteFile, headers: Mapping[str, str]
    ) -> AsyncIterator[tuple[httpx.Response, UrlTarget]]:
        """Send a request and follow its redirects; gives the last answer, whose body is not read, and its URL."""
        if self._tls is None:
            self._tls = await asyncio.to_thread(httpx.create_ssl_context)
        first = target = parse_url(file.url, "The address", _MAX_URL)
        own = AllowedTarget(host=first.host, port=first.port)
        addresses, name = SafeClient((own, *self._allowed), self._resolve), first.host
        try:
            for hop in range(_MAX_REDIRECTS + 1):
                proxied = target.scheme in getproxies() and not proxy_bypass(target.host)
                async with httpx.AsyncClient(
                    verify=self._tls, trust_env=proxied, follow_redirects=False, timeout=_TIMEOUT, headers=_HEADERS
                ) as client:
                    sent = {**headers, **(file.headers if target.authority == first.authority else {})}
                    try:
                        send = _send_by_proxy if proxied else _send
                        response = await send(client, addresses, target, name, sent)
                    except InvalidInput as error:
                        hint = "FETCH_ALLOW may allow it." if hop else "Is the name right, and the network there?"
                        raise DownloadFailed(f"{error.detail if hop else f'{name} has no address.'} {hint}") from error
                    try:
                        if response.status_code not in REDIRECTS:
                            yield response, target
                            return
                    finally:
                        await response.aclose()
                location, name = response.headers.get("location", ""), f"The redirect of {target.host}"
                target = redirect_target(target, location, name, _MAX_URL)
            raise DownloadFailed(f"{file.shown} redirects more than {_MAX_REDIRECTS} times.")
        finally:
            addresses.close()


async def _send(
    client: httpx.AsyncClient, addresses: SafeClient, target: UrlTarget, name: str, headers: Mapping[str, str]
) -> httpx.Response:
    return await addresses.send(client, "GET", target, name, headers=headers)


async def _send_by_proxy(
    client: httpx.AsyncClient, addresses: SafeClient, target: UrlTarget, name: str, headers: Mapping[str, str]
) -> httpx.Response:
    """Send a request by the environment's proxy, which resolves names; only addresses are checked here."""
    with suppress(ValueError):
        ipaddress.ip_address(target.host)
        await addresses.check(target, name)
    return await client.send(client.build_request("GET", target.url, headers=headers), stream=True)


async def _first_bytes(response: httpx.Response, data: bytes, needed: Callable[[bytes], int]) -> bytes:
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) >= needed(data):
            break
    return data


@contextmanager
def _explained(file: RemoteFile) -> Iterator[None]:
    """Turn the errors of sockets, addresses and disks into sentences."""
    try:
        yield
    except (InvalidInput, RemoteFetchFailed) as error:
        raise DownloadFailed(error.detail) from error
    except _BrokenOff as error:
        raise DownloadFailed(f"{file.shown} cannot be fetched now: {error}.") from error
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
        host = httpx.URL(file.url).host
        raise DownloadFailed(f"{file.shown} cannot be fetched from {host}: {describe_http_error(error)}.") from error
    except OSError as error:
        raise DownloadFailed(
            f"{file.shown} cannot be written: {error.strerror}. The same command resumes it."
        ) from error


def _continues(response: httpx.Response, target: PartialFile) -> bool:
    """Whether an answer is the rest of the file that the partial one was begun from."""
    start, size = start_and_size(response)
    note = target.note
    if response.status_code != httpx.codes.PARTIAL_CONTENT or start != target.position or note is None:
        return False
    return (note.size is None or size == note.size) and validator_of(response) in ("", note.validator)


def _check_disk(folder: Path, more: int, shown: str) -> None:
    """Raise `DownloadFailed` if the disk of a folder has no room for so many bytes more."""
    free = max(0, shutil.disk_usage(folder).free - MIN_FREE_BYTES)
    if more > free:
        raise DownloadFailed(
            f"{shown} takes {_size_text(more)}, and the disk of the folder {folder.name} has {_size_text(free)} free."
        )


def _source(file: RemoteFile) -> str:
    return hashlib.sha256(file.url.encode()).hexdigest()


def _size_text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
