"""The `models fetch` command: downloads a model of the hub or of an address into MODELS_DIR."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from stable_diffusion_server.app.fetch_folder import FolderDownload
from stable_diffusion_server.app.fetch_order import FetchOrder, FetchRefused, names_of
from stable_diffusion_server.app.fetch_plan import (
    INDEX,
    FetchPlan,
    has_weights_beside_config,
    listing_of,
    plan_of_url,
    plans_of_files,
)
from stable_diffusion_server.app.fetch_progress import FetchProgress, size_text
from stable_diffusion_server.app.model_commands import print_line
from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.net import (
    AllowedTarget,
    DownloadFailed,
    FileDownloader,
    RemoteFile,
    discard,
    finish,
    git_blob_id,
)
from stable_diffusion_server.pipelines import (
    FileIdentity,
    HubListing,
    Kind,
    WeightDigests,
    folder_for,
    header_size,
    identify,
    identify_beginning,
    pin_origin,
    read_spec,
    refusal_of_name,
    spec_path,
    why_refused,
)
from stable_diffusion_server.settings import Settings

_INTERRUPTED = 130
_UNKNOWN = FileIdentity(Kind.UNKNOWN)


def fetch_models(settings: Settings, order: FetchOrder) -> None:
    """Download what `order` asks for. Exits with 2 for an order that is not done, with 1 for one that fails."""
    try:
        asyncio.run(_ModelFetch(settings, order.checked()).run())
    except FetchRefused as refused:
        _exit(2, str(refused))
    except DownloadFailed as failed:
        _exit(1, str(failed))
    except ModelLoadError as failed:
        _exit(1, failed.detail)
    except OSError as error:
        _exit(1, f"{error.filename or 'A file'} cannot be written: {error.strerror}.")
    except KeyboardInterrupt:
        _exit(_INTERRUPTED, "Stopped; the same command resumes it.")


class _ModelFetch:
    """One run of the command."""

    def __init__(self, settings: Settings, order: FetchOrder) -> None:
        self._order = order
        self._models_dir = settings.models_dir[0]
        self._lora_dir = settings.lora_dir
        self._digests = WeightDigests(settings.data_dir / "weights.json")
        self._progress = FetchProgress()
        allowed = [AllowedTarget.parse(entry) for entry in settings.fetch_allow]
        self._downloader = FileDownloader(allowed, self._progress.report)

    async def run(self) -> None:
        self._models_dir.mkdir(parents=True, exist_ok=True)
        try:
            if self._order.is_url:
                await self._fetch_url()
            else:
                await self._fetch_repository()
        finally:
            self._progress.end()

    async def _fetch_url(self) -> None:
        order = self._order
        file = RemoteFile(order.source, order.source.partition("?")[0].partition("#")[0], digest=order.sha256)
        offered = (await self._downloader.look(file, lambda data: max(1, len(data)))).name
        await self._fetch_file(plan_of_url(order, offered, file))

    async def _fetch_repository(self) -> None:
        order = self._order
        repo, asked = order.repository
        try:
            listing = listing_of(repo, asked or self._pinned(repo, names_of(order)) or "main")
            if not order.files and (INDEX in listing.sizes or has_weights_beside_config(listing)):
                await self._fetch_folder(listing)
                return
            plans = plans_of_files(listing, order)
            if not order.files and not asked and (pinned := self._pinned(repo, [plans[0].name])):
                plans = plans_of_files(listing_of(repo, pinned), order)
            for plan in plans:
                await self._fetch_file(plan)
        except DownloadFailed as failed:
            if not failed.status:
                raise
            raise DownloadFailed(
                f"{repo} cannot be had from the hub: {why_refused(repo, failed.status, failed.code)}."
            ) from failed

    def _pinned(self, repo: str, names: list[str]) -> str:
        """The revision in the spec of an earlier fetch from this repository under one of the names; or empty."""
        places = [self._models_dir, *(path for path in sorted(self._models_dir.iterdir()) if path.is_dir())]
        places += [self._models_dir / self._order.folder]
        places += [self._lora_dir] if self._lora_dir else []
        for model in (place / name for place in places for name in names):
            if (spec := spec_path(model)) is None:
                continue
            values = read_spec(spec).values
            if f"{values.get('source', '')}/".startswith(f"{repo}/") and "revision" in values:
                print_line(f"{spec.name} pins the revision {values['revision']}; {repo}@main is the newest.")
                return str(values["revision"])
        return ""

    async def _fetch_file(self, plan: FetchPlan) -> None:
        remote = plan.files[""]
        identity = _UNKNOWN if refusal_of_name(plan.name) else await self._identity(plan.name, remote)
        folder = self._folder(identity.kind)
        target = folder / plan.name
        with _locked(target):
            if self._is_here(target, plan):
                print_line(f"{plan.name} is here already.")
                sha256 = remote.digest if len(remote.digest) == 64 else ""
            else:
                partial = target.with_name(f".{target.stem}.part{target.suffix}")
                self._progress.begin(plan.name)
                sha256 = await self._downloader.download(remote, partial)
                self._progress.end()
                self._check_whole(partial, plan.name)
                finish(partial, target)
            if not refusal_of_name(plan.name):
                self._pin(target, {**plan.origin, "sha256": sha256})
            self._tell(target, identity, target.stat().st_size, plan.origin)

    async def _identity(self, name: str, remote: RemoteFile) -> FileIdentity:
        """What a file is by its beginning. Raises `DownloadFailed` for one that cannot be used."""
        begun = await self._downloader.look(remote, lambda data: header_size(name, data))
        if begun.size is None:
            return _UNKNOWN
        identity = identify_beginning(name, begun.data, begun.size)
        if identity.reason:
            raise DownloadFailed(f"{name} {identity.reason}. It is not fetched.")
        return identity

    def _check_whole(self, partial: Path, name: str) -> None:
        """Raise `DownloadFailed` for a file that arrived whole and is none: another one was sent than at first."""
        reason = "" if refusal_of_name(name) else identify(partial).reason
        if reason:
            discard(partial)
            raise DownloadFailed(f"{name} {reason}. It is deleted.")

    async def _fetch_folder(self, listing: HubListing) -> None:
        download = FolderDownload(listing, self._order, self._downloader, self._progress)
        identity = await download.identity()
        target = self._folder(identity.kind) / download.name
        origin = {"source": listing.repo, "revision": listing.commit}
        with _locked(target):
            if target.is_dir():
                spec = spec_path(target)
                if spec is None or read_spec(spec).values.get("revision") != listing.commit:
                    raise DownloadFailed(
                        f"The folder {target.name} is there already, and is not of this revision. Move it away, or "
                        "give another --name."
                    )
                print_line(f"{target.name} is here already.")
            else:
                await download.run(target)
                self._pin(target, origin)
            self._tell(target, identify(target), download.size, origin)

    def _folder(self, kind: Kind) -> Path:
        if self._order.folder:
            folder = self._models_dir / self._order.folder
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        if kind is Kind.LORA and self._lora_dir is not None and self._lora_dir.is_dir():
            return self._lora_dir
        return folder_for(kind, self._models_dir)

    def _is_here(self, target: Path, plan: FetchPlan) -> bool:
        """Whether the same file is there; raises `DownloadFailed` for another one, unless it is to be replaced."""
        remote = plan.files[""]
        if not os.path.lexists(target):
            return False
        if remote.digest:
            own = self._digests.of_file if len(remote.digest) == 64 else git_blob_id
            same = target.is_file() and own(target) == remote.digest
        else:
            spec = spec_path(target)
            source = read_spec(spec).values.get("source") if spec else ""
            same = not self._order.replace and source == plan.origin["source"]
        if same or self._order.replace:
            return same
        raise DownloadFailed(
            f"{target.name} is there already, and is another file or of unknown origin; --replace replaces it, --name "
            "gives another name."
        )

    def _pin(self, target: Path, origin: Mapping[str, str]) -> None:
        spec, left = pin_origin(target, origin)
        if left:
            print_line(f"{spec.name} keeps its own {', '.join(left)}.")

    def _tell(self, target: Path, identity: FileIdentity, size: int, origin: Mapping[str, str]) -> None:
        facts = [identity.kind.value, " or ".join(identity.families), identity.variant, identity.precision]
        facts += [size_text(size), f"revision {origin['revision']}" if "revision" in origin else ""]
        what = ", ".join(fact for fact in facts if fact and fact != Kind.UNKNOWN.value)
        print_line(f"{target.parent.name}/{target.name}: {what}")
        if identity.reason:
            print_line(f"{target.name} {identity.reason}.")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other fetches of the same away. Raises `DownloadFailed` while one is at it."""
    lock = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # while it is held: filelock tries again if its file has gone
    except Timeout as error:
        raise DownloadFailed(f"Another `models fetch` is at {target.name}; wait for it.") from error


def _exit(status: int, sentence: str) -> NoReturn:
    sys.stderr.write(f"{sentence}\n")
    sys.exit(status)
