"""The `models` commands: list the models of MODELS_DIR, inspect a file, verify all files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines import (
    MODELS,
    REAL_MODELS,
    FileIdentity,
    LibraryModel,
    ModelLibrary,
    OwnerSpec,
    WeightDigests,
    WeightFileError,
    check_pipeline_folder,
    identify,
    identity_as_dict,
    read_spec,
    spec_path,
)
from stable_diffusion_server.settings import Settings

_GIGABYTE, _MEGABYTE = 1e9, 1e6
_NAME_WIDTH = 40


def list_models(settings: Settings, *, as_json: bool = False) -> None:
    """Print the models that the settings select and the model files of MODELS_DIR. Exits with 1 without a model."""
    loaded = ModelState.of(settings)
    library = open_library(settings)
    if as_json:
        _print_json(
            {
                "selected": [] if loaded.fault else list(loaded.facts),
                "fault": loaded.fault.detail if loaded.fault else "",
                "models": [_described(library, model) for model in library.models],
                "remarks": list(library.remarks),
            }
        )
    else:
        print_line(f"MODELS={settings.models}, MODELS_DIR={os.pathsep.join(map(str, settings.models_dir))}")
        if loaded.fault is None:
            _print_selected(settings, loaded)
        _print_table(library)
    if loaded.fault is not None:
        sys.stderr.write(f"{loaded.fault.detail}\n")
        sys.exit(1)


def inspect_model(settings: Settings, file: str, *, as_json: bool = False) -> None:
    """Print what a file or folder is; `file` is a path, or a name in MODELS_DIR. Exits with 1 if it cannot be used."""
    path = Path(file)
    if not os.path.exists(path):  # unlike Path.exists, false for a name that is too long
        try:
            path = open_library(settings).names.resolve(file).path
        except InvalidInput as error:
            sys.stderr.write(f"There is no file of that name, and {error.detail}\n")
            sys.exit(2)
    identity = identify(path)
    place = spec_path(path)
    spec = read_spec(place) if place else OwnerSpec()
    faults = [f"{path.name} {identity.reason}."] if identity.reason else []
    faults += spec.faults
    if as_json:
        _print_json({"file": path.name, **identity_as_dict(identity), "spec": dict(spec.values), "faults": faults})
    else:
        for name, value in _facts(path, identity, spec):
            print_line(f"{name:12}{value}")
        for fault in faults:
            print_line(f"FAULT       {fault}")
    if faults:
        sys.exit(1)


def verify_models(settings: Settings, names: Sequence[str], *, as_json: bool = False) -> None:
    """Read the models of these names, or all, whole, and print their hashes. Exits with 1 if one cannot be used."""
    digests = WeightDigests(settings.data_dir / "weights.json")
    library = open_library(settings, digests)
    try:
        models = [library.names.resolve(name) for name in names] or list(library.models)
    except InvalidInput as error:
        sys.stderr.write(f"{error.detail}\n")
        sys.exit(2)
    results = []
    for model in models:
        faults = _verify(model, digests)
        results.append({"name": model.name, "title": library.title(model), "faults": faults})
        if not as_json:
            print_line(f"  FAIL  {' '.join(faults)}" if faults else f"  ok    {library.title(model)}")
    if as_json:
        _print_json({"models": results})
    sys.exit(1 if any(result["faults"] for result in results) else 0)


def open_library(settings: Settings, digests: WeightDigests | None = None) -> ModelLibrary:
    """Scan MODELS_DIR, without the models that come with the server."""
    embedded = {folder for spec in MODELS.values() for folder in (spec.folder, spec.control_folder) if folder}
    library = ModelLibrary(
        settings.models_dir,
        settings.data_dir / "library.json",
        digests or WeightDigests(settings.data_dir / "weights.json"),
        skip=embedded,
    )
    library.refresh()
    return library


def _verify(model: LibraryModel, digests: WeightDigests) -> list[str]:
    """What is wrong with a model, as sentences; reads all of a file."""
    faults = list(model.faults)
    if faults:
        return faults
    try:
        if model.path.is_dir() and model.identity.kind == "pipeline":
            check_pipeline_folder(model.path)
        elif not model.path.is_dir():
            found = digests.of_file(model.path)
            if found != (pinned := model.spec.values.get("sha256", found)):
                return [f"{model.file_name} is not the file of its spec: its SHA-256 is {found}, and not {pinned}."]
    except WeightFileError as error:
        return [f"{model.name}: {error}."]
    except ModelLoadError as error:
        return [error.detail]
    return []


def _print_selected(settings: Settings, loaded: ModelState) -> None:
    for name, facts in loaded.facts.items():
        side = round(facts.native_pixels**0.5)
        print_line(f"  {name:5} {facts.folder} ({facts.revision}), native {side} x {side}, {facts.default_steps} steps")
    print_line("Real weights, by the folder they are looked for in:")
    for name, candidates in REAL_MODELS.items():
        for facts in candidates:
            there = any((folder / facts.folder).is_dir() for folder in settings.models_dir)
            print_line(f"  {name:5} {facts.folder}: {'here' if there else 'not here'}")


def _print_table(library: ModelLibrary) -> None:
    print_line(f"Model files in MODELS_DIR: {len(library.models) or 'none'}")
    rows = [_row(library, model) for model in library.models]
    widths = [max([len(row[column]) for row in rows], default=0) for column in range(5)]
    for row, model in zip(rows, library.models, strict=True):
        cells = [cell.ljust(min(width, _NAME_WIDTH)) for cell, width in zip(row, widths, strict=True)]
        print_line("  " + "  ".join(cells).rstrip())
        for sentence in (*model.faults, model.note):
            if sentence:
                print_line(f"      {sentence}")
    for remark in library.remarks:
        print_line(remark)


def _row(library: ModelLibrary, model: LibraryModel) -> tuple[str, str, str, str, str]:
    identity = model.identity
    families = " or ".join(identity.families) or "unknown"
    family = f"{families} {identity.variant}".strip() if identity.variant != families else families
    task = "" if identity.task == "normal" else identity.task.value
    kind = f"{identity.kind.value} {task}".strip()
    precision = identity.precision + (" scaled" if identity.scaled else "")
    return library.title(model), kind, family, precision, _size_text(model.size)


def _size_text(size: int) -> str:
    return f"{size / _GIGABYTE:.1f} GB" if size >= _GIGABYTE else f"{size / _MEGABYTE:.1f} MB"


def _described(library: ModelLibrary, model: LibraryModel) -> dict[str, Any]:
    identity = {name: value for name, value in identity_as_dict(model.identity).items() if name != "reason"}
    return {
        "name": model.name,
        "title": library.title(model),
        "role": model.role,
        "file": model.file_name,
        "folder": model.found.folder,
        "bytes": model.size,
        **identity,
        "spec": dict(model.spec.values),
        "note": model.note,
        "faults": list(model.faults),
    }


def _facts(path: Path, identity: FileIdentity, spec: OwnerSpec) -> Iterable[tuple[str, str]]:
    yield "file", path.name
    for name, value in identity_as_dict(identity).items():
        if name in ("remarks", "reason", "metadata") or not value:
            continue
        yield name.replace("_", " "), ", ".join(value) if isinstance(value, tuple) else str(value)
    yield from (("metadata", f"{name} = {value}") for name, value in identity.metadata.items())
    yield from (("spec", f"{name} = {value}") for name, value in spec.values.items())
    yield from (("note", remark) for remark in identity.remarks)


def print_line(line: str) -> None:
    """Print one line; characters that the terminal cannot show, and control characters, are escaped."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
