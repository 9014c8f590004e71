"""Chromium over a server of painted squares: pages that keep what their console said and whom they asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import ROOT, Server, free_port, start_server
from fakes import until

CHROMIUM = Path("/usr/bin/chromium")
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
_PATIENCE = 30_000


@dataclass
class Tab:
    """A page of the browser. `complaints` are the errors its console told, `asked` the hosts it sent requests to."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def told(self, text: str) -> None:
        """Wait until a panel says this."""
        self.page.locator(".sds-told:visible", has_text=text).first.wait_for(timeout=_PATIENCE)


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server process over painted squares, with its studio opened."""
    port = free_port()
    script = ROOT / "tests" / "painted_server.py"
    running = start_server(tmp_path_factory.mktemp("painted"), port, sys.executable, str(script), PORT=str(port))
    httpx.get(f"{running.url}/ui")
    until(lambda: "gradio" in httpx.get(f"{running.url}/ui/").text, 120)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's browser, where there is one."""
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def tab_of(chromium: Any, painted: Server) -> Iterator[Callable[..., Tab]]:
    """Open the studio in a page of its own."""
    contexts: list[Any] = []

    def open_tab(url: str = painted.url, **options: Any) -> Tab:
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(_PATIENCE)
        tab = Tab(page)
        page.on("request", lambda request: tab.asked.add(urlsplit(request.url).hostname or ""))
        page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: tab.complaints.append(message.text) if message.type == "error" else None,
        )
        page.goto(f"{url}/ui/")
        page.get_by_label("Prompt", exact=True).first.wait_for()
        return tab

    yield open_tab
    for context in contexts:
        context.close()
