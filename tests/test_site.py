"""The documentation site: strict build, no broken link or image, every page is in the menu."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

PAGES = (
    "index http-api jobs openai-and-automatic1111 replicate agents clients errors troubleshooting glossary "
    "architecture api ui models storage settings security scaling deploying commands AGENTS CONTRIBUTING "
    "CHANGELOG models/index"
).split()


class Page(HTMLParser):
    """A page's links and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it; a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)  # noqa: S603  # ours
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    """Pages, images and headings; external links are not checked."""
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    broken = []
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            place = unquote(parts.fragment)
            followed += 1
            if not target.is_file() or (place and target in pages and place not in pages[target].places | {"__top"}):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert followed > 500


def test_every_page_is_in_the_menu(site: Path) -> None:
    """Required pages exist, and none is unreachable."""
    front = (site / "index.html").read_text()
    assert [page for page in PAGES if not (site / f"{page}.html").is_file()] == []
    assert [page for page in PAGES[1:] if f'href="{page}.html"' not in front] == []
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")} - {"404.html", "index.html"}
    assert {name for name in built if f'href="{name}"' not in front} == set()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """No external fonts, scripts or images: a reader is not revealed to anyone."""
    found = [
        address
        for path in site.rglob("*.html")
        for address in re.findall(r'(?:src|<link[^>]* href)="(https?://[^"]+)"', path.read_text())
    ]
    assert found == []
