"""The models that an operator put into MODELS_DIR under names of his own: what each is made of, or why it cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stable_diffusion_server.pipelines.catalog import MODELS, REAL_MODELS
from stable_diffusion_server.pipelines.library import Kind, LibraryModel, ModelLibrary, ModelTask
from stable_diffusion_server.pipelines.library.file_headers import shown
from stable_diffusion_server.pipelines.library.gguf_header import GGUF, holds_t5_tokenizer
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.loading.checkpoint_layout import CLIP_G, CLIP_L, T5, VAE
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles, ModelSpec

# Folder in MODELS_DIR for T5's tokenizer, where no model brings it.
TOKENIZER = "t5-tokenizer"
# Folders of MODELS_DIR that hold no models of the operator's.
_NOT_OWNED = (*(spec.folder for spec in MODELS.values()), *(spec.control_folder or "" for spec in MODELS.values()))

# The rows that models of the operator's follow; their repositories and LoRAs belong to those rows alone.
_SDXL = replace(REAL_MODELS["sdxl"][-1], repo=None, control_repo=None, lcm_folder=None, lcm_repo=None)
_SCHNELL = replace(REAL_MODELS["flux"][0], repo=None, control_repo=None)
_DEV = replace(_SCHNELL, default_steps=28, default_guidance=3.5, text_tokens=512, takes_guidance=True)
_PARTS = {"sdxl": (VAE, CLIP_L, CLIP_G), "flux": (VAE, CLIP_L, T5)}
_SHOWN = {
    VAE: "a VAE",
    CLIP_L: "the text encoder CLIP-L (clip_l.safetensors)",
    CLIP_G: "the text encoder CLIP-G (clip_g.safetensors)",
    T5: "the text encoder T5 (t5xxl_fp16.safetensors, its fp8 or its GGUF)",
}
_INPAINT_CLASS = "StableDiffusionXLInpaintPipeline"
# Characters of a sentence.
_LONGEST = 1000
# Lin et al. 2023 (arXiv 2305.08891) recommend it for zero terminal SNR.
_RESCALE = 0.7


@dataclass(frozen=True, slots=True)
class OwnedModels:
    """What MODELS_DIR holds: specs by name, and for what cannot be used the reason as a sentence, by name.

    `aliases` are further names of the models: of their files and from their owner's specs.
    """

    specs: Mapping[str, ModelSpec] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

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
    for model in library.models:
        if model.role != "model" or _within(model, models_dir) in known:
            continue
        try:
            specs[model.name] = _Builder(library.models, models_dir).spec(model)
        except _Unusable as error:
            refused[model.name] = shown(str(error), _LONGEST)
    aliases = {alias: name for alias, name in library.names.every_name().items() if name in specs}
    return OwnedModels(specs, refused, aliases)


class _Unusable(Exception):
    """Why a model cannot be used, as a sentence."""


@dataclass(frozen=True, slots=True)
class _Builder:
    """Makes specs; `models` are all files, among which missing parts are found."""

    models: Sequence[LibraryModel]
    models_dir: Path

    def spec(self, model: LibraryModel) -> ModelSpec:
        identity = model.identity
        if model.faults:
            raise _Unusable(" ".join(model.faults))
        self._check(model)
        flux = identity.family == "flux"
        spec = (_DEV if identity.variant == "dev" else _SCHNELL) if flux else _SDXL
        folder = _within(model, self.models_dir)
        if identity.kind is Kind.PIPELINE and Path(folder).is_absolute():
            raise _Unusable(f"{model.name} is a folder outside the first folder of MODELS_DIR, and is not read there.")
        shown = folder if identity.kind is Kind.PIPELINE else model.file_name
        spec = replace(spec, name=model.name, folder=shown, revision=identity.family)
        if identity.task is ModelTask.INPAINT:
            spec = replace(spec, pipeline_class=_INPAINT_CLASS, control_folder=None)
        if identity.kind is not Kind.PIPELINE:
            spec = replace(spec, checkpoint=self._files(model))
        return _with_owner_values(spec, model)

    def _check(self, model: LibraryModel) -> None:
        """Raise `_Unusable` for what no family here draws."""
        identity, name = model.identity, model.file_name
        if identity.family not in _PARTS:
            families = ", ".join(identity.families) or "an unknown family"
            raise _Unusable(f"{name} is a model of {families}, and models of SDXL and FLUX.1 are drawn here.")
        inpaints = identity.family == "sdxl" and identity.task is ModelTask.INPAINT
        if identity.task is not ModelTask.NORMAL and not inpaints:
            raise _Unusable(f"{name} is a {identity.family} model for {identity.task}, which is not drawn here.")
        if identity.variant not in ("", "schnell", "dev"):
            raise _Unusable(f"{name} is {identity.variant}, which is not drawn here.")
        if identity.kind is not Kind.PIPELINE and identity.layout != "original":
            raise _Unusable(
                f"{name} has the tensor names of {identity.layout}; put it into its folder of a diffusers model, or "
                "take the file with the original names."
            )

    def _files(self, model: LibraryModel) -> CheckpointFiles:
        """The file of each part. Raises `_Unusable` naming the parts that are nowhere."""
        identity, values = model.identity, model.spec.values
        chosen = {VAE: values.get("vae")}
        parts = [("denoiser", _within(model, self.models_dir))]
        missing = []
        for part in _PARTS[identity.family]:
            if (wanted := chosen.get(part)) is not None:
                parts.append((part, _within(self._named(model, str(wanted)), self.models_dir)))
            elif part not in identity.parts:
                other = next((file for file in self.models if self._holds(file, part, identity.family)), None)
                missing += [] if other else [_SHOWN[part]]
                parts += [(part, _within(other, self.models_dir))] if other else []
        if missing:
            raise _Unusable(f"{model.file_name} lacks {' and '.join(missing)}; put the file into MODELS_DIR.")
        prediction = str(values.get("prediction_type", identity.prediction))
        zero_snr = bool(values.get("zero_snr", identity.zero_snr))
        tokenizer = self._tokenizer(model, dict(parts)) if identity.family == "flux" else ""
        return CheckpointFiles(identity.family, tuple(parts), tokenizer, prediction, zero_snr)

    def _named(self, model: LibraryModel, name: str) -> LibraryModel:
        found = next(
            (file for file in self.models if file.role == Kind.VAE and name in (file.name, file.file_name)), None
        )
        if found is None:
            raise _Unusable(f"The spec of {model.name} names the VAE {name!r}, which is not in MODELS_DIR.")
        return found

    def _holds(self, file: LibraryModel, part: str, family: str) -> bool:
        """Whether a file can give a model of `family` this part: the part alone, or a checkpoint of the family."""
        identity = file.identity
        if file.faults or not file.found.ending:
            return False
        if identity.kind is Kind.CHECKPOINT:
            return identity.family == family and part in identity.parts
        if part == VAE:
            return identity.kind is Kind.VAE and family in identity.families and identity.layout == "original"
        alone = {CLIP_L: "clip-l", CLIP_G: "clip-g", T5: "t5-xxl"}[part]
        return identity.kind is Kind.TEXT_ENCODER and identity.variant == alone

    def _tokenizer(self, model: LibraryModel, parts: Mapping[str, str]) -> str:
        """The place of T5's tokenizer: a folder, or the GGUF file of its encoder."""
        encoder = parts.get(T5, "")
        try:
            if encoder.endswith(GGUF) and holds_t5_tokenizer(self.models_dir / encoder):
                return encoder
        except UnreadableModel as error:
            raise _Unusable(f"{Path(encoder).name} {error}.") from error
        siblings = [_within(file, self.models_dir) + "/tokenizer_2" for file in self.models if not file.found.ending]
        for place in (TOKENIZER, *sorted(siblings)):
            if any((self.models_dir / place / name).is_file() for name in ("tokenizer.json", "spiece.model")):
                return place
        raise _Unusable(
            f"{model.file_name} lacks T5's tokenizer: put tokenizer.json of FLUX.1's folder tokenizer_2 into the "
            f"folder {TOKENIZER} in MODELS_DIR."
        )


