"""Lists a repository of the Hugging Face hub, chooses the files of it that are read, and words what the hub refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of the HTTP library it uses
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.weight_files import (
    DIFFUSERS,
    INDEX,
    TEXTS,
    TRANSFORMERS,
    WeightFileError,
    WeightPart,
    parts_of,
)

# Timeout in seconds for listing a repository's files; the client resumes interrupted file downloads itself.
_PATIENCE = 20.0
_MAX_FILES, _MAX_NAME = 20_000, 400


@dataclass(frozen=True, slots=True)
class HubListing:
    """The files of a repository at a commit: name → bytes, and name → SHA-256, or for small ones git's SHA-1."""

    repo: str
    commit: str
    sizes: Mapping[str, int]
    blobs: Mapping[str, str]

    def url(self, name: str) -> str:
        """The address of a file."""
        return hf_hub_url(self.repo, name, revision=self.commit)


def list_repository(repo: str, revision: str) -> HubListing:
    """List a repository's files; names that lead out of a folder are left out. Raises what the hub's client raises."""
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_PATIENCE)
    files = {file.rfilename: file for file in (info.siblings or ())[:_MAX_FILES] if _is_within(file.rfilename)}
    return HubListing(
        repo=repo,
        commit=info.sha or revision,
        sizes={name: file.size or 0 for name, file in files.items()},
        blobs={
            name: (file.lfs.sha256 if file.lfs is not None else file.blob_id) or name for name, file in files.items()
        },
    )


def hub_headers() -> dict[str, str]:
    """The headers of requests to the hub: with the token of HF_TOKEN, or of the file in HF_HOME."""
    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def hub_page() -> str:
    """The hub's address (HF_ENDPOINT), without a slash at its end."""
    return constants.ENDPOINT.rstrip("/")


def files_of_repository(listing: HubListing, folder: Path, variant: str | None) -> list[str]:
    """The files of a whole pipeline whose index lies in `folder`: one set of weights, of `variant` if available, each.

    Raises `WeightFileError`.
    """
    parts = parts_of(folder)
    return [INDEX, *(name for part in parts for name in files_of_component(part, listing.sizes, variant))]


def files_of_network(listing: HubListing, variant: str | None) -> list[str]:
    """The configuration and one set of weight files of a single network. Raises `WeightFileError`."""
    stem = next(
        (stem for stem in (DIFFUSERS, TRANSFORMERS) if any(name.startswith(stem) for name in listing.sizes)), ""
    )
    return ["config.json", *weights_in(listing.sizes, "", stem or DIFFUSERS, variant)]


def files_of_component(part: WeightPart, sizes: Mapping[str, int], variant: str | None) -> list[str]:
    """The files of one component, chosen from its repository. Raises `WeightFileError`."""
    texts = [
        name
        for name in sizes
        if name.startswith(f"{part.name}/") and name.count("/") == 1 and name.endswith(TEXTS) and ".index." not in name
    ]
    return [*texts, *(weights_in(sizes, f"{part.name}/", part.stem, variant) if part.has_weights else ())]


def weights_in(sizes: Mapping[str, int], folder: str, stem: str, variant: str | None) -> list[str]:
    """One set of weight files below `folder`, of `variant` if available. Raises `WeightFileError` if there is none."""
    for wanted in dict.fromkeys((variant, None)):
        mark = f"\\.{re.escape(wanted)}" if wanted else ""
        name = re.escape(folder + stem)
        whole = re.compile(rf"{name}{mark}\.safetensors")
        shards = re.compile(
            rf"{name}{mark}-\d+-of-\d+\.safetensors|{name}-\d+-of-\d+{mark}\.safetensors"
            rf"|{name}\.safetensors\.index{mark}\.json|{name}\.safetensors{mark}\.index\.json"
        )
        for kind in (whole, shards):
            if found := [name for name in sizes if kind.fullmatch(name)]:
                return found
    raise WeightFileError(f"it holds no safetensors files {f'for {folder}' if folder else 'of weights'}".rstrip("/"))


def hub_refusal(repo: str, revision: str, error: Exception, setting: str = "HUB_REVISIONS") -> ModelLoadError:
    """Why a repository cannot be downloaded, and what to do about it. `setting` is where the revision was given."""
    match error:
        case GatedRepoError():
            why = why_refused(repo, 0, "GatedRepo")
        case RevisionNotFoundError():
            why = f"it has no revision {revision} ({setting})"
        case RepositoryNotFoundError():
            why = why_refused(repo, 0, "RepoNotFound")
        case HFValidationError():
            why = "that is not a repository's name, such as stabilityai/sdxl-turbo"
        case OfflineModeIsEnabled():
            why = "HF_HUB_OFFLINE=1 forbids it"
        case HfHubHTTPError() if error.response is not None:
            why = why_refused(repo, error.response.status_code, "")
        case HTTPError() | ConnectionError() | TimeoutError():
            why = f"{hub_page()} does not answer ({one_line(error)}); HF_ENDPOINT names another hub"
        case _:
            why = one_line(error)
    return ModelLoadError(f"{repo} cannot be had from the hub: {why}.")


def why_refused(repo: str, status: int, code: str) -> str:
    """What a status of the hub, or the code of its error, means and what to do about it."""
    page = f"{hub_page()}/{repo}"
    if code == "GatedRepo":
        return (
            f"it is gated. Accept its licence at {page} and set HF_TOKEN to a token of that account "
            f"(made at {hub_page()}/settings/tokens)"
        )
    if code == "RepoNotFound" or status == 404:
        return f"there is no {page}, or it is private and HF_TOKEN is not a token that may read it"
    if status in (401, 403):
        return (
            f"the hub refuses the token (status {status}). Set HF_TOKEN to a token that may read {page} (made at "
            f"{hub_page()}/settings/tokens)"
        )
    return f"{hub_page()} answers with status {status}; try again later"


def one_line(error: Exception) -> str:
    """The client's message on one line, shortened, without the home folder."""
    words = " ".join(str(error).split()).replace(str(Path.home()), "~").rstrip(".")
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


def _is_within(name: str) -> bool:
    """Whether a name of the hub stays within the folder that it is written to, and is no hidden file there."""
    parts = name.split("/")
    plain = name.isprintable() and len(name) <= _MAX_NAME and "\\" not in name and ":" not in name
    return plain and not PurePosixPath(name).is_absolute() and all(part and part[0] != "." for part in parts)
