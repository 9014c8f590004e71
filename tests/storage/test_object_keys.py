"""Names to keys and keys to URLs."""

import time
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_servers import storage_options

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.storage.factory import open_bucket
from stable_diffusion_server.storage.keys import KEY_MAX_BYTES, object_key, url_path


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a/b.webp", "static/uploads/a/b.webp"),
        ("two words.webp", "static/uploads/two words.webp"),
        ("a+b.webp", "static/uploads/a+b.webp"),
        ("a%2Fb.webp", "static/uploads/a%2Fb.webp"),
        ("über/猫.webp", "static/uploads/über/猫.webp"),
        ("cafe\u0301.webp", "static/uploads/caf\u00e9.webp"),
        ("..hidden.webp", "static/uploads/..hidden.webp"),
        ("no-ending", "static/uploads/no-ending"),
    ],
)
def test_a_name_is_kept_as_it_is_below_the_bucket_path(name: str, key: str) -> None:
    """Segments, spaces, plus and percent signs stay; only Unicode is normalised to NFC."""
    assert object_key("static/uploads", name) == key


@pytest.mark.fault(6)
@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "/etc/passwd", "..", "../up.webp", "a/../b.webp", "a/./b.webp", "a//b.webp", "a/", "a/ /b"),
        *("a\0b", "a\nb", "a\\b", "\ud800.webp"),
    ],
)
def test_a_name_that_climbs_or_hides_is_refused(name: str) -> None:
    """Empty, absolute, traversing and unprintable names are refused, naming the parameter."""
    with pytest.raises(InvalidInput) as refused:
        object_key("static/uploads", name)
    assert refused.value.field == "save_path"


@pytest.mark.fault(47)
@pytest.mark.parametrize("letter", ["a", "é"])
def test_the_longest_key_is_taken_and_one_byte_more_is_not(letter: str) -> None:
    """The bound counts bytes of the whole key, including its path."""
    prefix, size = "p", len(letter.encode())
    longest = letter * ((KEY_MAX_BYTES - 2) // size)
    assert len(object_key(prefix, longest).encode()) <= KEY_MAX_BYTES
    with pytest.raises(InvalidInput):
        object_key(prefix, longest + letter)


def test_a_name_that_is_costly_to_normalize_is_refused_before_that() -> None:
    """A hundred thousand combining marks would take half a minute; the test's bound only catches that."""
    started = time.monotonic()
    with pytest.raises(InvalidInput):
        object_key("p", "a" + "\u0315" * 50_000 + "\u0300" * 50_000)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("path", ["", "/", "static/uploads", "/static/uploads/"])
def test_the_bucket_path_may_be_empty_and_have_slashes_at_its_ends(path: str) -> None:
    """In any spelling, a key neither begins with a slash nor doubles one."""
    key = object_key(path, "a.webp")
    assert key in ("a.webp", "static/uploads/a.webp")


@given(st.text(min_size=1, max_size=60))
def test_a_url_leads_back_to_its_key(name: str) -> None:
    """Decoding a URL once gives the key, for any characters."""
    try:
        key = object_key("static/uploads", name)
    except InvalidInput:
        return
    assert unquote(url_path(key)) == key
    assert key.split("/")[:2] == ["static", "uploads"]


def test_an_unknown_provider_opens_nothing() -> None:
    """An unknown provider is an error at once, not a silent local folder."""
    with pytest.raises(ValueError, match="tape"):
        open_bucket(storage_options(storage_provider="tape"))
