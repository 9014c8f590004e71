"""An order becomes a plan: all that can be decided before its pictures are seen. Pure but for `seed=random`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from secrets import randbelow
from typing import TypeVar
from uuid import NAMESPACE_OID, uuid5

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.ownership import Ownership
from stable_diffusion_server.generation.prompts import BUILTIN_STOP_WORDS, StopWords, clean_prompt
from stable_diffusion_server.pipelines import MODELS, ModelSpec, scheduler_of, spec_of, steps_skipped
from stable_diffusion_server.storage import object_key
from stable_diffusion_server.types import (
    SEED_MAX,
    Fill,
    Fit,
    Format,
    GenerationRequest,
    ImageInput,
    RequestWarning,
    digest,
)

T = TypeVar("T")

DEFAULT_QUALITY = 85
_EXTENSIONS = {"webp": Format.WEBP, "png": Format.PNG, "jpg": Format.JPEG, "jpeg": Format.JPEG}
# Names that would promise a file this server does not make.
_OTHER_IMAGE_EXTENSIONS = frozenset("gif svg bmp tif tiff avif heic heif jxl ico pdf psd jp2 ppm tga".split())


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What the service was set up with. `embed_metadata` is full, digest or none.

    `bumpy_redraws` is how often a picture that is too bumpy is drawn again, `None` what the model's facts say.
    `models` are the facts of the models that draw here, by name; the default one is among them, or another is. `loras`
    are the adapters that can be used, each with the digest of its present content; to look one up may read its file,
    and raises `InvalidInput` with the reason when it cannot be used. `unusable`
    are models that were asked for and cannot be loaded, by name.
    """

    limits: RequestLimits
    default_model: str
    bucket_path: str
    embed_metadata: str = "full"
    bumpy_redraws: int | None = None
    models: Mapping[str, ModelSpec] = field(default_factory=lambda: MODELS)
    loras: Callable[[], Mapping[str, str]] = dict
    ownership: Ownership = field(default_factory=Ownership)
    stop_words: StopWords = BUILTIN_STOP_WORDS
    unusable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ResolvedParameters:
    """What an order says beside its pictures, with every default filled in."""

    spec: ModelSpec
    prompt: str
    negative_prompt: str | None
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    strength: float
    canny: bool
    control_scale: float
    warnings: tuple[RequestWarning, ...]


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """An order with everything decided that can be decided before its pictures are seen.

    Three digests tell it from others: `content` is the identity of the picture, `asked` that of the order with its
    seed left as asked, and `sent` the same with the addresses of remote pictures in the place of their bytes.
    `pictures` are the SHA-256 of the files it comes with, once they are there, `lora_digests` those of its adapters.
    """

    request: GenerationRequest
    parameters: ResolvedParameters
    seed: int
    file_format: Format
    quality: int
    key: str
    content_digest: str
    request_digest: str
    sent_digest: str
    source_digests: Mapping[str, str | None]
    lora_digests: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """What exactly is to be stored under the key: orders of one tag share one effort."""
        return f"{self.content_digest}/{self.file}/{self.request.overwrite}/{self.request.alone}"

    @property
    def file(self) -> str:
        """What kind of file the picture is stored as."""
        return f"{self.file_format}/{self.quality}"

    @property
    def key_is_known(self) -> bool:
        """Whether the key was known before any picture was fetched."""
        return self.request.save_path is not None and not self.request.named_by_content

    def matches(self, record: Mapping[str, str]) -> bool:
        """Whether the object with this record was made from this order, or came to the same picture."""
        known = {("sent", self.sent_digest), ("order", self.request_digest), ("digest", self.content_digest)}
        return record.get("file") == self.file and bool(known & set(record.items()))


