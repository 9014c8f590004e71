"""The models that an operator put into MODELS_DIR under names of his own: what each is made of, or why it cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stable_diffusion_server.pipelines import family_rows
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.library import Kind, LibraryModel, ModelLibrary, ModelTask
from stable_diffusion_server.pipelines.library.file_headers import shown
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.owner_values import OwnerValues, Unusable, with_owner_values
from stable_diffusion_server.pipelines.part_search import PARTS, PartFinder, path_within
from stable_diffusion_server.pipelines.stock_classes import why_not_drawn
from stable_diffusion_server.pipelines.stock_rows import STOCK_ROWS
from stable_diffusion_server.pipelines.stock_sizes import with_folder_size

# Folders of MODELS_DIR that hold no models of the operator's.
_NOT_OWNED = (*(spec.folder for spec in MODELS.values()), *(spec.control_folder or "" for spec in MODELS.values()))

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
        if why := why_not_drawn(identity.pipeline_class):
            raise Unusable(f"{model.file_name} is a folder of the class {identity.pipeline_class}, which {why}.")
        if model.faults:
            raise Unusable(" ".join(model.faults))
        spec = self._row(model)
        folder = path_within(model, self.models_dir)
        if identity.kind is Kind.PIPELINE and Path(folder).is_absolute():
            raise Unusable(f"{model.name} is a folder outside the first folder of MODELS_DIR, and is not read there.")
        place = folder if identity.kind is Kind.PIPELINE else model.file_name
        spec = replace(spec, name=model.name, folder=place, revision=identity.family)
        if identity.kind is Kind.PIPELINE and spec.any_extra and spec.pipeline_class not in STOCK_ROWS:
            spec = with_folder_size(spec, model.path)
        if identity.kind is not Kind.PIPELINE:
            spec = replace(spec, checkpoint=finder.files(model))
        spec = self._with_added(spec, model, finder)
        return with_owner_values(spec, model, lambda name, kind: finder.path_of(model, name, kind))

    def _with_added(self, spec: ModelSpec, model: LibraryModel, finder: PartFinder) -> ModelSpec:
        """With the components of other models that the owner's spec names."""
        named = {key: value for key, value in model.spec.values.items() if key in spec.owner_keys}
        if "refiner" in named:
            return family_rows.refined(spec, finder.refiner(model, named["refiner"]))
        if "image_prompt" not in named:
            return spec
        return family_rows.prompted_by_images(spec, finder.path_of(model, named["image_prompt"], Kind.IMAGE_PROMPT))

    def _row(self, model: LibraryModel) -> ModelSpec:
        """The row that a model follows. Raises `Unusable` for what no family here draws."""
        identity, name = model.identity, model.file_name
        # What a file does not say, its owner may.
        said = family_rows.as_named(identity, str(model.spec.values.get("variant", identity.variant)))
        row = family_rows.family_row(said) or family_rows.family_row(identity)
        if row is None and identity.task is ModelTask.REFINER:
            raise Unusable(f"{name} is a refiner: name it in a model's spec, as refiner = {model.name!r}.")
        if row is None:
            families = ", ".join(identity.families) or "an unknown family"
            purpose = "" if identity.task is ModelTask.NORMAL else f"for {identity.task}"
            kind = " ".join(part for part in (identity.variant, purpose) if part)
            what = f"{name} is a model of {families}{f' ({kind})' if kind else ''}"
            if identity.pipeline_class:
                listed = "docs/models.md lists the families and classes that are"
                raise Unusable(f"{what} with the class {identity.pipeline_class}, which is not drawn here; {listed}.")
            raise Unusable(f"{what}, and models of {family_rows.drawn_families()} are drawn here.")
        if identity.kind is not Kind.PIPELINE and identity.family not in PARTS:
            raise Unusable(f"{name} is a file of {identity.family}, which is drawn from diffusers folders only.")
        return row