def _with_owner_values(spec: ModelSpec, model: LibraryModel) -> ModelSpec:
    """The spec with the values of the owner's file, as far as a spec has them."""
    values: Mapping[str, Any] = model.spec.values
    files = spec.checkpoint
    zero_snr = files is not None and files.zero_snr
    changes: dict[str, Any] = {"guidance_rescale": values.get("guidance_rescale", _RESCALE if zero_snr else 0.0)}
    if "steps" in values:
        changes["default_steps"] = values["steps"]
    if "guidance" in values and spec.takes_guidance:
        changes["default_guidance"] = values["guidance"]
    if "native_size" in values:
        width, height = values["native_size"]
        changes["native_pixels"] = width * height
    if (scheduler := values.get("scheduler")) is not None:
        if scheduler not in spec.schedulers:
            names = ", ".join(spec.schedulers)
            raise _Unusable(f"The spec of {model.name} names the scheduler {scheduler!r}; there are {names}.")
        changes["default_scheduler"] = scheduler
    # Everything beside the files that decides the pixels is part of the revision.
    suffixes = (files.prediction if files else "", "zsnr" if zero_snr else "")
    rescale = f"rescale{changes['guidance_rescale']:g}" if changes["guidance_rescale"] else ""
    revision = "+".join(filter(None, (spec.revision, *suffixes, rescale)))
    return replace(spec, **changes, revision=revision)


def _within(model: LibraryModel, models_dir: Path) -> str:
    """A path within the folder that models are loaded from; the whole path of a file in another folder."""
    inside = model.path.is_relative_to(models_dir)
    return model.path.relative_to(models_dir).as_posix() if inside else str(model.path.absolute())
