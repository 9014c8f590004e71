"""The models that an operator put into MODELS_DIR under names of his own: what each is made of, or why it cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stable_diffusion_server.pipelines.catalog import MODELS, REAL_MODELS
from stable_diffusion_server.pipelines.library import Kind, LibraryModel, ModelLibrary, ModelTask
from stable_diffusion_server.pipelines.library.file_headers import shown
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.owner_values import OwnerValues, Unusable, with_owner_values
from stable_diffusion_server.pipelines.part_search import PARTS, PartFinder, path_within

# Folders of MODELS_DIR that hold no models of the operator's.
_NOT_OWNED = (*(spec.folder for spec in MODELS.values()), *(spec.control_folder or "" for spec in MODELS.values()))

# The rows that models of the operator's follow; their repositories and LoRAs belong to those rows alone.
_SDXL = replace(REAL_MODELS["sdxl"][-1], repo=None, control_repo=None, lcm_folder=None, lcm_repo=None)
_SCHNELL = replace(REAL_MODELS["flux"][0], repo=None, control_repo=None)
_DEV = replace(_SCHNELL, default_steps=28, default_guidance=3.5, text_tokens=512, takes_guidance=True)
_INPAINT_CLASS = "StableDiffusionXLInpaintPipeline"
# Characters of a sentence.
_LONGEST = 1000


@dataclass(frozen=True, slots=True)
class OwnedModels:
    """What MODELS_DIR holds: specs by name, and for what cannot be used the reason as a sentence, by name.

    `aliases` are further names of the models: of their files and from their owner's specs. `remarks` are sentences on
    models that can be used.
    """

    specs: Mapping[str, ModelSpec] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.specs or self.refused)

    def of_family(self, family: str) -> list[str]:
        """The names of the models of a family (`sdxl`, `flux`), sorted."""
        return sorted(name for name, spec in self.specs.items() if spec.family == MODELS[family].family)


def find_owned_models(
    models_dir: Path, folders: Sequence[Path], cache: Path | None = None, known: Collection[str] = ()
) -> OwnedModels:
    """Scan the folders of MODELS_DIR; `models_dir` is the one that models are loaded from.

    `cache` is a file that keeps identities between processes, `known` are folders to leave out.
    """
    library = ModelLibrary([folder for folder in folders if folder.is_dir()], cache, skip=_NOT_OWNED)
    library.refresh()
    specs: dict[str, ModelSpec] = {}
    refused: dict[str, str] = {}
    remarks: list[str] = []
    for model in library.models:
        if model.role != "model" or path_within(model, models_dir) in known:
            continue
        try:
            made = _Builder(library.models, models_dir).spec(model)
            specs[model.name] = made.spec
            remarks += [shown(made.remark, _LONGEST)] if made.remark else []
        except Unusable as error:
            refused[model.name] = shown(str(error), _LONGEST)
    aliases = {alias: name for alias, name in library.names.every_name().items() if name in specs}
    return OwnedModels(specs, refused, aliases, remarks)


@dataclass(frozen=True, slots=True)
class _Builder:
    """Makes specs; `models` are all files, among which missing parts are found."""

    models: Sequence[LibraryModel]
    models_dir: Path

    def spec(self, model: LibraryModel) -> OwnerValues:
        identity, finder = model.identity, PartFinder(self.models, self.models_dir)
        if model.faults:
            raise Unusable(" ".join(model.faults))
        self._check(model)
        flux = identity.family == "flux"
        spec = (_DEV if identity.variant == "dev" else _SCHNELL) if flux else _SDXL
        folder = path_within(model, self.models_dir)
        if identity.kind is Kind.PIPELINE and Path(folder).is_absolute():
            raise Unusable(f"{model.name} is a folder outside the first folder of MODELS_DIR, and is not read there.")
        place = folder if identity.kind is Kind.PIPELINE else model.file_name
        spec = replace(spec, name=model.name, folder=place, revision=identity.family)
        if identity.task is ModelTask.INPAINT:
            spec = replace(spec, pipeline_class=_INPAINT_CLASS, control_folder=None)
        if identity.kind is not Kind.PIPELINE:
            spec = replace(spec, checkpoint=finder.files(model))
        return with_owner_values(spec, model, lambda name, kind: finder.path_of(model, name, kind))

    def _check(self, model: LibraryModel) -> None:
        """Raise `Unusable` for what no family here draws."""
        identity, name = model.identity, model.file_name
        if identity.family not in PARTS:
            families = ", ".join(identity.families) or "an unknown family"
            raise Unusable(f"{name} is a model of {families}, and models of SDXL and FLUX.1 are drawn here.")
        inpaints = identity.family == "sdxl" and identity.task is ModelTask.INPAINT
        if identity.task is not ModelTask.NORMAL and not inpaints:
            raise Unusable(f"{name} is a {identity.family} model for {identity.task}, which is not drawn here.")
        if identity.variant not in ("", "schnell", "dev"):
            raise Unusable(f"{name} is {identity.variant}, which is not drawn here.")
