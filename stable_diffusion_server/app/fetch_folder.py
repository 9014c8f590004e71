"""Downloads a whole folder of the hub: file by file into a hidden folder, which gets its name when all are there."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from stable_diffusion_server.app.fetch_order import FetchOrder
from stable_diffusion_server.app.fetch_plan import CONFIG, INDEX, remote_file
from stable_diffusion_server.app.fetch_progress import FetchProgress, size_text
from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.files import MIN_FREE_BYTES
from stable_diffusion_server.net import DownloadFailed, FileDownloader, finish
from stable_diffusion_server.pipelines import (
    FileIdentity,
    HubListing,
    Kind,
    WeightDigests,
    WeightFileError,
    files_of_network,
    files_of_repository,
    identify,
)

_MAX_INDEX_BYTES = 2 * 2**20


class FolderDownload:
    """Downloads what is read of a repository: a whole pipeline, or a single network with its configuration."""

    def __init__(
        self, listing: HubListing, order: FetchOrder, downloader: FileDownloader, progress: FetchProgress
    ) -> None:
        self._listing = listing
        self._downloader = downloader
        self._progress = progress
        self._variant = order.variant or None
        self._index = INDEX if INDEX in listing.sizes else CONFIG
        self._names: list[str] = []
        self.name = order.name or listing.repo.rpartition("/")[2]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self._listing.sizes[name] for name in self._names)

    async def identity(self) -> FileIdentity:
        """What the folder will be; reads its configuration, and chooses its files. Raises `ModelLoadError`."""
        listing = self._listing
        if listing.sizes[self._index] > _MAX_INDEX_BYTES:
            raise ModelLoadError(f"{listing.repo} has a {self._index} of {listing.sizes[self._index]:,} bytes.")
        with tempfile.TemporaryDirectory(prefix="fetch-") as place:
            folder = Path(place)
            await self._downloader.download(remote_file(listing, self._index), folder / self._index)
            try:
                if self._index == INDEX:
                    names = files_of_repository(listing, folder, self._variant)
                else:
                    names = files_of_network(listing, self._variant)
            except WeightFileError as fault:
                raise ModelLoadError(f"{listing.repo} cannot be had from the hub: {fault}.") from fault
            self._names = list(dict.fromkeys(names))
            found = identify(folder)
        if found.kind is Kind.UNKNOWN:
            raise ModelLoadError(f"{listing.repo} {found.reason}.")
        return found

    async def run(self, target: Path) -> None:
        """Download all files and give the folder its name. Files of an earlier, killed download are kept."""
        hidden = target.with_name(f".{target.name}.part")
        hidden.mkdir(exist_ok=True)
        wanted = {hidden / name: remote_file(self._listing, name) for name in self._names}
        partials = {path: path.with_name(f".{path.name}.part") for path in wanted}
        notes = {partial.with_name(f"{partial.name}.json") for partial in partials.values()}
        for path in hidden.rglob("*"):
            if not path.is_dir() and path not in wanted and path not in notes and path not in partials.values():
                path.unlink()
        digests = WeightDigests()
        lacking = [
            path
            for path, remote in wanted.items()
            if not (len(remote.digest) == 64 and path.is_file() and digests.of_file(path) == remote.digest)
        ]
        self._check_disk(hidden, lacking, partials)
        for number, path in enumerate(lacking, 1):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._progress.begin(f"{number}/{len(lacking)} {wanted[path].shown}")
            await self._downloader.download(wanted[path], partials[path])
            finish(partials[path], path)
        self._progress.end()
        for path in hidden.rglob(".*"):
            path.unlink()
        os.replace(hidden, target)

    def _check_disk(self, hidden: Path, lacking: list[Path], partials: dict[Path, Path]) -> None:
        """Raise `DownloadFailed` if the disk has no room for all files together."""
        more = sum(self._listing.sizes[path.relative_to(hidden).as_posix()] for path in lacking)
        for path in lacking:
            with suppress(OSError):
                more -= partials[path].stat().st_size
        free = max(0, shutil.disk_usage(hidden).free - MIN_FREE_BYTES)
        if more > free:
            raise DownloadFailed(
                f"{self._listing.repo} takes {size_text(more)}, and the disk of the folder {hidden.parent.name} has "
                f"{size_text(free)} free."
            )
