"""MkDocs hooks: add pages from outside docs/ (root pages, benchmark results, the model card) to the site.

Links between pages work in the repository and in the site: `../CHANGELOG.md` in docs/ and `docs/jobs.md` in the root
are rewritten.
"""

from __future__ import annotations

import posixpath
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
EXTRA_PAGES = ("AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "models/README.md", "benchmarks/results/*.*")
_LINK = re.compile(r"(\]\()([^)#\s]+)([)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages from elsewhere and expand the patterns in `nav`."""
    for pattern in EXTRA_PAGES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    pages = sorted(file.src_uri for file in files.documentation_pages())
    taken: set[str] = set()
    config.nav = _named(config.nav, pages, taken)
    return files


def _named(entries: list[Any], pages: list[str], taken: set[str]) -> list[Any]:
    """Replace each pattern by the pages that it matches and that no earlier one took; drop empty titles."""
    named: list[Any] = []
    for entry in entries:
        if isinstance(entry, str):
            found = [page for page in pages if fnmatch(page, entry) and page not in taken]
            found = [page for page in found if page.count("/") == entry.count("/")]
            taken.update(found)
            named += found
        else:
            ((title, inner),) = entry.items()
            below = _named(inner if isinstance(inner, list) else [inner], pages, taken)
            if below:
                named.append({title: below if isinstance(inner, list) else below[0]})
    return named


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite repository links to site links."""
    source = page.file.src_uri
    is_extra = any(fnmatch(source, pattern) for pattern in EXTRA_PAGES)
    folder = posixpath.dirname(source if is_extra else f"docs/{source}")

    def rewritten(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if ":" in target or target.startswith("/"):
            return match[0]
        there = posixpath.normpath(posixpath.join(folder, target))
        inside = there.removeprefix("docs/")
        if files.get_file_from_path(inside) is None:
            if there == "README.md":
                inside = "index.md"
            else:
                return match[0]
        return f"{before}{posixpath.relpath(inside, posixpath.dirname(source) or '.')}{after}"

    return _LINK.sub(rewritten, markdown)
