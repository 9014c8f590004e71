"""What is written down of a picture: inside its file, with its object, and in the history. Pure but for the clock."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import fields

from stable_diffusion_server.generation.layout import ImageLayout
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.storage import IMMUTABLE, HistoryEntry
from stable_diffusion_server.types import DiffusionRequest, diffusion_request_fields

# What of an order is not told to have it drawn again: its pictures, and what only concerns where it is stored and when.
NOT_RECORDED = frozenset(
    "image mask save_path named_by_content folder overwrite timeout alone webhook_url named_for".split()
)
# The codes of warnings that only drawing can tell, kept with the object for those who find it there.
RECORDED_WARNINGS = {
    "prompt-shortened": "The prompt was shortened; the picture says to what.",
    "redecoded": "The decoder overflowed and ran again in full precision.",
    "redrawn-not-finite": "The numbers were not finite; it was drawn with another seed.",
    "redrawn-black": "The picture was black; it was drawn once more with another seed.",
    "redrawn-bumpy": "The picture was too bumpy; it was drawn again, the best is kept.",
    "black": "The picture is black.",
    "bumpy": "The picture has much black, much white and uneven greys.",
}


def build_record(
    plan: ResolvedRequest, scene: ImageLayout, judged: CheckedImage[DecodedPixels], codes: Iterable[str], size: int
) -> dict[str, str]:
    """What the object's metadata keeps: short and ASCII, since S3 allows 2 KB of it. `size` in bytes of the file."""
    job = judged.request
    told = ",".join(code for code in codes if code in RECORDED_WARNINGS)
    return {
        "digest": plan.content_digest,
        "order": plan.request_digest,
        "sent": plan.sent_digest,
        "task": job.task,
        "model": job.model,
        "revision": job.revision,
        "seed": str(job.seed),
        "width": str(scene.width),
        "height": str(scene.height),
        "steps": str(job.num_inference_steps),
        "guidance": repr(float(job.guidance_scale)),
        "scheduler": job.scheduler,
        "file": plan.file,
        "bytes": str(size),
        "batched": "1" if judged.batched else "0",
        **({"warned": told} if told else {}),
        **({IMMUTABLE: "1"} if plan.request.save_path is None else {}),
    }


def embedded_metadata(
    plan: ResolvedRequest, scene: ImageLayout, judged: CheckedImage[DecodedPixels]
) -> dict[str, object]:
    """What the file itself tells, as JSON can hold it: how it was drawn, and what to ask to have it drawn again.

    `asked` is the order; `sources` the SHA-256 of the files it was made from, `transparency` how its mask was meant.
    """
    return {
        **diffusion_request_fields(judged.request),
        "width": scene.width,
        "height": scene.height,
        "digest": plan.content_digest,
        "batched": judged.batched,
        "asked": requested_fields(plan),
        "sources": {name: digest for name, digest in plan.source_digests.items() if digest is not None},
        **({"transparency": True} if plan.request.mask is not None and plan.request.mask.transparency else {}),
    }


def requested_fields(plan: ResolvedRequest) -> dict[str, object]:
    """The order itself, as JSON can hold it, with every default and the seed filled in, and without its pictures."""
    order, words = plan.request, plan.parameters
    decided = {
        "prompt": words.prompt,
        "model": words.spec.name,
        "negative_prompt": words.negative_prompt,
        "seed": plan.seed,
        "variation": 0,
        "num_inference_steps": words.num_inference_steps,
        "guidance_scale": words.guidance_scale,
        "scheduler": words.scheduler,
        "strength": words.strength,
        "canny": words.canny,
        "control_scale": words.control_scale,
        "format": plan.file_format,
        "quality": plan.quality,
    }
    asked = {part.name: getattr(order, part.name) for part in fields(order) if part.name not in NOT_RECORDED}
    return {name: decided.get(name, value) for name, value in asked.items()}


def history_entry(
    key: str, caller: str, plan: ResolvedRequest, job: DiffusionRequest, inscription: dict[str, object]
) -> HistoryEntry:
    """What the history keeps of a picture that was just drawn and stored."""
    return HistoryEntry(
        key=key,
        digest=plan.content_digest,
        prompt=plan.parameters.prompt,
        model=job.model,
        task=job.task,
        seed=job.seed,
        width=int(str(inscription["width"])),
        height=int(str(inscription["height"])),
        caller=caller,
        drawn_at=time.time(),
        record=inscription,
    )
