"""`extra` and the images of an edit: what is read, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from stable_diffusion_server.api.request_parsing import UploadedFile, read_query
from stable_diffusion_server.api.schemas.params import EditParams, TextToImageParams
from stable_diffusion_server.api.schemas.validation import validated
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.permissions import check_extra
from stable_diffusion_server.pipelines import MODELS
from stable_diffusion_server.pipelines.model_spec import ExtraParameter, ModelSpec
from stable_diffusion_server.types import GenerationRequest, ImageInput, Task

FILE = UploadedFile(b"a file")


def extra_of(value: object) -> Any:
    """What a request has after reading `extra`."""
    return validated(TextToImageParams, {"prompt": "a", "extra": value}).to_request().extra


def refusal(value: object) -> InvalidInput:
    with pytest.raises(InvalidInput) as refused:
        extra_of(value)
    return refused.value


@pytest.mark.parametrize("value", [{"true_cfg_scale": 2.5, "fast": True, "name": "x"}, '{"true_cfg_scale": 2.5}', {}])
def test_an_object_or_its_json_is_read(value: Any) -> None:
    """Members keep type and order; an empty object is none."""
    given = json.loads(value) if isinstance(value, str) else value
    assert extra_of(value) == tuple(given.items())
    assert [type(member) for _, member in extra_of(value)] == [type(member) for member in given.values()]


@pytest.mark.parametrize(
    "value",
    [
        "{",
        "[1]",
        "1",
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": [1]}',
        {"a": {"b": 1}},
        {"a": None},
        {"a": float("inf")},
        {"a": 10**400},
        {"A": 1},
        {"__class__": 1},
        {"a.b": 1},
        {"": 1},
        {"a" * 65: 1},
        {"a": "x" * 2001},
        {f"a{number}": 1 for number in range(33)},
        '{"a": "' + "x" * 20_000 + '"}',
        "[" * 20_000,
        [1],
        True,
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_plain_object_is_refused(value: Any) -> None:
    """Depth, length, number and names are bounded; the sentence names the parameter and holds nothing of the value."""
    error = refusal(value)
    assert error.field == "extra"
    assert "x" * 10 not in error.detail


@pytest.mark.parametrize("value", [{"a" * 64: 1}, {"a": "x" * 2000}, {f"a{number}": 1 for number in range(32)}])
def test_the_bounds_themselves_are_inside(value: dict[str, Any]) -> None:
    """The longest name, the longest text, the most members."""
    assert len(extra_of(value)) == len(value)


def with_scale() -> ModelSpec:
    """FLUX.1 with a parameter of its own."""
    return replace(MODELS["flux"], extra=(ExtraParameter("true_cfg_scale", 1, 20, 1, "guidance by a second pass"),))


def test_a_model_has_its_own_parameters_within_their_ranges() -> None:
    """Both ends are inside; others are refused by name, with the names there are."""
    spec = with_scale()
    for value in (1, 20, 2.5):
        check_extra((("true_cfg_scale", value),), spec)
    for name, value in (("true_cfg_scale", 20.01), ("true_cfg_scale", 0), ("true_cfg_scale", "2"), ("other", 1)):
        with pytest.raises(InvalidInput) as refused:
            check_extra(((name, value),), spec)
        assert refused.value.field == f"extra.{name}"
    with pytest.raises(InvalidInput, match="true_cfg_scale"):
        check_extra((("other", 1),), spec)
    with pytest.raises(InvalidInput, match="none of its own"):
        check_extra((("other", 1),), MODELS["sdxl"])


def test_images_of_an_edit_keep_their_order() -> None:
    """Files of a form, and URLs of a query, numbered or not."""
    sent = {"prompt": "a", "image_file": [UploadedFile(b"1"), UploadedFile(b"2")]}
    edit = validated(EditParams, sent).to_request()
    assert edit.task is Task.EDIT
    assert [source.data for source in edit.references] == [b"1", b"2"]
    query = read_query(b"prompt=a&image_url[1]=http://a/2&image_url[0]=http://a/1", EditParams.lists)
    by_url = validated(EditParams, query).to_request()
    assert [source.url for source in by_url.references] == ["http://a/1", "http://a/2"]
    assert len({source.parameter for source in by_url.references}) == 2


@pytest.mark.parametrize(
    "sent", [{}, {"image_url": [], "image_file": []}, {"image_url": ["http://a/1"], "image_file": [FILE]}]
)
def test_an_edit_has_files_or_urls(sent: dict[str, Any]) -> None:
    """Neither, and both, are refused for both parameters."""
    with pytest.raises(InvalidInput) as refused:
        validated(EditParams, {"prompt": "a", **sent}).to_request()
    assert [name for name, _ in refused.value.faults] == ["image_url", "image_file"]


def test_there_is_a_most_number_of_references() -> None:
    """As many as the setting says are taken; one more is refused, by the name of the image."""
    images = tuple(ImageInput(f"image_file[{number}]", data=b"") for number in range(5))
    limits = RequestLimits(max_references=4)
    limits.check(GenerationRequest(task=Task.EDIT, prompt="a", references=images[:4]))
    with pytest.raises(InvalidInput) as refused:
        limits.check(GenerationRequest(task=Task.EDIT, prompt="a", references=images))
    assert refused.value.field == "image_file[4]"
