"""The models of this process: their specs before and after loading, what is in memory, what cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from stable_diffusion_server.app.key_callers import unknown_models_of_keys
from stable_diffusion_server.app.known_revisions import KnownRevisions
from stable_diffusion_server.app.model_choice import check_model_names, choose_from_folder, folders_of
from stable_diffusion_server.engine import Denoiser
from stable_diffusion_server.errors import ModelLoadError, NotReady
from stable_diffusion_server.generation import DecodedPixels, permitted_models
from stable_diffusion_server.pipelines import (
    CLIP_G,
    CLIP_L,
    MODELS,
    REAL_MODELS,
    ControlNetFolder,
    Embedding,
    EmbeddingFolder,
    EmbeddingList,
    ImagePromptFolder,
    LoraFolder,
    ModelSpec,
    ModelTable,
    with_lcm,
    with_quantization,
    without_identity,
)
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import Caller, Task

# What `residency` says of a model that is not in memory.
UNLOADED, LOADING = "unloaded", "loading"
# Widths of the CLIPs of SD 1.5 and of SDXL.
_ONE_CLIP = {CLIP_L: 768}
_TWO_CLIPS = {CLIP_L: 768, CLIP_G: 1280}


class ModelBackend(Denoiser[Any, DecodedPixels], Protocol):
    """A denoiser that also counts the tokens of a prompt."""

    def count_tokens(self, model: str, prompt: str) -> int:
        """Return the number of tokens of a prompt for a model. Thread-safe."""


@dataclass(slots=True)
class ModelState:
    """The models: their specs before they are loaded, the backend afterwards.

    `facts` holds the specs of the configured models (`asked`); loading replaces them by specs with the revision of the
    files. `unusable` maps models that could not be loaded to the reason. `fault` is the reason if no model can be
    loaded, `default_model` is for requests that name no model, `progress` returns the state of a download as a text,
    `loras`, `embeddings`, `image_prompts`, `controlnets` are the folders of those, `most_references` is MAX_REFERENCES,
    `notes` are remarks on the files in MODELS_DIR. `revisions` remembers what loading decided.
    """

    facts: ModelTable[ModelSpec]
    fault: ModelLoadError | None = None
    default_model: str = next(iter(MODELS))
    asked: Mapping[str, ModelSpec] = field(default_factory=dict)
    models: ModelBackend | None = None
    unusable: dict[str, str] = field(default_factory=dict)
    progress: Callable[[], str] = str
    loras: LoraFolder = field(default_factory=lambda: LoraFolder(None))
    embeddings: EmbeddingFolder = field(default_factory=lambda: EmbeddingFolder(None))
    image_prompts: ImagePromptFolder = field(default_factory=ImagePromptFolder)
    controlnets: ControlNetFolder | None = None
    most_references: int = 4
    notes: tuple[str, ...] = ()
    revisions: KnownRevisions | None = None

    @classmethod
    def of(cls, settings: Settings) -> ModelState:
        """Choose the models by the settings and by the files in MODELS_DIR. Raises `SettingsError`."""
        default, folders = settings.text_to_image_model, folders_of(settings)
        try:
            chosen, refused, notes = choose_from_folder(settings)
        except ModelLoadError as error:
            check_model_names(settings, MODELS)
            return cls(ModelTable(MODELS), error, default, **folders)
        check_model_names(settings, {*chosen, *chosen.aliases, *refused})
        notes = (*notes, *unknown_models_of_keys(settings, chosen))
        lcm = with_lcm if settings.load_lcm_lora else lambda facts: facts
        asked = {
            name: with_quantization(lcm(facts), facts.quantize or settings.quantize) for name, facts in chosen.items()
        }
        unread = ModelTable({name: without_identity(facts) for name, facts in asked.items()}, chosen.aliases)
        return cls(
            unread,
            default_model=default,
            asked=asked,
            unusable=dict(refused),
            **folders,
            most_references=settings.max_references,
            notes=notes,
            revisions=KnownRevisions(settings),
        )

    @property
    def default(self) -> ModelSpec:
        """The model of requests that name none: if there is not that of the setting, the first that draws from text."""
        every = self.facts.values()
        from_text = (facts for facts in every if Task.TEXT_TO_IMAGE in facts.tasks)
        return self.facts.get(self.default_model) or next(from_text, None) or next(iter(every))

    def shares(self, settings: Settings) -> dict[str, float | None]:
        """Return the shares in MODEL_SHARES of the models that are here, by their own names."""
        return {self.facts[name].name: share for name, share in settings.shares().items() if name in self.facts}

    def in_order(self, settings: Settings) -> dict[str, ModelSpec]:
        """Return the models in the order in which they are placed: those of MODEL_SHARES, the default, the others."""
        first = [*self.shares(settings), self.default.name]
        return {name: self.asked[name] for name in dict.fromkeys([*first, *self.asked]) if name in self.asked}

    @property
    def on_demand(self) -> frozenset[str]:
        """The models that are loaded when a request needs them.

        At the start are loaded: the catalogue's models under their own names, the default, and what its owner wants.
        """
        return frozenset(
            name for name, facts in self.asked.items() if name not in REAL_MODELS and not facts.preload
        ) - {self.default.name}

    def started(self, loaded: Mapping[str, ModelSpec], faults: Mapping[str, str]) -> None:
        """Record what was loaded at the start, and why other models could not be; the rest waits for its first use."""
        aliases = self.facts.aliases.items()
        self.unusable.update(faults)
        self.unusable.update((alias, faults[name]) for alias, name in aliases if name in faults)
        self.facts.drop(faults)
        waiting = {name: self._waiting(facts) for name, facts in self.facts.items() if name not in loaded}
        self.facts.put({**waiting, **loaded})

    def loaded(self, spec: ModelSpec) -> None:
        """Record the spec of a model that was loaded on demand; called on the engine's thread."""
        self.facts.put({spec.name: spec})
        self.unusable.pop(spec.name, None)
        if self.revisions is not None and spec.name in self.asked:
            self.revisions.keep(self.asked[spec.name], spec)

    def _waiting(self, facts: ModelSpec) -> ModelSpec:
        """Return the spec of a model that was not loaded yet, with its revision if that is remembered."""
        known = self.revisions.find(self.asked[facts.name]) if self.revisions and facts.name in self.asked else None
        return known or replace(facts, unread=True)

    def failed(self, name: str, why: str) -> None:
        """Record why a model could not be loaded on demand, so that it is not tried again and again."""
        self.unusable[name] = why

    def refresh(self, new: ModelState, changed: Collection[str]) -> None:
        """Take the models of another reading of MODELS_DIR; what did not change keeps its revision."""
        kept = {name: facts for name, facts in self.facts.items() if name in new.facts and name not in changed}
        unread = {name: new._waiting(facts) for name, facts in new.facts.items()}
        self.asked, self.notes = new.asked, new.notes
        self.facts.replace_with(ModelTable({**unread, **kept}, new.facts.aliases))
        self.unusable.clear()
        self.unusable.update(new.unusable)
        replace_specs: Callable[[Mapping[str, ModelSpec]], None] | None = getattr(self.models, "replace_specs", None)
        if replace_specs is not None:
            replace_specs(self.asked)

    def status_of(self, name: str) -> dict[str, object]:
        """Return what `/models` says of a model besides its revision: family, bytes, and where it is."""
        facts = self.facts[name]
        share = self.loading_share(facts.name)
        infos = {model.name: model for model in getattr(self.models, "loaded", ())}
        there = facts.name in infos
        return {
            "family": _family_of(facts),
            "bytes": infos[facts.name].bytes if there else facts.file_bytes,
            "residency": infos[facts.name].residency if there else UNLOADED if share is None else LOADING,
            "loading": None if share is None else round(100 * share),
            "pinned": facts.pinned,
        }

    def may_use(self, caller: Caller, name: str) -> bool:
        """Return whether a caller may use the model of a name."""
        return name in permitted_models(self.facts, caller)

    def count_tokens(self, model: str, prompt: str) -> int:
        """Return the number of tokens of a prompt for a model. Raises `NotReady` until the models are loaded."""
        if self.models is None:
            raise NotReady("The models are loading.", retry_after=5)
        return self.models.count_tokens(model, prompt)

    def describe(self) -> list[dict[str, object]]:
        """Describe each model, the loaded ones first: name, folder, revision, placement, bytes, defaults and LoRAs.

        Reads the folders of LoRAs and embeddings: lists the usable ones, and for the others the reason.
        """
        if self.models is None:
            return []
        usual = self.default.name if self.facts else ""
        loaded = {model.name: _described(model) for model in getattr(self.models, "loaded", ())}
        demanded = getattr(self.models, "on_demand", False)
        embeddings = self.embeddings.list()
        known = {name: self._unloaded(facts) for name, facts in self.facts.items() if demanded and name not in loaded}
        return [
            {
                **facts,
                "usual": name == usual,
                "parts": _parts_of(self.facts[name]),
                **_defaults_of(self.facts[name]),
                "max_references": min(self.facts[name].max_references, self.most_references),
                **self._adapters_of(self.facts[name], embeddings),
            }
            for name, facts in {**loaded, **known}.items()
            if name in self.facts
        ]

    def offered_loras(self) -> Mapping[str, str]:
        """Return the LoRAs that fit a model, with their digests, which are computed at lookup."""
        return self.loras.available({facts.denoiser_part for facts in self.facts.values()})

    def clip_widths(self, name: str) -> Mapping[str, int]:
        """Return the widths that vectors of an embedding need, by CLIP; of a model not loaded those of its family."""
        info = next((model for model in getattr(self.models, "loaded", ()) if model.name == name), None)
        if info is not None:
            return dict(getattr(info, "clip_widths", {}))
        facts = self.facts[name]
        return (_TWO_CLIPS if facts.takes_prompt_2 else _ONE_CLIP) if facts.weighs_prompts else {}

    def listed_embeddings(self, name: str) -> tuple[Mapping[str, Embedding], Mapping[str, Embedding | None]]:
        """Return the embeddings that fit a model, and those that do not: `None` for one that cannot be read."""
        listed = self.embeddings.list()
        fitting = listed.fitting(self.clip_widths(name))
        others: dict[str, Embedding | None] = {**listed.usable, **dict.fromkeys(listed.faults)}
        return fitting, {other: found for other, found in others.items() if other not in fitting}

    def _adapters_of(self, facts: ModelSpec, embeddings: EmbeddingList) -> dict[str, object]:
        return {
            "loras": self.loras.names({facts.denoiser_part}),
            "unusable_loras": list(self.loras.faults().values()),
            "embeddings": tuple(embeddings.fitting(self.clip_widths(facts.name))),
            "unusable_embeddings": list(embeddings.faults.values()),
        }

    def _unloaded(self, facts: ModelSpec) -> dict[str, object]:
        """Describe a model that is not in memory, with the members of a loaded one."""
        why = self.unusable.get(facts.name)
        return {
            "name": facts.name,
            "folder": facts.folder,
            "revision": "" if facts.unread else facts.revision,
            "device": "",
            "dtype": "",
            "residency": LOADING if self.loading_share(facts.name) is not None else UNLOADED,
            "quantization": "",
            "bytes": facts.file_bytes,
            "follows_edges": facts.control_folder is not None,
            "commit": "",
            "remarks": [why] if why else [],
        }

    def loading_share(self, name: str) -> float | None:
        """Return the loaded share (0..1) of a model that is being loaded; otherwise `None`."""
        model, share = getattr(self.models, "loading", None) or ("", 0.0)
        return share if model == name else None

    def missing(self) -> list[str]:
        """Return why the default model could not be loaded; empty if it was loaded, even if other models were not."""
        return [self.unusable[self.default_model]] if self.default_model in self.unusable else []

    def remarks(self) -> list[str]:
        """Return limitations of the loaded models, and why other models could not be loaded, as sentences."""
        remarks = [remark for model in getattr(self.models, "loaded", ()) for remark in model.remarks]
        others = (why for name, why in self.unusable.items() if name != self.default_model)
        return [*dict.fromkeys([*self.notes, *remarks, *others])]

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Return the bytes of memory by device and kind; empty before the models are loaded."""
        read: Callable[[], Mapping[str, Mapping[str, int]]] = getattr(self.models, "memory", dict)
        return read()

    def prompt_caches(self) -> Mapping[str, int]:
        """Return the bytes of cached prompt embeddings by model."""
        read: Callable[[], Mapping[str, int]] = getattr(self.models, "prompt_caches", dict)
        return read()


def _described(model: Any) -> dict[str, object]:
    """Return the facts of a loaded model for `/readyz`."""
    return {name: value for name, value in asdict(model).items() if name != "clip_widths"}


def _family_of(facts: ModelSpec) -> str:
    """Return the name of a model's family, such as `sdxl`; of one drawn by its own pipeline, that of its class."""
    module = facts.family.partition(":")[0].rpartition(".")[2]
    return facts.pipeline_class.removesuffix("Pipeline") if module == "stock" else module.replace("_", "-")


def _parts_of(facts: ModelSpec) -> dict[str, str]:
    """Return where each part of a model without a folder comes from; the last two names of a path outside MODELS_DIR.

    Parts that are not listed are in the denoiser's file.
    """
    files = facts.checkpoint
    if files is None:
        return {}
    places = dict(files.parts) | ({"tokenizer": files.tokenizer} if files.tokenizer else {})
    return {
        part: "/".join(Path(place).parts[-2:]) if place.startswith("/") else place for part, place in places.items()
    }


def _defaults_of(facts: ModelSpec) -> dict[str, object]:
    return {
        "family": _family_of(facts),
        "tasks": sorted(facts.tasks),
        "default_steps": facts.default_steps,
        "default_guidance": facts.default_guidance,
        "native_pixels": facts.native_pixels,
        "takes_negative_prompt": facts.takes_negative_prompt,
        "takes_guidance": facts.takes_guidance,
    }
