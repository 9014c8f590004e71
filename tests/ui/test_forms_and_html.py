"""The UI's forms and HTML: pure functions, tested without a page."""

from __future__ import annotations

import io
import json
import shlex

import numpy as np
import pytest
from conftest import RunningApp
from PIL import Image

from stable_diffusion_server.ui import code_snippets, forms, image_intake, model_options
from stable_diffusion_server.ui.forms import CommonFields
from stable_diffusion_server.ui.html import details, status
from stable_diffusion_server.ui.html import progress as telling
from stable_diffusion_server.ui.sessions import SessionStore


def job(state: str, **more: object) -> dict[str, object]:
    return {"id": "a", "state": state, **more}


def test_several_pictures_have_seeds_of_their_own() -> None:
    """A fixed seed counts up; without one each image gets a random one.

    A non-number is passed to the server to refuse.
    """
    kept = forms.create(CommonFields("a star", seed="7", count=3), 512, 256)
    assert [wanted.fields["seed"] for wanted in kept] == ["7", "8", "9"]
    assert (kept[0].fields["width"], kept[0].fields["height"]) == ("512", "256")
    free = forms.create(CommonFields("a star", count=2), 64, 64)
    assert [wanted.fields["seed"] for wanted in free] == ["random", "random"]
    assert forms.create(CommonFields("a star", seed="x"), 64, 64)[0].fields["seed"] == "x"
    assert "model" not in free[0].fields


def test_exploring_draws_the_originals_six() -> None:
    """The prompt alone, and with each of the original's suffixes, all with one seed."""
    all_wanted = forms.create(CommonFields("a star", seed="7"), 64, 64, explore=True)
    assert [wanted.fields["prompt"] for wanted in all_wanted][:2] == ["a star", "a star awesome"]
    assert (len(all_wanted), {wanted.fields["seed"] for wanted in all_wanted}) == (6, {"7"})


def test_control_units_are_sent_with_their_pictures() -> None:
    """A unit of its own picture names its file; one without has the request's, which must be there."""
    units = [forms.UnitFields("canny", weight=0.5), forms.UnitFields("depth", "net", "none", image=b"depth")]
    (guided,) = forms.guided(forms.restyle(CommonFields("a"), b"x", 0.5, canny=False), units, has_image=True)
    listed = json.loads(guided.fields["controls"])
    assert listed[0] == {"kind": "canny", "weight": 0.5, "start": 0.0, "end": 1.0}
    assert (listed[1]["model"], listed[1]["preprocess"], listed[1]["image_file"]) == ("net", "none", 0)
    assert guided.controls == (b"depth",)
    made = forms.create(CommonFields("a"), 64, 64)
    assert forms.guided(made, [], has_image=False) == made
    with pytest.raises(forms.FormError) as refused:
        forms.guided(made, units, has_image=False)
    assert refused.value.field == "controls"


def test_edges_are_asked_for_only_when_wanted() -> None:
    """Thresholds are sent with canny only."""
    plain, by_edges = (forms.restyle(CommonFields("a"), b"x", 0.5, canny=canny)[0] for canny in (False, True))
    assert ("canny_low" in plain.fields, by_edges.fields["canny_low"], by_edges.fields["strength"]) == (
        False,
        "100",
        "0.5",
    )
    assert by_edges.files == {"image_file": b"x"}


def test_how_a_job_stands_is_one_sentence() -> None:
    """Waiting, running, done, failed."""
    assert telling.sentence(job("queued", position=2, eta_seconds=3.6)) == (
        "Waiting: 2 pictures before this one, about 4 s."
    )
    assert telling.sentence(job("running", step=3, steps=8)) == "Step 3 of 8."
    assert telling.summary([job("done", receipt={"timings": {"total": 2.04, "denoise": 2}})]) == "Done in 2.0 s."
    assert telling.sentence(job("failed", problem={"detail": "It broke."})) == "It broke."
    three = [job("done"), job("running", step=1, steps=2), job("queued")]
    assert telling.summary(three) == "1 of 3 pictures. Step 1 of 2."
    assert telling.summary([job("done"), job("cancelled")]) == "1 done, 1 cancelled."


def test_what_others_wrote_is_shown_as_text() -> None:
    """Markup in problems, errors, previews and model facts is escaped."""
    evil = "<img src=x onerror=alert(1)>"
    shown = [
        telling.progress([job("failed", problem={"detail": evil})], {}),
        telling.alert(evil, [("width", evil)]),
        telling.remark(evil),
        status.page({"missing": [evil], "models": [{"name": evil}]}, "", [job("failed", problem={"detail": evil})]),
    ]
    assert not any("<img" in html for html in shown)


def test_a_fault_is_shown_by_the_fields_label() -> None:
    """The message does not repeat the parameter name."""
    html = telling.alert("", [("num_inference_steps", "num_inference_steps must be at most 100.")])
    assert "Steps must be at most 100." in html