def resolve_request(
    order: GenerationRequest, options: GenerationOptions, fetched: Mapping[str, bytes] | None = None
) -> ResolvedRequest:
    """Decide what an order leaves open. Pure but for `seed=random`. Raises `InvalidInput`.

    `fetched` are the bytes of its remote pictures by field. Without them the addresses stand for the pictures, and
    only `sent`, and the key if `key_is_known`, are what they will be.
    """
    options.limits.check(order)
    words = _read_words(order, options)
    addresses = {source.parameter: source.url for source in order.sources if source.url is not None}
    sent_pictures = _identities(order, addresses)
    pictures = _identities(order, fetched) if fetched else sent_pictures
    adapters = _adapters(order, options)
    facts = _facts_told(order, words, adapters, options.stop_words)
    seed_asked = {"seed": order.seed, **({"variation": order.variation} if order.variation else {})}
    asked = digest({**facts, **pictures, **seed_asked})
    seed = _seed(order, asked)
    content = digest({**facts, **pictures, "seed": seed})
    file_format = _file_format(order)
    # PNG loses nothing at any quality, so it has none to tell two files apart by.
    quality = 100 if file_format is Format.PNG else _given(order.quality, DEFAULT_QUALITY)
    conceal = options.ownership.conceal
    told = conceal(digest({"content": content, "format": file_format, "quality": quality}), order)
    made = f"{order.folder}{told[:32]}.{file_format}"
    return ResolvedRequest(
        request=order,
        parameters=words,
        seed=seed,
        file_format=file_format,
        quality=quality,
        key=object_key(
            options.bucket_path,
            made if order.save_path is None else _name(order, conceal(f"{asked}/{file_format}/{quality}", order)),
        ),
        content_digest=content,
        request_digest=asked,
        sent_digest=digest({**facts, **sent_pictures, **seed_asked}),
        source_digests=pictures,
        lora_digests=tuple(digest for _, _, digest in adapters),
    )


def spec_for(order: GenerationRequest, options: GenerationOptions) -> ModelSpec:
    """The facts of the model that draws an order; another than the default one only where that was never asked for.

    Raises `InvalidInput` for one that is not here, `ModelLoadError` for one whose files cannot be used.
    """
    wanted = order.model or options.default_model
    if wanted in options.unusable:
        raise ModelLoadError(f"The files of {wanted} cannot be used; /readyz and the server's log say why.")
    if order.model is None and wanted not in options.models:
        wanted = next(iter(options.models))
    return spec_of(wanted, options.models)


def _read_words(order: GenerationRequest, options: GenerationOptions) -> ResolvedParameters:
    facts = spec_for(order, options)
    warnings = []
    negative = _cleaned(order.negative_prompt or "", "negative_prompt") or None
    if negative and not facts.takes_negative_prompt:
        negative = None
        warnings.append(RequestWarning("negative-prompt-ignored", f"{facts.name} has no use for a negative prompt."))
    guidance = _given(order.guidance_scale, facts.default_guidance) + 0.0  # -0.0 is 0.0
    if negative and guidance <= 1:
        negative = None
        warnings.append(
            RequestWarning("negative-prompt-ignored", "A negative prompt has a use only with guidance above 1.")
        )
    if guidance != facts.default_guidance and not facts.takes_guidance:
        guidance = facts.default_guidance
        warnings.append(RequestWarning("guidance-ignored", f"{facts.name} was distilled to draw without guidance."))
    prompt = _cleaned(order.prompt, "prompt")
    if not prompt:
        raise InvalidInput("prompt is empty.", field="prompt")
    if order.canny and facts.control_folder is None:
        raise InvalidInput(f"{facts.name} has no ControlNet to follow edges with.", field="canny")
    follows = facts.control_folder is not None if order.canny is None else order.canny
    if order.canny is None and not follows:
        warnings.append(
            RequestWarning("canny-unavailable", f"{facts.name} has no ControlNet; the edges are not followed.")
        )
    words = ResolvedParameters(
        spec=facts,
        prompt=prompt,
        negative_prompt=negative,
        num_inference_steps=_given(order.num_inference_steps, facts.default_steps),
        guidance_scale=guidance,
        scheduler=_given(order.scheduler, facts.default_scheduler),
        strength=_given(order.strength, 1.0),
        canny=follows,
        control_scale=_given(order.control_scale, facts.control_scale),
        warnings=tuple(warnings),
    )
    scheduler_of(facts, words.scheduler, words.num_inference_steps)
    steps_skipped(facts, words.num_inference_steps, words.strength)  # refuses a strength that leaves no step
    if order.canny_low > order.canny_high:
        sentence = "canny_low must not be above canny_high."
        raise InvalidInput.from_faults([("canny_low", sentence), ("canny_high", sentence)])
    return words


