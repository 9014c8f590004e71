"""Chromium over a server with the embedded models: pages that keep what their console said and whom they asked."""

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
    """A page of the browser. `complaints` are the errors its console told, `asked` the hosts it sent requests to."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def told(self, text: str) -> None:
        """Wait until a panel says this."""
        self.page.locator(".sds-message:visible", has_text=text).first.wait_for()

    def open(self, name: str) -> Any:
        """Go to a tab; what is in it."""
        return ui_browser.open_tab(self.page, name)

    @property
    def inside(self) -> Any:
        """What is in the tab that is seen."""
        return self.page.locator("[role=tabpanel]:visible")

    @property
    def picture(self) -> NDArray[np.int64]:
        """The first picture of the gallery that is seen: height × width × 3, 0 to 255."""
        source = self.inside.locator(".sds-gallery img").first.get_attribute("src")
        with Image.open(io.BytesIO(httpx.get(source).content)) as opened:
            return np.asarray(opened.convert("RGB")).astype(np.int64)

    def was_quiet(self) -> None:
        """Hold that the console told no error, and that nobody but the server was asked."""
        assert (self.complaints, self.asked - {""}) == ([], {"127.0.0.1"})


@pytest.fixture(scope="session")
def studio_server(server: Server) -> Server:
    """The server with the embedded models, its studio opened."""
    httpx.get(f"{server.url}/ui")
    until(lambda: "gradio" in httpx.get(f"{server.url}/ui/", timeout=60).text, 120)
    return server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's browser, where there is one."""
    if not ui_browser.CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    with ui_browser.chromium() as browser:
        yield browser


@pytest.fixture
def tab_of(chromium: Any, studio_server: Server) -> Iterator[Callable[..., Tab]]:
    """Open the studio in a page of its own."""
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
