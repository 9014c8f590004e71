"""What the studio asks for and how it tells what happens: pure functions, tried without a page."""

from __future__ import annotations

import json
import shlex

import numpy as np

from stable_diffusion_server.ui import asking, masks, snippets, standing, telling
from stable_diffusion_server.ui.asking import Common
from stable_diffusion_server.ui.guests import Guests


def job(state: str, **more: object) -> dict[str, object]:
    return {"id": "a", "state": state, **more}


def test_several_pictures_have_seeds_of_their_own() -> None:
    """Kept seeds count up; without one each is left to chance; what is no number is left for the server to refuse."""
    kept = asking.create(Common("a star", seed="7", count=3), 512, 256)
    assert [wish.fields["seed"] for wish in kept] == ["7", "8", "9"]
    assert (kept[0].fields["width"], kept[0].fields["height"]) == ("512", "256")
    free = asking.create(Common("a star", count=2), 64, 64)
    assert [wish.fields["seed"] for wish in free] == ["random", "random"]
    assert asking.create(Common("a star", seed="x"), 64, 64)[0].fields["seed"] == "x"
    assert "model" not in free[0].fields


def test_exploring_draws_the_originals_six() -> None:
    """The prompt alone, and with each suffix, at one seed."""
    wishes = asking.create(Common("a star", seed="7"), 64, 64, explore=True)
    assert [wish.fields["prompt"] for wish in wishes][:2] == ["a star", "a star awesome"]
    assert (len(wishes), {wish.fields["seed"] for wish in wishes}) == (6, {"7"})


def test_edges_are_asked_for_only_when_wanted() -> None:
    """Thresholds go along with canny, and not without."""
    plain, by_edges = (asking.restyle(Common("a"), b"x", 0.5, canny=canny)[0] for canny in (False, True))
    assert ("canny_low" in plain.fields, by_edges.fields["canny_low"], by_edges.fields["strength"]) == (
        False,
        "100",
        "0.5",
    )
    assert by_edges.files == {"image_file": b"x"}


def test_how_a_job_stands_is_one_sentence() -> None:
    """Waiting, drawing, done, failed."""
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
    """Markup in problems, faults, previews and facts of models is escaped."""
    evil = "<img src=x onerror=alert(1)>"
    shown = [
        telling.progress([job("failed", problem={"detail": evil})], {}),
        telling.alert(evil, [("width", evil)]),
        telling.remark(evil),
        standing.page({"missing": [evil], "models": [{"name": evil}]}, "", [job("failed", problem={"detail": evil})]),
    ]
    assert not any("<img" in html for html in shown)


def test_a_fault_is_told_by_the_fields_label() -> None:
    """The parameter's own name does not come twice."""
    html = telling.alert("", [("num_inference_steps", "num_inference_steps must be at most 100.")])
    assert "Steps must be at most 100." in html


def test_what_was_painted_is_the_mask() -> None:
    """Any opacity on any layer is white; the preview is tinted there and nowhere else."""
    layer = np.zeros((4, 6, 4), np.uint8)
    layer[1, 2, 3] = 9
    mask = masks.painted([layer, np.zeros_like(layer)], 4, 6)
    assert (mask.sum(), mask[1, 2]) == (255, 255)
    seen = masks.previewed(np.zeros((4, 6, 4), np.uint8), mask)
    assert (seen[1, 2, 0] > 100, seen[0].sum()) == (True, 0)
    assert masks.opened(masks.png(np.zeros((4, 6, 4), np.uint8))).size == (6, 4)


def test_a_record_becomes_calls_that_can_be_pasted() -> None:
    """Quotes in a prompt survive the shell and Python; the key is named and never shown."""
    record = {
        "task": "text_to_image",
        "prompt": 'it\'s a "star"',
        "seed": 7,
        "width": 64,
        "height": 32,
        "model": "sdxl",
    }
    line = snippets.curl("http://x", record, keyed=True)
    assert json.loads(shlex.split(line.replace("\\\n", ""))[-1])["prompt"] == record["prompt"]
    assert "$API_KEY" in line
    compile(snippets.openai("http://x", record, keyed=True), "call", "exec")
    files = snippets.curl("http://x", {**record, "task": "inpaint"})
    assert "--form mask_file=@mask.png" in files
    compile(snippets.openai("http://x", {**record, "task": "inpaint"}), "call", "exec")


def test_the_oldest_guests_are_forgotten() -> None:
    """Tokens are bounded, and none is another's."""
    guests = Guests()
    tokens = [guests.welcome(f"key {number}") for number in range(1001)]
    assert (guests.key_of(tokens[0]), guests.key_of(tokens[1])) == (None, "key 1")
    guests.leave(tokens[1])
    assert guests.key_of(tokens[1]) is None