def _adapters(order: GenerationRequest, options: GenerationOptions) -> list[tuple[str, float, str]]:
    """The order's adapters: name, weight, and which weights these are. Raises `InvalidInput` for unknown ones."""
    if not order.loras:
        return []
    there = options.loras()
    digests = {}
    for name, _ in order.loras:
        try:
            digests[name] = there[name]
        except KeyError as error:
            names = sorted(there)
            if not names:
                raise InvalidInput("No adapters are offered here.", field="lora") from error
            raise InvalidInput(
                f"{name!r} is not an adapter here; there are {', '.join(names)}.", field="lora"
            ) from error
    return [(name, weight, digests[name]) for name, weight in order.loras]


def _facts_told(
    order: GenerationRequest, words: ResolvedParameters, adapters: list[tuple[str, float, str]], stop_words: StopWords
) -> dict[str, object]:
    """All that makes this picture this one, but its seed and the pictures it comes from."""
    return {
        "task": order.task,
        "model": words.spec.name,
        "revision": words.spec.revision_for(edges=words.canny),
        "prompt": words.prompt,
        "negative_prompt": words.negative_prompt,
        "size": (order.width, order.height),
        "num_inference_steps": words.num_inference_steps,
        "guidance_scale": words.guidance_scale,
        "scheduler": words.scheduler,
        "strength": words.strength,
        "refine": order.refine,
        "loras": adapters,
        "feather": order.feather,
        "control": (words.control_scale, order.canny_low, order.canny_high) if words.canny else None,
        # Told only where they differ from what was always so: a digest outlives the version that made it.
        **({"fit": order.fit} if order.image is not None and order.width is not None and order.fit != Fit.CROP else {}),
        **({"fill": order.fill} if order.fill is not Fill.ORIGINAL else {}),
        **({"only_masked": order.only_masked} if order.only_masked is not None else {}),
        **({"by": "transparency"} if order.mask is not None and order.mask.transparency else {}),
        **({"stop_words": stop_words.identity} if stop_words.identity else {}),
        **({"mask_inverted": True} if order.mask is not None and order.mask.inverted else {}),
    }


def _identities(order: GenerationRequest, given: Mapping[str, str | bytes]) -> dict[str, str | None]:
    """What tells the order's pictures from others: the digest of their bytes, or an address standing for them."""

    def identity(source: ImageInput | None) -> str | None:
        if source is None:
            return None
        known = source.data if source.data is not None else given[source.parameter]
        return hashlib.sha256(known).hexdigest() if isinstance(known, bytes) else known

    return {"image": identity(order.image), "mask": identity(order.mask)}


def _seed(order: GenerationRequest, asked: str) -> int:
    """The seed asked for, one from the order's digest, so that equal orders are equal pictures, or a new one."""
    if order.seed == "random":
        return randbelow(SEED_MAX + 1)
    return int(asked[:8], 16) if order.seed is None else (order.seed + order.variation) % (SEED_MAX + 1)


def _name(order: GenerationRequest, asked: str) -> str:
    """The name asked for; if it is to tell the content, with eight digits of a name-based UUID before the file name."""
    name = order.save_path or ""
    if not order.named_by_content or not name:
        return name
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{str(uuid5(NAMESPACE_OID, asked))[:8]}-{file}" if file else name


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _cleaned(text: str, field: str) -> str:
    try:
        return clean_prompt(text)
    except ValueError as error:
        raise InvalidInput(f"{field} {error}.", field=field) from error


def _file_format(order: GenerationRequest) -> Format:
    """The format asked for, else the one the name's ending promises, else WebP. A contradiction is refused."""
    name = (order.save_path or "").rsplit("/", 1)[-1]
    ending = name.rsplit(".", 1)[1].lower() if "." in name else ""
    if ending in _OTHER_IMAGE_EXTENSIONS:
        raise InvalidInput(f"save_path ends in .{ending}; there are .webp, .png and .jpg.", field="save_path")
    promised = _EXTENSIONS.get(ending)
    if order.format and promised and order.format is not promised:
        raise InvalidInput(f"format is {order.format}, and save_path ends in .{ending}.", field="format")
    return order.format or promised or Format.WEBP