def test_a_fault_is_shown_once() -> None:
    """An error at a field is only pointed to; an error without a field is shown in full."""
    faults = [("width", "width must be between 64 and 2048."), ("image_file", "image_file is no picture.")]
    pointed = telling.refusal("x", faults[:1], {"width"})
    assert ("Have a look at Width." in pointed, "2048" in pointed, "role" in pointed) == (True, False, False)
    assert "is no picture" in telling.refusal("x", faults, {"width"})
    assert "x" in telling.refusal("x", (), {"width"})


def test_fields_offer_what_the_models_have() -> None:
    """The default model's steps, guidance and best size, and its unused fields; the prompt words of embedded models."""
    models = [
        {"name": "sdxl", "folder": "embedded-sdxl", "usual": True, "default_steps": 4, "default_guidance": 2.0},
        {"name": "flux", "folder": "real", "takes_guidance": False, "takes_negative_prompt": False, "default_steps": 4},
    ]
    assert model_options.choices(models)[0] == ("The server's own choice (sdxl)", "")
    assert model_options.defaults(model_options.chosen(models, ""))[:2] == ("4, its own", "2, its own")
    assert model_options.defaults(model_options.chosen(models, "flux"))[1:] == (
        "it takes none",
        "Flux has no use for it.",
    )
    sides = [model_options.side({"native_pixels": side * side}) for side in (128, 600, 1024)]
    assert sides == [256, 512, 1024]
    assert (model_options.preset(768, 512), model_options.preset(768, None)) == ("768x512", None)
    assert "hexagons" in model_options.words(models)
    assert model_options.words(models[1:]) == ""


def test_a_record_fills_the_fields_again() -> None:
    """The original prompt; optional values become text."""
    record = {"prompt": "a star detail", "asked": {"prompt": "a star"}, "seed": 0, "guidance_scale": 0.0, "width": 64}
    was = details.settings(record)
    assert (was["prompt"], was["seed"], was["guidance"], was["steps"], was["width"]) == ("a star", "0", "0", "", 64)
    evil = "<img src=x onerror=alert(1)>"
    reported = details.page({"prompt": evil, "model": evil}, {}) + details.picture({"path": evil, "prompt": evil})
    assert reported.count("<img") == 1


def test_what_was_painted_is_the_mask() -> None:
    """Any colour counts as white; the preview is striped there only; an unpainted image has no mask."""
    layer = np.zeros((4, 6, 3), np.uint8)
    assert (image_intake.painted(layer), image_intake.previewed(layer, layer, 0)) == (b"", "")
    layer[1, 2, 0] = 9
    with Image.open(io.BytesIO(image_intake.painted(layer))) as mask:
        assert (mask.mode, mask.size, np.asarray(mask).sum(), np.asarray(mask)[1, 2]) == ("L", (6, 4), 255, 255)
    seen = image_intake.striped(layer, np.asarray(np.where(layer[..., 0] > 0, 255, 0), np.uint8))
    assert (seen[1, 2, 0] > 100, seen[0].sum()) == (True, 0)
    assert image_intake.previewed(layer, layer, 2).startswith("data:image/jpeg;base64,")
    assert image_intake.previewed(layer, np.full((2, 3, 3), 255, np.uint8), 0) != ""


def test_the_status_reads_figures_that_there_are(running_app: RunningApp) -> None:
    """Every metric on the Status tab exists in `/metrics`, and is shown by its label."""
    figures = running_app.client.get("/metrics").text
    reported = status.page({}, figures, [])
    for name, label in status.FIGURES.items():
        assert f"\n{name} " in figures
        assert f"<dt>{label}</dt>" in reported


def test_a_record_becomes_calls_that_can_be_pasted() -> None:
    """Quotes in a prompt survive the shell and Python; the API key is referenced by name and never shown."""
    record = {
        "task": "text_to_image",
        "prompt": 'it\'s a "star"',
        "seed": 7,
        "width": 64,
        "height": 32,
        "model": "sdxl",
    }
    line = code_snippets.curl("http://x", record, keyed=True)
    assert json.loads(shlex.split(line.replace("\\\n", ""))[-1])["prompt"] == record["prompt"]
    assert "$API_KEY" in line
    compile(code_snippets.openai("http://x", record, keyed=True), "call", "exec")
    files = code_snippets.curl("http://x", {**record, "task": "inpaint"})
    assert "--form mask_file=@mask.png" in files
    compile(code_snippets.openai("http://x", {**record, "task": "inpaint"}), "call", "exec")
    edit = {**record, "task": "edit", "references": ["1a", "2b"]}
    line = code_snippets.curl("http://x", edit)
    assert "/edit_and_upload_image" in line
    assert line.count("--form image_file=@") == 2
    call = code_snippets.openai("http://x", edit)
    compile(call, "call", "exec")
    assert call.count("open(") == 2


def test_the_oldest_sessions_are_dropped() -> None:
    """The number of tokens is bounded, and all are distinct."""
    sessions = SessionStore()
    tokens = [sessions.start(f"key {number}") for number in range(1001)]
    assert (sessions.key_of(tokens[0]), sessions.key_of(tokens[1])) == (None, "key 1")
    sessions.end(tokens[1])
    assert sessions.key_of(tokens[1]) is None
