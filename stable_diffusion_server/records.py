"""What is written down of a picture: inside its file, with its object, and in the history. Pure but for the clock."""

from __future__ import annotations

import time
from collections.abc import Iterable

from stable_diffusion_server.composing import Scene
from stable_diffusion_server.history.entries import Entry
from stable_diffusion_server.judging import DrawnPicture, Judged
from stable_diffusion_server.orders import Job, Task, job_facts
from stable_diffusion_server.presenting import LASTING
from stable_diffusion_server.resolving import Plan

# The codes of warnings that only drawing can tell, kept with the object for those who find it there.
RETOLD = {
    "prompt-shortened": "The prompt was shortened; the picture says to what.",
    "redecoded": "The decoder overflowed and ran again in full precision.",
    "redrawn-not-finite": "The numbers were not finite; it was drawn with another seed.",
    "redrawn-black": "The picture was black; it was drawn once more with another seed.",
    "redrawn-bumpy": "The picture was too bumpy; it was drawn again, the best is kept.",
    "black": "The picture is black.",
    "bumpy": "The picture has much black, much white and uneven greys.",
}


def record_of(
    plan: Plan, scene: Scene, judged: Judged[DrawnPicture], codes: Iterable[str], size: int
) -> dict[str, str]:
    """What the object's metadata keeps: short and ASCII, since S3 allows 2 KB of it. `size` in bytes of the file."""
    job = judged.job
    told = ",".join(code for code in codes if code in RETOLD)
    return {
        "digest": plan.content,
        "order": plan.asked,
        "sent": plan.sent,
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
        **({LASTING: "1"} if plan.order.save_path is None else {}),
    }


def inscription_of(plan: Plan, scene: Scene, judged: Judged[DrawnPicture]) -> dict[str, object]:
    """What the file itself tells, as JSON can hold it: how it was drawn, and what to ask to have it drawn again.

    `asked` are the parameters of a door; `sources` the SHA-256 of the files it was made from.
    """
    return {
        **job_facts(judged.job),
        "width": scene.width,
        "height": scene.height,
        "digest": plan.content,
        "batched": judged.batched,
        "asked": asked_of(plan),
        "sources": {name: digest for name, digest in plan.pictures.items() if digest is not None},
    }


def asked_of(plan: Plan) -> dict[str, object]:
    """The parameters that ask for this picture at its door, with every default and the seed filled in."""
    order, words = plan.order, plan.words
    asked: dict[str, object] = {
        "prompt": words.prompt,
        "model": words.facts.name,
        "negative_prompt": words.negative_prompt,
        "seed": plan.seed,
        "num_inference_steps": words.num_inference_steps,
        "guidance_scale": words.guidance_scale,
        "scheduler": words.scheduler,
        "refine": order.refine,
        "lora": ",".join(f"{name}:{weight:.6f}" for name, weight in order.loras) or None,
        "format": str(plan.file_format),
        "quality": plan.quality,
    }
    if order.task is Task.TEXT_TO_IMAGE:
        return {**asked, "width": order.width, "height": order.height}
    asked["strength"] = words.strength
    if order.task is Task.INPAINT:
        return {**asked, "feather": order.feather}
    edges = {"canny_low": order.canny_low, "canny_high": order.canny_high, "control_scale": words.control_scale}
    return {**asked, "canny": words.canny, **edges}


def entry_of(key: str, caller: str, plan: Plan, job: Job, inscription: dict[str, object]) -> Entry:
    """What the history keeps of a picture that was just drawn and stored."""
    return Entry(
        key=key,
        digest=plan.content,
        prompt=plan.words.prompt,
        model=job.model,
        task=job.task,
        seed=job.seed,
        width=int(str(inscription["width"])),
        height=int(str(inscription["height"])),
        caller=caller,
        drawn_at=time.time(),
        record=inscription,
    )
