"""Styles and wildcards by HTTP: what is drawn, what the answer and the picture say of it, and what is refused."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, lora_file, until

from stable_diffusion_server.imaging.metadata import read_record

CREATE, OPENAI, TXT2IMG = "/create_and_upload_image", "/v1/images/generations", "/sdapi/v1/txt2img"
SIZE = {"width": 64, "height": 64}
SHEET = """name,prompt,negative_prompt
anime,"anime, {prompt}, vibrant",photo
oil,oil painting,
any,"{prompt} at {night|noon}",
bulky,"{prompt}{prompt}{prompt}{prompt}",
tagged,<lora:pastel:0.5>,
"""
COLOURS = ["red", "green", "blue", "black"]

MakeApp = Callable[..., RunningApp]


@pytest.fixture
def prompt_files(tmp_path: Path) -> dict[str, Path]:
    """Settings that name a sheet of styles and a folder of wildcards."""
    folder = tmp_path / "wildcards"
    (folder / "deep").mkdir(parents=True)
    (folder / "colour.txt").write_text("\n".join(COLOURS))
    (folder / "deep" / "thing.txt").write_text("# things\n\n__colour__ square\n")
    (folder / "myself.txt").write_text("__myself__")
    (folder / "empty.txt").write_text("# nothing\n")
    sheet = tmp_path / "styles.csv"
    sheet.write_text(SHEET, encoding="utf-8-sig")
    return {"styles_file": sheet, "wildcards_dir": folder}


@pytest.fixture
def app(run_app: MakeApp, prompt_files: dict[str, Path]) -> RunningApp:
    """A running app with styles and wildcards."""
    return run_app(**prompt_files)


def post(running_app: RunningApp, path: str = CREATE, headers: dict[str, str] | None = None, **asked: Any) -> Any:
    body = {"size": "64x64"} if path == OPENAI else SIZE
    return running_app.client.post(path, json={**body, **asked}, headers=headers or {})


def drawn(running_app: RunningApp) -> list[str]:
    return [one.prompt for one in running_app.squares.finished]


def info_of(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    info: dict[str, Any] = json.loads(answer.json()["info"])
    return info


def test_styles_are_applied_in_order_to_both_prompts(app: RunningApp) -> None:
    """The answer, the picture and the history have what was drawn; the key is that of the prompt written out."""
    styled = post(app, prompt="a red square", styles=["anime", "oil"]).json()
    [job] = app.squares.finished
    assert (job.prompt, job.negative_prompt) == ("anime, a red square, vibrant, oil painting", "photo")
    assert styled["prompt_used"] == job.prompt
    record = read_record(app.client.get(styled["path"]).content)
    assert record is not None
    assert (record["prompt"], record["asked"]["prompt"], record["asked"]["negative_prompt"]) == (
        *(job.prompt, job.prompt),
        "photo",
    )
    assert not {"styles", "wildcards", "expanded"} & set(record["asked"])
    [entry] = app.client.get("/history").json()["pictures"]
    assert entry["prompt"] == job.prompt
    written = post(app, prompt=job.prompt, negative_prompt="photo").json()
    assert (written["key"], written["cached"], "prompt_used" in written) == (styled["key"], True, False)
    again = post(app, prompt="a red square", styles=["anime", "oil"]).json()
    assert (again["key"], again["cached"], again["prompt_used"]) == (styled["key"], True, job.prompt)


@pytest.mark.parametrize(
    "query",
    ["styles=anime&styles=oil", "styles[]=anime&styles[]=oil", "styles[1]=oil&styles[0]=anime"],
)
def test_styles_of_a_query_are_repeated(app: RunningApp, query: str) -> None:
    """As other lists; one style is written once."""
    assert app.client.get(f"{CREATE}?prompt=a+square&width=64&height=64&{query}").status_code == 200
    assert app.client.get(f"{CREATE}?prompt=a+disc&width=64&height=64&styles=oil").status_code == 200
    assert app.client.post(CREATE, data={"prompt": "a cube", **SIZE, "styles": ["oil", "anime"]}).status_code == 200
    assert drawn(app) == [
        "anime, a square, vibrant, oil painting",
        "a disc, oil painting",
        "anime, a cube, oil painting, vibrant",
    ]


@pytest.mark.parametrize(
    ("asked", "name", "why"),
    [
        ({"styles": ["anim\u0435"]}, "styles", "'anim\u0435' is not a style here"),
        ({"styles": ["anime", ""]}, "styles", "'' is not a style here"),
        ({"styles": ["a" * 201]}, "styles", "200 characters"),
        ({"styles": ["anime"] * 17}, "styles", "16"),
        ({"styles": [1]}, "styles", "text"),
        ({"styles": {"a": 1}}, "styles", ""),
        ({"styles": ["bulky"] * 8, "prompt": "a" * 500}, "prompt", "more than 32000 characters in its styles"),
        ({"wildcards": 1}, "wildcards", "true or false"),
        ({"wildcards": True, "prompt": "__nothing__"}, "prompt", "'nothing', which is not here"),
        ({"wildcards": True, "prompt": "__empty__"}, "prompt", "'empty', which is not here"),
        ({"wildcards": True, "negative_prompt": "__c\u043elour__"}, "negative_prompt", "which is not here"),
        ({"wildcards": True, "prompt": "__../../../etc/passwd__"}, "prompt", "which is not here"),
        ({"wildcards": True, "prompt": "__/etc/passwd__"}, "prompt", "which is not here"),
        ({"wildcards": True, "prompt": "__myself__"}, "prompt", "more than 16 deep"),
        ({"wildcards": True, "prompt": "{a}" * 1001}, "prompt", "pick more than 1000"),
        ({"wildcards": True, "prompt": "{" * 16_000 + "}" * 16_000}, "prompt", "more than 16 deep"),
        ({"wildcards": True, "prompt": "{a|a}", "negative_prompt": "{" + "a" * 32_001 + "}"}, "negative_prompt", ""),
        ({"wildcards": True, "prompt": "{|}"}, "prompt", "prompt is empty"),
        ({"wildcards": True, "prompt": "{\ud800|\ud800}"}, "prompt", ""),
    ],
)
def test_what_cannot_be_expanded_is_refused_by_name(
    app: RunningApp, asked: dict[str, Any], name: str, why: str
) -> None:
    """422 with the parameter and the reason, and nothing is drawn."""
    body = json.dumps({"prompt": "a square", **SIZE, **asked})
    answer = app.client.post(CREATE, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert (answer.json()["field"], why in answer.json()["detail"]) == (name, True), answer.text
    assert drawn(app) == []


def test_sixteen_styles_and_a_thousand_wildcards_are_taken(app: RunningApp) -> None:
    """The other side of each limit."""
    assert post(app, prompt="a", styles=["oil"] * 16).status_code == 200
    assert post(app, prompt="{a}" * 1000, wildcards=True).status_code == 200
    assert post(app, prompt="{" * 16 + "a" + "}" * 16, wildcards=True).status_code == 200
    assert drawn(app)[0] == "a" + ", oil painting" * 16
    assert drawn(app)[2] == "a"


def test_without_files_there_are_no_styles_and_no_lists(running_app: RunningApp) -> None:
    """Names are refused; braces need no file."""
    assert post(running_app, prompt="a", styles=["anime"]).json()["field"] == "styles"
    assert post(running_app, prompt="__colour__", wildcards=True).json()["field"] == "prompt"
    assert post(running_app, prompt="a {red|red} square", wildcards=True).json()["prompt_used"] == "a red square"
    assert running_app.client.get("/sdapi/v1/prompt-styles").json() == []


def test_texts_stay_as_they_are_unless_their_expansion_is_asked_for(app: RunningApp) -> None:
    """Braces and underscores in prompts keep their meaning and their key; without them `wildcards` changes nothing."""
    text = "a {red|blue} __colour__ square"
    plain = [post(app, prompt=text, **more).json() for more in ({}, {"wildcards": False})]
    assert drawn(app) == [text]
    assert plain[0]["key"] == plain[1]["key"]
    for text in ("a red square", "a } __ {_ square"):
        keys = {post(app, prompt=text, **more).json()["key"] for more in ({}, {"wildcards": True})}
        assert len(keys) == 1


def test_the_seed_decides_what_is_picked(app: RunningApp) -> None:
    """Equal requests give one picture; the seed of an answer gives its texts again; other seeds give others."""
    text = {"prompt": "a __deep/thing__ {1|2|3|4|5|6|7|8}", "negative_prompt": "{a|b} __colour__", "wildcards": True}
    first, again = post(app, **text).json(), post(app, **text).json()
    assert (first["key"], again["cached"], again["prompt_used"]) == (again["key"], True, first["prompt_used"])
    by_seed = post(app, **text, seed=first["seed"]).json()
    assert (by_seed["key"], by_seed["prompt_used"]) == (first["key"], first["prompt_used"])
    random = post(app, **text, seed="random").json()
    same = post(app, **text, seed=random["seed"]).json()
    assert (same["key"], same["cached"]) == (random["key"], True)
    assert len({post(app, **text, seed=seed).json()["prompt_used"] for seed in range(20)}) > 10
    assert all(job.negative_prompt is not None and job.negative_prompt[0] in "ab" for job in app.squares.finished)
    written = {"prompt": first["prompt_used"], "negative_prompt": app.squares.finished[0].negative_prompt}
    assert post(app, **written, seed=first["seed"]).json()["key"] == first["key"]


def test_a_style_may_have_wildcards(app: RunningApp) -> None:
    """Styles come first; they are no wildcards of their own if `wildcards` is not asked for."""
    assert post(app, prompt="a {cat|cat}", styles=["any"], wildcards=True).json()["prompt_used"] in (
        "a cat at night",
        "a cat at noon",
    )
    assert post(app, prompt="a cat", styles=["any"]).json()["prompt_used"] == "a cat at {night|noon}"


def test_changes_on_the_disk_are_seen_by_the_next_request(app: RunningApp, prompt_files: dict[str, Path]) -> None:
    """A new list, a changed and a removed style, a sheet that is broken for a while."""
    folder, sheet = prompt_files["wildcards_dir"], prompt_files["styles_file"]
    (folder / "new.txt").write_text("a square")
    assert post(app, prompt="__new__", wildcards=True).json()["prompt_used"] == "a square"
    sheet.write_text("name,prompt\noil,pastel\n")
    assert post(app, prompt="a", styles=["oil"]).json()["prompt_used"] == "a, pastel"
    assert post(app, prompt="a", styles=["anime"]).status_code == 422
    sheet.write_bytes(b"name,prompt\noil,\xff\n")
    assert post(app, prompt="a", styles=["oil"]).status_code == 422
    assert app.client.get("/sdapi/v1/prompt-styles").json() == []
    sheet.write_text("name,prompt\noil,ink\n")
    assert post(app, prompt="a", styles=["oil"]).json()["prompt_used"] == "a, ink"


def test_files_that_are_too_large_are_not_read(app: RunningApp, prompt_files: dict[str, Path]) -> None:
    """10 MB of lines, and of a sheet; a pipe blocks nobody."""
    (prompt_files["wildcards_dir"] / "huge.txt").write_text("a line\n" * 1_500_000)
    (prompt_files["wildcards_dir"] / "zero.txt").write_bytes(b"a\0b")
    prompt_files["styles_file"].write_text("name,prompt\n" + "a,b\n" * 2_500_000)
    for name in ("huge", "zero"):
        assert post(app, prompt=f"__{name}__", wildcards=True).status_code == 422
    assert post(app, prompt="a", styles=["a"]).status_code == 422


def test_a_picture_is_drawn_again_although_its_list_has_changed(app: RunningApp, prompt_files: dict[str, Path]) -> None:
    """A replay has the expanded texts, and expands nothing, whatever the default is."""
    made = post(app, prompt=r"a __colour__ \{square\} \_\_", negative_prompt="{a|b}", wildcards=True).json()
    picture = app.client.get(made["path"]).content
    (prompt_files["wildcards_dir"] / "colour.txt").write_text("white")
    answer = app.client.post("/v1/replay", files={"picture_file": picture})
    assert answer.status_code == 200, answer.text
    assert answer.json()["replay"] == {"same_order": True, "equal": True, "decibels": None}
    before, after = drawn(app)
    assert before == after


def test_wildcards_are_expanded_by_default_where_the_operator_says_so(
    run_app: MakeApp, prompt_files: dict[str, Path]
) -> None:
    """In every dialect, unless a request says otherwise; a replay of a picture with braces keeps them."""
    app = run_app(**prompt_files, expand_wildcards=True)
    for path in (CREATE, OPENAI, TXT2IMG):
        assert post(app, path, prompt="a {red|red} square").status_code == 200
        assert post(app, path, prompt="a {blue|blue} square", wildcards=False).status_code == 200
    assert {*drawn(app)} == {"a red square", "a {blue|blue} square"}
    kept = post(app, prompt="a {blue|blue} square", wildcards=False).json()
    answer = app.client.post("/v1/replay", files={"picture_file": app.client.get(kept["path"]).content})
    assert answer.json()["replay"]["same_order"], answer.text


def test_a_job_keeps_what_it_was_accepted_with(run_app: MakeApp, prompt_files: dict[str, Path]) -> None:
    """Lists and defaults change, and the server restarts, while it is drawn: its text is the one it began with."""
    gate = threading.Event()
    first = run_app(FakeDenoiser(gate=gate), **prompt_files, shutdown_grace_seconds=0.1)
    bodies = [
        {"prompt": "a __deep/thing__", "wildcards": True, "seed": "random"},
        {"prompt": "a {red|red} square", "styles": ["oil"], "wildcards": True},
        {"prompt": "{blue|blue}"},
    ]
    ids = [post(first, headers={"Prefer": "respond-async"}, **body).json()["id"] for body in bodies]
    until(lambda: len(first.squares.prepared) > 0)
    threading.Timer(1.0, gate.set).start()
    first.client.__exit__(None, None, None)
    assert first.squares.finished == []
    (prompt_files["wildcards_dir"] / "colour.txt").write_text("white")
    second = run_app(**prompt_files, expand_wildcards=True)
    until(lambda: all(second.client.get(f"/jobs/{name}").json()["state"] == "done" for name in ids))
    begun, ended = (
        {(job.prompt, job.seed) for job in jobs} for jobs in (first.squares.prepared, second.squares.finished)
    )
    assert begun <= ended
    assert len(ended) == len(ids)
    results = [second.client.get(f"/jobs/{name}").json()["receipt"] for name in ids]
    assert [result.get("prompt_used") for result in results][1:] == ["a red square, oil painting", None]
    assert results[0]["prompt_used"].removeprefix("a ").removesuffix(" square") in COLOURS


def test_equal_expansions_share_one_generation(run_app: MakeApp, prompt_files: dict[str, Path]) -> None:
    """A request with a style and one that writes it out, at the same time."""
    gate = threading.Event()
    app = run_app(FakeDenoiser(gate=gate), **prompt_files)
    answers: list[Any] = []
    asked = ({"prompt": "a", "styles": ["oil"]}, {"prompt": "a, oil painting"}, {"prompt": "{a|a}, oil painting"})
    bodies = [asked[0], asked[1], {**asked[0], "wildcards": True}]
    threads = [threading.Thread(target=lambda body=body: answers.append(post(app, **body).json())) for body in bodies]
    for thread in threads:
        thread.start()
    until(lambda: app.metric("sds_http_requests_in_flight") >= 3 or len(app.squares.prepared) >= 1)
    gate.set()
    for thread in threads:
        thread.join(30)
    assert len({answer["key"] for answer in answers}) == 1
    assert len(app.squares.finished) == 1


def test_openai_gives_each_image_its_own_text(app: RunningApp) -> None:
    """`revised_prompt` has it; the seed of an image gives it again."""
    answer = post(app, OPENAI, prompt="{1|2|3|4|5|6|7|8|9} squares", n=6, wildcards=True, styles=["oil"])
    assert answer.status_code == 200, answer.text
    images = answer.json()["data"]
    texts = [image["revised_prompt"] for image in images]
    assert len({*texts}) > 1
    assert all(text.endswith(" squares, oil painting") for text in texts)
    again = post(
        app, OPENAI, prompt="{1|2|3|4|5|6|7|8|9} squares", wildcards=True, styles=["oil"], seed=images[3]["seed"]
    )
    assert again.json()["data"][0]["revised_prompt"] == texts[3]
    refused = post(app, OPENAI, prompt="a", styles=["nothing"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "styles")


def test_automatic1111_lists_and_applies_styles(app: RunningApp) -> None:
    """In its shape and order; unknown ones are left out and reported, as it leaves them out."""
    listed = app.client.get("/sdapi/v1/prompt-styles").json()
    assert listed[0] == {"name": "anime", "prompt": "anime, {prompt}, vibrant", "negative_prompt": "photo"}
    assert [style["name"] for style in listed] == ["anime", "oil", "any", "bulky", "tagged"]
    info = info_of(post(app, TXT2IMG, prompt="a red square", styles=["anime", "nothing", "oil"], seed=1))
    [job] = app.squares.finished
    assert (job.prompt, job.negative_prompt) == ("anime, a red square, vibrant, oil painting", "photo")
    assert (info["prompt"], info["negative_prompt"], info["styles"]) == (
        *(job.prompt, "photo"),
        ["anime", "nothing", "oil"],
    )
    assert info["all_prompts"] == [job.prompt]
    assert info["infotexts"][0].startswith(f"{job.prompt}\nNegative prompt: photo\n")
    assert info["not_honoured"] == ["styles: there is no style 'nothing' here; it is left out."]
    refused = post(app, TXT2IMG, prompt="a", styles=["oil"] * 17)
    assert (refused.status_code, "styles" in refused.text) == (422, True)
    assert post(app, TXT2IMG, prompt="a", styles=["bulky"] * 8 + ["oil"]).status_code == 422


def test_automatic1111_gives_each_image_its_own_text(app: RunningApp) -> None:
    """`all_prompts` and the infotexts have them; image i has that of `seed + i`; unknown names stay, with a note."""
    text = {
        "prompt": "{1|2|3|4|5|6|7|8|9} __colour__ squares __nothing__",
        "negative_prompt": "{a|b}",
        "wildcards": True,
    }
    info = info_of(post(app, TXT2IMG, **text, batch_size=3, n_iter=2, seed=7))
    assert info["all_seeds"] == list(range(7, 13))
    by_seed = {job.seed: job for job in app.squares.finished}
    assert info["all_prompts"] == [by_seed[seed].prompt for seed in range(7, 13)]
    assert info["all_negative_prompts"] == [by_seed[seed].negative_prompt for seed in range(7, 13)]
    assert info["prompt"] == info["all_prompts"][0]
    assert len({*info["all_prompts"]}) > 1
    assert [infotext.split("\n")[0] for infotext in info["infotexts"]] == info["all_prompts"]
    assert info["not_honoured"] == ["prompt: there is no wildcard 'nothing' here; it stays as it is."]
    alone = info_of(post(app, TXT2IMG, **text, seed=9))
    assert (alone["prompt"], alone["cached"]) == (info["all_prompts"][2], [True])
    refused = post(app, TXT2IMG, prompt="__myself__", wildcards=True)
    assert (refused.status_code, "prompt" in refused.text) == (422, True)
    random = info_of(post(app, TXT2IMG, **text))
    again = info_of(post(app, TXT2IMG, **text, seed=random["seed"]))
    assert (again["prompt"], again["cached"]) == (random["prompt"], [True])


def test_automatic1111_reads_tags_after_the_expansion(run_app: MakeApp, prompt_files: dict[str, Path]) -> None:
    """A LoRA of a style, of a list, and one of several; brackets of models that read no weights."""
    folder = prompt_files["styles_file"].parent / "loras"
    folder.mkdir()
    for name in ("pastel", "ink"):
        lora_file(folder / f"{name}.safetensors", name.encode())
    (prompt_files["wildcards_dir"] / "tag.txt").write_text("<lora:ink:0.25>")
    app = run_app(**prompt_files, lora_dir=folder)
    text = "a square __tag__ {<lora:none:1>|<lora:none:1>}"
    info = info_of(post(app, TXT2IMG, prompt=text, styles=["tagged"], wildcards=True))
    [job] = app.squares.finished
    assert (job.prompt, job.loras) == ("a square", (("ink", 0.25), ("pastel", 0.5)))
    assert info["not_honoured"] == ["prompt: there is no adapter 'none' here; it is left out."]
    assert info["prompt"] == "a square <lora:ink:0.25> <lora:none:1>, <lora:pastel:0.5>"


def test_an_idempotency_key_repeats_the_answer_with_its_texts(app: RunningApp, prompt_files: dict[str, Path]) -> None:
    """The key identifies what was sent: a changed list does not make it another request."""
    text = {"prompt": "{1|2|3|4|5|6|7|8|9} __colour__ squares", "wildcards": True}
    for path, more in ((CREATE, {}), (CREATE, {"seed": "random"}), (OPENAI, {"n": 2}), (TXT2IMG, {"n_iter": 2})):
        key = {"Idempotency-Key": f"key-{path}-{len(more)}"}
        first = post(app, path, key, **text, **more)
        assert first.status_code == 200, first.text
        (prompt_files["wildcards_dir"] / "colour.txt").write_text("white")
        again = post(app, path, key, **text, **more)
        (prompt_files["wildcards_dir"] / "colour.txt").write_text("\n".join(COLOURS))
        assert again.headers["idempotency-replayed"] == "true"
        if path != TXT2IMG:
            assert again.json() | {"created": 0} == first.json() | {"created": 0}
            continue
        before, after = info_of(first), info_of(again)
        assert (before["infotexts"], before["all_seeds"]) == (after["infotexts"], after["all_seeds"])
        assert again.json()["images"] == first.json()["images"]
        assert {*after["all_prompts"]} == {text["prompt"]}  # what was sent, since another seed has expanded it


def test_no_prompt_is_in_the_log(
    run_app: MakeApp, prompt_files: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither what was sent nor what it was expanded to, nor a line of a file that cannot be used."""
    (prompt_files["wildcards_dir"] / "bad.txt").write_text("secret" + "a" * 4000)
    app = run_app(**prompt_files)
    for text in ("a {secretive|secretive} __colour__", "secretly __bad__", "secret" + "{a}" * 1001):
        post(app, prompt=text, wildcards=True)
        post(app, TXT2IMG, prompt=text, wildcards=True, styles=["secret"])
    assert post(app, prompt="a", styles=["secret"]).status_code == 422
    app.client.__exit__(None, None, None)
    said = capfd.readouterr()
    assert "a wildcard cannot be used" in said.out + said.err
    assert "secret" not in said.out + said.err


ATTACKS = ["{" * 32_000, "}" * 32_000, "|" * 32_000, "_" * 32_000, "{a|" * 10_000, "__a" * 10_000, "{2$$" * 8_000]


@pytest.mark.fault(121)
@pytest.mark.parametrize("path", [CREATE, TXT2IMG])
def test_prompts_that_attack_are_drawn_or_refused(app: RunningApp, path: str) -> None:
    """And the server goes on."""
    for text in ATTACKS:
        assert post(app, path, prompt=text, wildcards=True).status_code in (200, 422)
    assert base64.b64decode(post(app, TXT2IMG, prompt="a {red|red} square", wildcards=True).json()["images"][0])
