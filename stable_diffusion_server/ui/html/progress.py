"""Renders the progress and the results of jobs as HTML, with one sentence for people and screen readers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

Job = Mapping[str, Any]

# Parameter names → labels of the form fields.
_LABELS = {
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "save_path": "Name",
    "negative_prompt": "Not in the picture",
    "image_file": "Picture",
    "mask_file": "Mask",
    "control_scale": "Weight of the edges",
    "canny": "Keep the edges",
    "canny_low": "Weak edges from",
    "canny_high": "Strong edges from",
    "hires_scale": "Enlarge by",
    "hires_upscaler": "Second pass upscaler",
    "hires_strength": "Second pass strength",
    "hires_steps": "Second pass steps",
    "upscaler": "Upscaler",
    "extend_left": "Left",
    "extend_right": "Right",
    "extend_top": "Top",
    "extend_bottom": "Bottom",
    "extend_overlap": "Overlap",
    "mask_mode": "Soft mask",
}


_NUMBERED = re.compile(r"(?P<slot>[a-z_]{1,64})\[(?P<number>[0-9]{1,3})\](?:\.[a-z_]{1,32})?")


def _empty(lead: str, more: str) -> str:
    return f'<div class="sds-message sds-empty"><p class="sds-lead">{lead}</p><p>{more}</p></div>'


# Shown before the first image of each tab, and for empty search results or selections.
EMPTY = _empty("Your pictures appear here.", "Write a prompt, press Enter, and watch it being drawn.")
EMPTY_RESTYLE = _empty("Your pictures appear here.", "Choose a picture, say what it should become, compare the two.")
EMPTY_EDIT = _empty("Your pictures appear here.", "Choose pictures, then say what is to be done with them.")
EMPTY_INPAINT = _empty(
    "Your pictures appear here.", "Choose a picture, paint over a part of it, say what it should be."
)
NONE_CHOSEN = _empty("No picture is chosen.", "Choose one to see how it was made, and to go on from it.")
NOTHING_DRAWN = _empty("Nothing was drawn here yet.", "What you draw is kept here, with how it was made.")
NOTHING_FOUND = _empty("No picture is like this.", "Try fewer words, or every model.")


def sentence(job: Job) -> str:
    """Return the state of a job as a sentence."""
    eta = job.get("eta_seconds")
    about = "" if eta is None else f", about {max(1, round(eta))} s"
    match job["state"]:
        case "queued" if job.get("loading") is not None:
            return f"Loading the model, {job['loading']} %{about} …"
        case "queued":
            before = job.get("position") or 0
            return f"Waiting: {_count(before, 'picture')} before this one{about}." if before else "Waiting its turn …"
        case "running":
            steps = job.get("steps") or 0
            return f"Step {job['step']} of {steps}{about}." if steps else "Preparing …"
        case "done":
            return "Done."
        case "cancelled":
            return "Cancelled."
        case _:
            return str((job.get("problem") or {}).get("detail", "It could not be drawn."))


def summary(jobs: Sequence[Job]) -> str:
    """Return the state of the images of one click as a sentence."""
    if len(jobs) == 1:
        return _outcome(jobs[0])
    ended = [job for job in jobs if job["state"] in ("done", "failed", "cancelled")]
    if len(ended) == len(jobs):
        parts = [(state, sum(job["state"] == state for job in jobs)) for state in ("done", "failed", "cancelled")]
        counts = ", ".join(f"{number} {state}" for state, number in parts if number)
        return f"All {len(jobs)} pictures are done." if parts[0][1] == len(jobs) else f"{counts}."
    current = next((job for job in jobs if job["state"] == "running"), None) or next(
        job for job in jobs if job["state"] == "queued"
    )
    return f"{len(ended)} of {len(jobs)} pictures. {sentence(current)}"


def progress(jobs: Sequence[Job], previews: Mapping[str, str]) -> str:
    """Render a bar, a sentence and the previews."""
    if not jobs:
        return ""
    text = escape(summary(jobs))
    steps = sum(job.get("steps") or 1 for job in jobs)
    made = sum((job.get("steps") or 1) if job["state"] == "done" else (job.get("step") or 0) for job in jobs)
    running = any(job["state"] in ("queued", "running") for job in jobs)
    bar = f'<progress max="{steps}" value="{made}" aria-label="Progress"></progress>' if running else ""
    pictures = "".join(
        f'<img src="data:image/webp;base64,{escape(previews[job["id"]])}" alt="Preview of picture {number}">'
        for number, job in enumerate(jobs, 1)
        if job["state"] == "running" and job["id"] in previews
    )
    faults = "".join(
        f"<li>Picture {number}: {escape(sentence(job))}</li>"
        for number, job in enumerate(jobs, 1)
        if job["state"] == "failed" and len(jobs) > 1
    )
    shown = f'<ul class="sds-faults">{faults}</ul>' if faults else ""
    kind = "alert" if len(jobs) == 1 and jobs[0]["state"] == "failed" else "status"
    previewed = f'<div class="sds-previews">{pictures}</div>' if pictures else ""
    return f'<div class="sds-message sds-{kind}" role="{kind}">{bar}<p>{text}</p>{shown}{previewed}</div>'


def alert(detail: str, faults: Sequence[tuple[str, str]] = ()) -> str:
    """Render an error: one sentence per wrong field, otherwise `detail`."""
    items = "".join(f"<li>{escape(_of_field(name, text))}</li>" for name, text in faults)
    inside = f"<ul>{items}</ul>" if items else f"<p>{escape(detail)}</p>"
    return f'<div class="sds-message sds-alert" role="alert">{inside}</div>'


def _of_field(name: str, text: str) -> str:
    """Replace a parameter name at the start of a sentence by the label of its field."""
    rest = text.removeprefix(name).removeprefix(":").strip()
    return f"{label(name)} {rest}" if rest != text else f"{label(name)}: {text}"


def label(name: str) -> str:
    """Return the label of a parameter's field; of one of several pictures, as `image_file[1]`, with its number."""
    if numbered := _NUMBERED.fullmatch(name):
        return f"{label(numbered['slot'])} {int(numbered['number']) + 1}"
    return _LABELS.get(name, name.replace("_", " ").capitalize())


