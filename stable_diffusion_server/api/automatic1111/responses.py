"""What AUTOMATIC1111's API answers, in its shapes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from stable_diffusion_server.api.automatic1111.name_mapping import SAMPLERS, samplers_of, title_of
from stable_diffusion_server.api.automatic1111.progress import TrackedTask
from stable_diffusion_server.api.automatic1111.protocol import ParsedTask, Txt2Img
from stable_diffusion_server.api.base64_images import text_of
from stable_diffusion_server.api.dialect_context import DialectContext
from stable_diffusion_server.imaging import parameters_text, read_parameters_text, read_record
from stable_diffusion_server.parsing import dumps
from stable_diffusion_server.types import GenerationRequest, GenerationResult

_LONG_FIELDS = ("init_images", "mask", "alwayson_scripts")

Made = tuple[GenerationRequest, GenerationResult, str, bytes]


def pictures_answer(asked: Txt2Img, what: ParsedTask, made: Sequence[Made], *, interrupted: bool) -> dict[str, Any]:
    """Pictures in base64 with the parameters and, as JSON in a text, how they were made and what was not honoured."""
    shown = asked.send_images is not False
    parameters = asked.model_dump(exclude=set(_LONG_FIELDS))
    return {
        "images": [text_of(file) for _, _, _, file in made] if shown else [],
        "parameters": {name[:100]: value for name, value in parameters.items()},
        "info": dumps(_info(what, made, interrupted=interrupted)),
    }


def progress_answer(tasks: Sequence[TrackedTask], preview: str | None) -> dict[str, Any]:
    """How far a caller's oldest task is; nothing is 0 of 0. `preview` is a PNG in base64."""
    task = tasks[0] if tasks else None
    picture = task.current if task else None
    return {
        "progress": round(min(task.share, 0.99), 4) if task else 0.0,
        "eta_relative": round(task.eta_seconds or 0.0, 2) if task else 0.0,
        "state": {
            "skipped": False,
            "interrupted": bool(task and task.interrupted),
            "stopping_generation": False,
            "job": task.name if task else "",
            "job_count": len(task.pictures) if task else 0,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(task.began)) if task else "0",
            "job_no": sum(one.done for one in task.pictures) if task else 0,
            "sampling_step": picture.step if picture else 0,
            "sampling_steps": picture.steps if picture else 0,
        },
        "current_image": preview,
        "textinfo": None if task is None else "Drawing" if picture and picture.started else "Waiting",
    }


def internal_progress_answer(task: TrackedTask | None, preview: str | None) -> dict[str, Any]:
    """The same for one task by its id, as AUTOMATIC1111's own page asks for it."""
    started = bool(task and any(one.started for one in task.pictures))
    return {
        "active": started,
        "queued": task is not None and not started,
        "completed": task is None,
        "progress": round(task.share, 4) if task else None,
        "eta": task.eta_seconds if task else None,
        "live_preview": None if preview is None else f"data:image/png;base64,{preview}",
        "id_live_preview": task.current.step if task else -1,
        "textinfo": None,
    }


def models_answer(house: DialectContext) -> list[dict[str, Any]]:
    """The models."""
    return [
        {
            "title": title_of(facts),
            "model_name": facts.name,
            "hash": facts.revision,
            "sha256": None,
            "filename": facts.folder,
            "config": None,
        }
        for facts in house.models.values()
    ]


def samplers_answer(house: DialectContext) -> list[dict[str, Any]]:
    """The samplers that are drawn as what they are."""
    return [{"name": name, "aliases": [SAMPLERS[name][0]], "options": {}} for name in samplers_of(house.models)]


def loras_answer(house: DialectContext) -> list[dict[str, Any]]:
    """The adapters."""
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in sorted(house.loras())]


def options_answer(house: DialectContext, model: str | None) -> dict[str, Any]:
    """The options that mean something here."""
    return {
        "sd_model_checkpoint": title_of(house.facts(model)),
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
        "sd_vae": "Automatic",
    }


def png_info_answer(file: bytes) -> dict[str, Any]:
    """How a picture says it was made: by the record of this server, or the text AUTOMATIC1111 writes into PNG."""
    record = read_record(file)
    text = parameters_text(record) if record is not None else read_parameters_text(file)
    items = {"parameters": text, **({"record": dumps(record)} if record is not None else {})}
    return {"info": text, "items": items if text else {}, "parameters": _read(text)}


def _info(what: ParsedTask, made: Sequence[Made], *, interrupted: bool) -> dict[str, Any]:
    order = what.orders[0]
    receipts = [receipt for _, receipt, _, _ in made]
    seeds = [receipt.seed for receipt in receipts]
    texts = [_infotext(order, receipt) for order, receipt, _, _ in made]
    warnings = list(dict.fromkeys(warning.message for receipt in receipts for warning in receipt.warnings))
    first = receipts[0] if receipts else None
    return {
        "prompt": order.prompt,
        "all_prompts": [order.prompt] * len(made),
        "negative_prompt": order.negative_prompt or "",
        "all_negative_prompts": [order.negative_prompt or ""] * len(made),
        "seed": seeds[0] if seeds else order.seed,
        "all_seeds": seeds,
        "width": first.width if first else order.width,
        "height": first.height if first else order.height,
        "sampler_name": first.scheduler if first else order.scheduler,
        "cfg_scale": first.guidance_scale if first else order.guidance_scale,
        "steps": first.num_inference_steps if first else order.num_inference_steps,
        "batch_size": len(made),
        "denoising_strength": order.strength,
        "sd_model_name": first.model if first else order.model,
        "infotexts": texts,
        "paths": [url for _, _, url, _ in made],
        "keys": [receipt.key for receipt in receipts],
        "cached": [receipt.cached for receipt in receipts],
        "interrupted": interrupted,
        "not_honoured": what.told,
        "warnings": warnings,
    }


def _infotext(order: GenerationRequest, receipt: GenerationResult) -> str:
    told: Mapping[str, object] = {
        "prompt": receipt.prompt_used or order.prompt,
        "negative_prompt": order.negative_prompt,
        "num_inference_steps": receipt.num_inference_steps,
        "scheduler": receipt.scheduler,
        "guidance_scale": receipt.guidance_scale,
        "seed": receipt.seed,
        "model": receipt.model,
        "width": receipt.width,
        "height": receipt.height,
    }
    return parameters_text({name: value for name, value in told.items() if value is not None})


def _read(text: str) -> dict[str, str]:
    """The last line of the text as pairs, and the prompts."""
    if not text:
        return {}
    *words, facts = text.split("\n") if "\n" in text else ("", text)
    pairs = dict(part.partition(": ")[::2] for part in facts.split(", ") if ": " in part)
    negative = next((line for line in words if line.startswith("Negative prompt: ")), "")
    prompt = "\n".join(line for line in words if line != negative)
    return {"Prompt": prompt, "Negative prompt": negative.removeprefix("Negative prompt: "), **pairs}
