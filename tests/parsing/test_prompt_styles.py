"""Styles of AUTOMATIC1111's `styles.csv`: as it reads and applies them, and files that attack the reader."""

from __future__ import annotations

import time

import pytest

from stable_diffusion_server.parsing import parse_styles, styled

SHEET = """name,prompt,negative_prompt
# a comment,,
anime,"anime artwork, {prompt}, vibrant",photo
----- painters -----,,
oil,oil painting,
"a, b","says ""hello"" {prompt}","two
lines"
,nameless,
"""


def test_a_sheet_is_read_as_automatic1111_does() -> None:
    """Quotes, line breaks, dividers; rows without a name and comments are skipped."""
    styles = parse_styles(SHEET)
    assert list(styles) == ["anime", "----- painters -----", "oil", "a, b"]
    assert (styles["anime"].prompt, styles["anime"].negative_prompt) == ("anime artwork, {prompt}, vibrant", "photo")
    assert (styles["oil"].prompt, styles["oil"].negative_prompt) == ("oil painting", "")
    assert (styles["a, b"].prompt, styles["a, b"].negative_prompt) == ('says "hello" {prompt}', "two\nlines")


def test_old_and_odd_sheets_are_read() -> None:
    """The column `text` of old files, columns in another order, short and long rows, a name twice: the last counts."""
    assert parse_styles("name,text\na,b\n")["a"].prompt == "b"
    assert parse_styles("negative_prompt,name,prompt\nx,a,b\n")["a"].negative_prompt == "x"
    assert parse_styles("name,prompt,negative_prompt\r\na\r\nb,c,d,e,f\r\n")["b"].prompt == "c"
    assert parse_styles("name,prompt\na,b\na,c\n")["a"].prompt == "c"
    assert parse_styles("name,prompt\na\u2028b,c\x0bd\n")["a\u2028b"].prompt == "c\x0bd"


@pytest.mark.parametrize(
    ("prompt", "style", "result"),
    [
        ("a cat", "anime, {prompt}, vibrant", "anime, a cat, vibrant"),
        ("a cat", "{prompt} and {prompt}", "a cat and a cat"),
        ("a cat", "oil painting", "a cat, oil painting"),
        (" a cat ", " oil painting ", "a cat, oil painting"),
        ("", "oil painting", "oil painting"),
        ("a cat", "", "a cat"),
        ("", "{prompt}, vibrant", ", vibrant"),
        ("{prompt}", "<{prompt}>", "<{prompt}>"),
        ("a cat", "{Prompt}", "a cat, {Prompt}"),
    ],
)
def test_a_prompt_is_put_in_the_place_of_the_style_or_before_it(prompt: str, style: str, result: str) -> None:
    """The rules of `merge_prompts` in AUTOMATIC1111."""
    assert styled(prompt, style, 100) == result


def test_a_prompt_in_a_style_has_at_most_as_many_characters_as_is_said() -> None:
    """Counted before it is made: a style with a thousand places does not take a thousand times the memory."""
    assert len(styled("a" * 45, "{prompt}{prompt}" + "b" * 10, 100)) == 100
    assert len(styled("a" * 48, "b" * 50, 100)) == 100
    began = time.thread_time()
    for prompt, style in (
        ("a" * 45, "{prompt}{prompt}" + "b" * 11),
        ("a" * 49, "b" * 50),
        ("a" * 10**6, "{prompt}" * 10**5),
    ):
        with pytest.raises(ValueError, match="more than 100 characters in its styles"):
            styled(prompt, style, 100)
    assert time.thread_time() - began < 1


def row(count: int) -> str:
    return "name,prompt\n" + "".join(f"{number},a\n" for number in range(count))


@pytest.mark.parametrize(
    ("sheet", "why"),
    [
        ("", "no column called name"),
        ("prompt,negative_prompt\na,b\n", "no column called name"),
        ("name;prompt\na;b\n", "no column called name"),
        (row(10_001), "more than 10000 styles"),
        (f"name,prompt\n{'a' * 201},b\n", "too long a text in the row that ends at line 2"),
        (f"name,prompt\na,{'b' * 32_001}\n", "too long a text"),
        (f"name,negative_prompt\na,{'b' * 32_001}\n", "too long a text"),
        ('name,prompt\na,"' + "b" * 10**6, "field larger than field limit"),
        ('name,prompt\na,"' + "b,c\n" * 10**5, "field larger than field limit"),
    ],
)
def test_a_sheet_beyond_the_limits_says_why_it_is_refused(sheet: str, why: str) -> None:
    """Too many rows, too long fields, quotes that are never closed."""
    with pytest.raises(ValueError, match=why):
        parse_styles(sheet)


def test_a_sheet_at_the_limits_is_read() -> None:
    """10,000 styles, names of 200 and texts of 32,000 characters."""
    assert len(parse_styles(row(10_000))) == 10_000
    assert len(parse_styles(f"name,prompt,negative_prompt\n{'a' * 200},{'b' * 32_000},{'c' * 32_000}\n")) == 1


def test_a_million_rows_are_refused_before_they_are_read() -> None:
    """The reader stops at the first row too many."""
    sheet = row(1_000_000)
    began = time.thread_time()
    with pytest.raises(ValueError, match="more than 10000 styles"):
        parse_styles(sheet)
    assert time.thread_time() - began < 2
