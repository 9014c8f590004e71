"""History search: exact for any text, indexed, and limited per caller."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, settings_in
from hypothesis import given
from hypothesis import strategies as st

from stable_diffusion_server.api.routes.history import MAX_PER_CALLER
from stable_diffusion_server.app import create_app
from stable_diffusion_server.storage.history.entries import HistoryEntry, HistoryQuery
from stable_diffusion_server.storage.history.index import HistoryIndex

_PROMPTS = [
    "a red square",
    'quotes " and "" and \'',
    "Straße ÅNGSTRÖM İstanbul",
    "日本語の猫 and 🟥🟦🟩🟥",
    "100%_sure AND (NOT) OR * near^2 NEAR/2",
    "ab",
    "",
    "aaa" * 600,
]


def filled(folder: Path, prompts: list[str], **changes: Any) -> HistoryIndex:
    """A history with one image per prompt."""
    index = HistoryIndex(folder / "history.db", 1_000_000, 0)
    index.open()
    index.add([entry_of(number, prompt, **changes) for number, prompt in enumerate(prompts)])
    return index


def entry_of(number: int, prompt: str, folder: str = "uploads/") -> HistoryEntry:
    """The entry of image number n."""
    return HistoryEntry(
        f"{folder}{number}.webp", f"d{number}", prompt, "sdxl", "text_to_image", 7, 64, 64, "", number, {}
    )


@pytest.mark.fault(173)
@pytest.mark.parametrize(
    "words", ["red", "RED SQ", '"', '""', "STRASSE", "ångström", "i̇st", "猫 a", "🟦🟩", "%_", "AND (", "*", "^2"]
)
def test_a_search_finds_exactly_the_prompts_that_hold_the_words(tmp_path: Path, words: str) -> None:
    """Characters special to SQL or FTS are plain text, short or long, in any script."""
    index = filled(tmp_path, _PROMPTS)
    found = {entry.prompt for entry in index.search(HistoryQuery(text=words))}
    assert found == {prompt for prompt in _PROMPTS if words.casefold() in prompt.casefold()}
    assert found


def test_a_history_of_long_prompts_loses_its_oldest_entries_above_its_size(tmp_path: Path) -> None:
    """The newest stay and are found; the file stays near the limit."""
    index = HistoryIndex(tmp_path / "history.db", 1_000_000, 0, max_bytes=2_000_000)
    index.open()
    for number in range(200):
        index.add([entry_of(number, f"{number} " + "word " * 6000)])
    found = index.search(HistoryQuery(limit=200))
    assert found[0].prompt.startswith("199 ")
    assert 5 < len(found) < 100
    assert (tmp_path / "history.db").stat().st_size < 8_000_000


@pytest.mark.fault(173)
@pytest.mark.parametrize("words", ["\0", "red\0square", "x" * 1000, "aab" * 300, "NOT red", '"red" OR "ab"'])
def test_what_no_prompt_holds_finds_nothing(tmp_path: Path, words: str) -> None:
    """NUL, which terminates text in SQLite's index; a thousand characters; FTS keywords."""
    assert filled(tmp_path, _PROMPTS).search(HistoryQuery(text=words)) == []


@given(
    st.lists(st.text(alphabet="ab\"' %é🟥", max_size=9), max_size=6),
    st.text(alphabet="ab\"' %é🟥", min_size=1, max_size=6),
)
def test_any_text_is_found_as_python_finds_it(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], words: str
) -> None:
    """The index and a scan of every prompt agree."""
    index = filled(tmp_path_factory.mktemp("history"), prompts)
    found = sorted(entry.prompt for entry in index.search(HistoryQuery(text=words, limit=100)))
    assert found == sorted(prompt for prompt in prompts if words.casefold() in prompt.casefold())


@pytest.mark.fault(173)
def test_what_is_replaced_or_forgotten_is_found_no_more(tmp_path: Path) -> None:
    """The full-text index follows every change."""
    index = filled(tmp_path, ["a red square", "a blue square"])
    index.add([entry_of(0, "a green circle")])
    index.delete("uploads/1.webp")
    assert [entry.prompt for entry in index.search(HistoryQuery(text="square"))] == []
    assert [entry.prompt for entry in index.search(HistoryQuery(text="green"))] == ["a green circle"]


@pytest.mark.fault(173)
def test_a_history_of_an_earlier_version_gets_its_index(tmp_path: Path) -> None:
    """Existing entries are found too, and a second open changes nothing."""
    index = filled(tmp_path, _PROMPTS)
    with sqlite3.connect(tmp_path / "history.db") as base:
        base.executescript("DROP TRIGGER drawn_added; DROP TRIGGER drawn_removed; DROP TABLE drawn_words;")
    for _ in range(2):
        index.open()
        assert [entry.prompt for entry in index.search(HistoryQuery(text="red sq"))] == ["a red square"]
    index.add([entry_of(99, "a red sqrt")])
    assert len(index.search(HistoryQuery(text="red sq"))) == 2


@pytest.mark.fault(173)
@pytest.mark.parametrize(
    "wanted", [HistoryQuery(text="zzzz"), HistoryQuery(text="a b c d e f g h i"), HistoryQuery(prefix="other/")]
)
def test_a_fruitless_search_reads_few_rows(tmp_path: Path, wanted: HistoryQuery) -> None:
    """SQLite's step count grows by less than half of what ten times the entries would make it."""
    steps = []
    for entries in (300, 3000):
        folder = tmp_path / str(entries)
        folder.mkdir()
        index = filled(folder, [f"a red square number {number} on blue" for number in range(entries)])
        counted = 0

        def count() -> int:
            nonlocal counted
            counted += 1
            return 0

        connect = sqlite3.connect

        def counting(*given: Any, connect: Any = connect, count: Any = count, **named: Any) -> sqlite3.Connection:
            base: sqlite3.Connection = connect(*given, **named)
            base.set_progress_handler(count, 10)
            return base

        sqlite3.connect = counting  # type: ignore[assignment]  # counts what this search does, and nothing else
        try:
            assert index.search(wanted) == []
        finally:
            sqlite3.connect = connect
        steps.append(counted)
    assert steps[1] < 5 * max(steps[0], 20)


@pytest.mark.fault(173)
async def test_searches_of_one_caller_are_bounded_and_leave_the_threads_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every search blocked, one caller gets 429 above its limit; readiness and files still answer."""
    gate, entered = threading.Event(), threading.Semaphore(0)

    def held(self: HistoryIndex, wanted: HistoryQuery) -> list[HistoryEntry]:
        entered.release()
        gate.wait(30)
        return []

    monkeypatch.setattr(HistoryIndex, "search", held)
    app = create_app(settings_in(tmp_path), load=lambda settings: FakeDenoiser())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client,
    ):
        asked = [asyncio.create_task(client.get("/history?q=zzzz")) for _ in range(MAX_PER_CALLER + 50)]
        try:
            for refused, done in enumerate(asyncio.as_completed(asked, timeout=30), 1):
                answer = await done
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "1"
                if refused == 50:
                    break
            async with asyncio.timeout(30):
                assert (await client.get("/healthz")).status_code == 200
                assert (await client.get("/readyz")).status_code in (200, 503)
                assert (await client.get("/files/static/uploads/none.webp")).status_code == 404
        finally:
            gate.set()
        answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200] * MAX_PER_CALLER + [429] * 50


def test_a_search_may_be_asked_again_when_the_others_have_ended(running_app: RunningApp) -> None:
    """The caller's count of running searches decreases again."""
    for _ in range(3 * MAX_PER_CALLER):
        assert running_app.client.get("/history?q=zzzz").status_code == 200