def slot_of(name: str) -> str:
    """Return the field that a parameter is in: `image_file` of `image_file[1]`, `controls` of `controls[0].kind`."""
    numbered = _NUMBERED.fullmatch(name)
    return numbered["slot"] if numbered else name


def refusal(detail: str, faults: Sequence[tuple[str, str]], beside: Collection[str]) -> str:
    """Render why a request was refused. Errors beside their fields are not repeated, for screen readers."""
    elsewhere = [(name, text) for name, text in faults if slot_of(name) not in beside]
    if elsewhere or not faults:
        return alert(detail, elsewhere)
    names = list(dict.fromkeys(label(name) for name, _ in faults))
    fields = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f'<div class="sds-message sds-alert"><p>Not drawn. Have a look at {escape(fields)}.</p></div>'


def fault(tab: str, name: str, text: str) -> str:
    """Render the error to show below a field."""
    field = f"{escape(tab)}-{escape(slot_of(name))}"
    return f'<p role="alert" id="sds-fault-{field}" data-field="sds-{field}">{escape(_of_field(name, text))}</p>'


def made(receipts: Sequence[Job]) -> str:
    """Render parameters and warnings of images; merges equal entries of several images."""
    numbers_by_remark: dict[str, list[int]] = {}
    for number, receipt in enumerate(receipts, 1):
        facts = (
            f"{receipt['width']} × {receipt['height']}, {receipt['model']}, "
            f"{_count(receipt['num_inference_steps'], 'step')}, guidance {receipt['guidance_scale']:g}."
        )
        again = ("It was stored already.",) if receipt.get("cached") else ()
        for remark in (facts, *again, *(warning["message"] for warning in receipt.get("warnings", ()))):
            numbers_by_remark.setdefault(remark, []).append(number)
    rows = [
        f"<li>{escape(_which(numbers, len(receipts)) + remark)}</li>" for remark, numbers in numbers_by_remark.items()
    ]
    return f'<ul class="sds-made">{"".join(rows)}</ul>' if rows else ""


def _which(numbers: Sequence[int], of: int) -> str:
    return "" if len(numbers) == of else f"Picture {', '.join(map(str, numbers))}: "


def _outcome(job: Job) -> str:
    if job["state"] != "done":
        return sentence(job)
    seconds = _seconds(job.get("receipt") or {})
    return f"Done in {seconds:.1f} s." if seconds else "Done."


def _seconds(receipt: Job) -> float:
    """Return the seconds of an image: the stage `total` if there is one, otherwise the sum of the stages."""
    timings: Mapping[str, float] = receipt.get("timings") or {}
    return float(timings.get("total") or sum(timings.values()))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def remark(text: str) -> str:
    """Render a sentence."""
    return f'<div class="sds-message" role="status"><p>{escape(text)}</p></div>'


def hint(text: str) -> str:
    """Render a sentence below a field."""
    return f'<div class="sds-words"><p>{escape(text)}</p></div>'


def replayed(answer: Job) -> str:
    """Render the comparison of a replayed image with the original."""
    replay = answer["replay"]
    alike = "equal bit for bit" if replay["equal"] else f"alike to {replay['decibels']:.1f} dB"
    changed = "" if replay["same_order"] else " The model or its parameters have changed since."
    link = f'<a href="{escape(str(answer["path"]))}" target="_blank" rel="noopener">the new one</a>'
    return f'<div class="sds-message" role="status"><p>Drawn again: {alike}.{changed} See {link}.</p></div>'


def facts(rows: Mapping[str, str]) -> str:
    """Render names and values as a table."""
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows.items()
    )
    return f'<table class="sds-facts">{cells}</table>'


def figure(caption: str, source: str) -> str:
    """Render an image with its caption."""
    return (
        f'<figure class="sds-figure"><figcaption class="sds-label">{escape(caption)}</figcaption>'
        f'<img src="{escape(source)}" alt="{escape(caption)}"></figure>'
    )


def before_and_after(before: str, after: str) -> str:
    """Render two images on top of each other, with a slider between them."""
    return (
        '<div class="sds-compare" style="--at: 50%"><span class="sds-label">Before and after</span>'
        f'<div class="sds-both"><img src="{escape(after)}" alt="After"><img class="sds-before" '
        f'src="{escape(before)}" alt="Before"></div>'
        '<input type="range" min="0" max="100" value="50" aria-label="How much of the picture before is seen"></div>'
    )
