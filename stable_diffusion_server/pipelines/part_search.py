"""Finds the files that a model is made of: parts beside its denoiser, what its owner's spec names, T5's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from stable_diffusion_server.pipelines.library import Kind, LibraryModel, ModelTask
from stable_diffusion_server.pipelines.library.gguf_header import GGUF, holds_t5_tokenizer
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.loading.checkpoint_layout import CLIP_G, CLIP_L, COMPONENTS, QWEN3, T5, VAE
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles
from stable_diffusion_server.pipelines.owner_values import Unusable

# Folders in MODELS_DIR for the tokenizers of T5 and Qwen3, where no model brings them.
TOKENIZER, QWEN3_TOKENIZER = "t5-tokenizer", "qwen3-tokenizer"
PARTS = {
    "sdxl": (VAE, CLIP_L, CLIP_G),
    "sd15": (VAE, CLIP_L),
    "flux": (VAE, CLIP_L, T5),
    "flux2": (VAE, QWEN3),
    "z-image": (VAE, QWEN3),
}
_SHOWN = {
    VAE: "a VAE",
    CLIP_L: "the text encoder CLIP-L (clip_l.safetensors)",
    CLIP_G: "the text encoder CLIP-G (clip_g.safetensors)",
    QWEN3: "the text encoder Qwen3-4B (qwen_3_4b.safetensors)",
    T5: "the text encoder T5 (t5xxl_fp16.safetensors, its fp8 or its GGUF)",
}


@dataclass(frozen=True, slots=True)
class PartFinder:
    """Finds parts among `models`, which are all files; `models_dir` is the folder that models are loaded from."""

    models: Sequence[LibraryModel]
    models_dir: Path

    def files(self, model: LibraryModel) -> CheckpointFiles:
        """The file of each part. Raises `Unusable` naming the parts that are nowhere."""
        identity, values = model.identity, model.spec.values
        chosen = self._chosen(model, values)
        parts = [("denoiser", path_within(model, self.models_dir))]
        missing = []
        for part in PARTS[identity.family]:
            if part in chosen:
                parts.append((part, chosen[part]))
            elif part not in identity.parts:
                place = self._beside(part, identity.family)
                missing += [] if place else [_SHOWN[part]]
                parts += [(part, place)] if place else []
        if missing:
            raise Unusable(f"{model.file_name} lacks {' and '.join(missing)}; put the file into MODELS_DIR.")
        prediction = str(values.get("prediction_type", identity.prediction))
        zero_snr = bool(values.get("zero_snr", identity.zero_snr))
        tokenizer = self._tokenizer(model, dict(parts)) if identity.family == "flux" else ""
        tokenizer = self._qwen3_tokenizer(model) if QWEN3 in PARTS[identity.family] else tokenizer
        return CheckpointFiles(identity.family, tuple(parts), tokenizer, prediction, zero_snr)

    def _chosen(self, model: LibraryModel, values: Mapping[str, Any]) -> dict[str, str]:
        """The files of parts that the owner's spec names."""
        chosen = {VAE: self.path_of(model, values["vae"], Kind.VAE)} if "vae" in values else {}
        for name in values.get("text_encoders", ()):
            file = self._named(model, name, Kind.TEXT_ENCODER)
            family = model.identity.family
            part = next((part for part in PARTS[family][1:] if self._holds(file, part, family)), None)
            if part is None:
                raise Unusable(f"The spec of {model.name} names {name!r}, which is no text encoder of {family}.")
            chosen[part] = path_within(file, self.models_dir)
        return chosen

    def path_of(self, model: LibraryModel, name: str, kind: Kind) -> str:
        """The path of a file that the owner's spec names. Raises `Unusable` if there is none of this kind."""
        return path_within(self._named(model, name, kind), self.models_dir)

    def refiner(self, model: LibraryModel, name: str) -> str:
        """The path of the SDXL refiner that the owner's spec names. Raises `Unusable` for another model."""
        files = (file for file in self.models if file.role == "model" and name in (file.name, file.file_name))
        found = next(files, None)
        if found is None or found.identity.task is not ModelTask.REFINER:
            why = "is not in MODELS_DIR" if found is None else "is no refiner"
            raise Unusable(f"The spec of {model.name} names the refiner {name!r}, which {why}.")
        if found.faults:
            raise Unusable(f"The spec of {model.name} names {name!r}: {' '.join(found.faults)}")
        return path_within(found, self.models_dir)

    def _named(self, model: LibraryModel, name: str, kind: Kind) -> LibraryModel:
        """The file of a kind that the owner's spec names, by its name with or without ending."""
        files = (file for file in self.models if file.role == kind.value)
        found = next((file for file in files if name in (file.name, file.file_name)), None)
        if found is None:
            raise Unusable(f"The spec of {model.name} names the {kind.value} {name!r}, which is not in MODELS_DIR.")
        if found.faults:
            raise Unusable(f"The spec of {model.name} names {name!r}: {' '.join(found.faults)}")
        return found

    def _beside(self, part: str, family: str) -> str:
        """The place of a part that a model of `family` lacks, empty if it is nowhere.

        A file or folder of this part alone comes before diffusers folders of the family, and these before checkpoints;
        within each the first by name.
        """
        usable = [file for file in self.models if not file.faults]
        alone = (path_within(file, self.models_dir) for file in usable if self._holds(file, part, family))
        same = [file for file in usable if file.identity.family == family]
        folders = (
            f"{path_within(file, self.models_dir)}/{COMPONENTS[family][part]}"
            for file in same
            if file.identity.kind is Kind.PIPELINE and (file.path / COMPONENTS[family][part]).is_dir()
        )
        checkpoints = (
            path_within(file, self.models_dir)
            for file in same
            if file.identity.kind is Kind.CHECKPOINT and part in file.identity.parts
        )
        return next(chain(alone, folders, checkpoints), "")

    def _holds(self, file: LibraryModel, part: str, family: str) -> bool:
        """Whether a file or folder is this part alone, as models of `family` have it."""
        identity = file.identity
        if part == VAE:
            return identity.kind is Kind.VAE and family in identity.families
        alone = {CLIP_L: "clip-l", CLIP_G: "clip-g", T5: "t5-xxl", QWEN3: "qwen3-4b"}[part]
        return identity.kind is Kind.TEXT_ENCODER and identity.variant == alone

    def _qwen3_tokenizer(self, model: LibraryModel) -> str:
        """The folder of Qwen3's tokenizer: its own, or that of a diffusers folder of a family that reads Qwen3."""
        folders = (
            f"{path_within(file, self.models_dir)}/tokenizer"
            for file in self.models
            if file.identity.kind is Kind.PIPELINE and QWEN3 in PARTS.get(file.identity.family, ())
        )
        for place in (QWEN3_TOKENIZER, *sorted(folders)):
            if (self.models_dir / place / "tokenizer_config.json").is_file():
                return place
        raise Unusable(
            f"{model.file_name} lacks Qwen3's tokenizer: put the folder tokenizer of FLUX.2-klein-4B or Z-Image-Turbo "
            f"under the name {QWEN3_TOKENIZER} into MODELS_DIR."
        )

    def _tokenizer(self, model: LibraryModel, parts: Mapping[str, str]) -> str:
        """The place of T5's tokenizer: a folder, or the GGUF file of its encoder."""
        encoder = parts.get(T5, "")
        try:
            if encoder.endswith(GGUF) and holds_t5_tokenizer(self.models_dir / encoder):
                return encoder
        except UnreadableModel as error:
            raise Unusable(f"{Path(encoder).name} {error}.") from error
        siblings = [
            path_within(file, self.models_dir) + "/tokenizer_2" for file in self.models if not file.found.ending
        ]
        component = COMPONENTS["flux"][T5]
        own = [f"{encoder.removesuffix(component)}tokenizer_2"] if encoder.endswith(f"/{component}") else []
        for place in (*own, TOKENIZER, *sorted(siblings)):
            if any((self.models_dir / place / name).is_file() for name in ("tokenizer.json", "spiece.model")):
                return place
        raise Unusable(
            f"{model.file_name} lacks T5's tokenizer: put tokenizer.json of FLUX.1's folder tokenizer_2 into the "
            f"folder {TOKENIZER} in MODELS_DIR."
        )


def path_within(model: LibraryModel, models_dir: Path) -> str:
    """A path within the folder that models are loaded from; the whole path of a file in another folder."""
    inside = model.path.is_relative_to(models_dir)
    return model.path.relative_to(models_dir).as_posix() if inside else str(model.path.absolute())
