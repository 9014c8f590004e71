"""Chromium with a server of the embedded models: pages that record console errors and requested hosts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from conftest import Server
from fakes import until
from numpy.typing import NDArray
from PIL import Image

from scripts import browser as ui_browser


@dataclass
class Tab:
    """A browser page. `complaints` are its console errors, `asked` the hosts it sent requests to."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def reported(self, text: str) -> None:
        """Wait until a panel shows this text."""
        self.page.locator(".sds-message:visible", has_text=text).first.wait_for()

    def open(self, name: str) -> Any:
        """Go to a tab; return its content."""
        return ui_browser.open_tab(self.page, name)

    @property
    def inside(self) -> Any:
        """Content of the visible tab."""
        return self.page.locator("[role=tabpanel]:visible")

    @property
    def picture(self) -> NDArray[np.int64]:
        """The first image of the visible gallery: height × width × 3, 0 to 255."""
        source = self.inside.locator(".sds-gallery img").first.get_attribute("src")
        with Image.open(io.BytesIO(httpx.get(source).content)) as opened:
            return np.asarray(opened.convert("RGB")).astype(np.int64)

    def was_quiet(self) -> None:
        """Assert that the console has no error, and that only the server was contacted."""
        assert (self.complaints, self.asked - {""}) == ([], {"127.0.0.1"})


@pytest.fixture(scope="session")
def studio_server(server: Server) -> Server:
    """A server of the embedded models, with its UI loaded."""
    httpx.get(f"{server.url}/ui")
    until(lambda: "gradio" in httpx.get(f"{server.url}/ui/", timeout=60).text, 120)
    return server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, if installed."""
    if not ui_browser.CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    with ui_browser.chromium() as browser:
        yield browser


@pytest.fixture
def tab_of(chromium: Any, studio_server: Server) -> Iterator[Callable[..., Tab]]:
    """Open the UI in a new page."""
    contexts: list[Any] = []

    def open_tab(url: str = studio_server.url, **options: Any) -> Tab:
        contexts.append(chromium.new_context(**{**ui_browser.DESK, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(ui_browser.PATIENCE)
        tab = Tab(page)
        page.on("request", lambda request: tab.asked.add(urlsplit(request.url).hostname or ""))
        page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: tab.complaints.append(message.text) if message.type == "error" else None,
        )
        page.goto(f"{url}/ui/")
        ui_browser.settle(page)
        return tab

    yield open_tab
    for context in contexts:
        context.close()
