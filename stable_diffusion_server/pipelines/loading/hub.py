"""Downloads models from the Hugging Face hub: only the files that are read, at a pinned revision."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.hub_listing import (
    HubListing,
    files_of_repository,
    hub_refusal,
    list_repository,
    one_line,
    weights_in,
)
from stable_diffusion_server.pipelines.loading.weight_files import (
    DIFFUSERS,
    INDEX,
    SAFETENSORS,
    WeightFileError,
)

_log = structlog.get_logger(__name__)

_MAIN = "main"


@dataclass(frozen=True, slots=True)
class PinnedRevision:
    """A downloaded repository: its commit and the names of the files."""

    commit: str
    files: tuple[str, ...]


class HubClient:
    """Downloads repositories into the hub's cache (HF_HOME), each once.

    `revisions` holds the branch, tag or commit of a repository. For other repositories the commit of the first download
    is stored in the file `pins`, so that a restart uses the same weights. Progress is logged every `every` seconds. All
    methods raise `ModelLoadError` with a sentence on what to do.
    """

    def __init__(
        self, revisions: Mapping[str, str] | None = None, pins: Path | None = None, *, every: float = 10.0
    ) -> None:
        self._revisions = dict(revisions or {})
        self._file = pins
        self._pins = _read(pins)
        self._every = every
        self._done: dict[str, Path | ModelLoadError] = {}
        self.progress = ""

    def pipeline(self, repo: str, variant: str | None) -> Path:
        """The folder of a whole pipeline: for each network one set of weight files, of `variant` if available."""

        def choose(listed: HubListing) -> list[str]:
            if INDEX not in listed.sizes:
                raise WeightFileError(f"it holds no {INDEX}")
            index = hf_hub_download(repo, INDEX, revision=listed.commit)
            return files_of_repository(listed, Path(index).parent, variant)

        return self._fetched(repo, choose)

    def network(self, repo: str, variant: str | None) -> Path:
        """The folder of a single network, such as a ControlNet: its configuration and one set of weight files."""
        return self._fetched(repo, lambda listed: ["config.json", *weights_in(listed.sizes, "", DIFFUSERS, variant)])

    def adapters(self, repo: str) -> Path:
        """The folder of a repository of LoRAs: its safetensors files."""
        return self._fetched(repo, lambda listed: [name for name in listed.sizes if name.endswith(SAFETENSORS)])

    def commit(self, repo: str) -> str:
        """The commit a repository was downloaded at; empty if it was not downloaded."""
        return self._pins[repo].commit if repo in self._done and repo in self._pins else ""

    def _fetched(self, repo: str, choose: Callable[[HubListing], Sequence[str]]) -> Path:
        if repo not in self._done:
            try:
                self._done[repo] = self._fetch(repo, choose)
            except ModelLoadError as error:
                self._done[repo] = error
        done = self._done[repo]
        if isinstance(done, ModelLoadError):
            raise done
        return done

    def _fetch(self, repo: str, choose: Callable[[HubListing], Sequence[str]]) -> Path:
        asked, pin = self._revisions.get(repo), self._pins.get(repo)
        if pin is not None and asked in (None, pin.commit) and (folder := _in_cache(repo, pin)) is not None:
            return folder
        revision = asked or (pin.commit if pin is not None else _MAIN)
        try:
            listed = list_repository(repo, revision)
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise hub_refusal(repo, revision, error) from error
        except Exception as error:  # the client raises a dozen unrelated classes for connection failures
            return self._without_hub(repo, revision, error)
        try:
            names = list(dict.fromkeys(choose(listed)))
            self._download(repo, listed, names)
        except WeightFileError as fault:
            raise ModelLoadError(f"{repo} cannot be had from the hub: {fault}.") from fault
        except ModelLoadError:
            raise
        except Exception as error:  # as above
            raise hub_refusal(repo, revision, error) from error
        self._pins[repo] = pin = PinnedRevision(listed.commit, tuple(names))
        _write(self._file, self._pins)
        folder = _in_cache(repo, pin)
        if folder is None:
            raise ModelLoadError(f"{repo} was fetched from the hub, and is not all in its cache (HF_HOME).")
        return folder

    def _without_hub(self, repo: str, revision: str, error: Exception) -> Path:
        """The cached repository, when the hub does not answer."""
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:  # the original error says why the hub was not reached
            raise hub_refusal(repo, revision, error) from error
        _log.warning("the hub does not answer; what its cache holds is used", repo=repo, why=one_line(error))
        return folder

    def _download(self, repo: str, listed: HubListing, names: Sequence[str]) -> None:
        blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "blobs")
        lacking = [name for name in names if name in listed.sizes and not (blobs / listed.blobs[name]).exists()]
        total = sum(listed.sizes[name] for name in lacking)
        place = next(folder for folder in (blobs, *blobs.parents) if folder.is_dir())
        partly = _bytes_in(blobs, "*.incomplete")
        if total - partly > (free := shutil.disk_usage(place).free):
            raise ModelLoadError(
                f"{repo} takes {_gigabytes(total)}, and the disk of the hub's cache (HF_HOME) has {_gigabytes(free)} "
                "free."
            )
        if not lacking:
            snapshot_download(repo, revision=listed.commit, allow_patterns=list(names))
            return
        with self._progress_logged(repo, listed.commit, blobs, total):
            snapshot_download(repo, revision=listed.commit, allow_patterns=list(names))

    @contextmanager
    def _progress_logged(self, repo: str, commit: str, blobs: Path, total: int) -> Iterator[None]:
        """Log a download's progress periodically until the block ends; `progress` holds it as a sentence."""
        before, over = _bytes_in(blobs, "*"), threading.Event()

        def report() -> None:
            while True:
                done = min(total, max(0, _bytes_in(blobs, "*") - before))
                self.progress = f"{repo} is being fetched from the hub: {_gigabytes(done)} of {_gigabytes(total)}."
                _log.info("fetching from the hub", repo=repo, commit=commit, bytes=done, of=total)
                if over.wait(self._every):
                    return

        reporter = threading.Thread(target=report, name="hub-progress", daemon=True)
        reporter.start()
        try:
            yield
        finally:
            over.set()
            reporter.join()
            self.progress = ""
        _log.info("fetched from the hub", repo=repo, commit=commit, bytes=total)


def _in_cache(repo: str, pin: PinnedRevision) -> Path | None:
    """The cached folder of a commit, if all of its files are there."""
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "snapshots", pin.commit)
    return folder if pin.files and all((folder / name).is_file() for name in pin.files) else None


def _bytes_in(folder: Path, pattern: str) -> int:
    sizes = 0
    for file in folder.glob(pattern):
        try:
            sizes += file.stat().st_size
        except OSError:  # renamed meanwhile
            continue
    return sizes


def _read(file: Path | None) -> dict[str, PinnedRevision]:
    if file is None or not file.exists():
        return {}
    try:
        read = json.loads(file.read_text())
        return {repo: PinnedRevision(str(pin["commit"]), tuple(map(str, pin["files"]))) for repo, pin in read.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("the record of what was fetched from the hub cannot be read", file=str(file), exc_info=error)
        return {}


def _write(file: Path | None, pins: Mapping[str, PinnedRevision]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps({repo: asdict(pin) for repo, pin in pins.items()}, indent=1))
        os.replace(new, file)
    except OSError as error:
        _log.warning("the record of what was fetched from the hub cannot be kept", file=str(file), exc_info=error)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
