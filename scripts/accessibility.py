"""Checks every tab of the web UI with axe-core in Chromium; exits with 1 if a finding is serious.

npm install --prefix FOLDER axe-core
python -m scripts.accessibility --axe FOLDER/node_modules/axe-core/axe.min.js

Each tab is checked after opening and again after use, light and dark; Create also with error messages. Without --server
the script starts a server with the embedded models in an empty folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.loopback import say
from scripts.browser import DESK, TABS, ask, chromium, open_tab, server_at, studio
from scripts.studio_pictures import LOOKS, USES

SERIOUS = ("serious", "critical")
_MOST_NODES = 4
# Milliseconds; fade-in animations must have ended before a check.
_FADED_IN = 800


def main() -> None:
    """Check all tabs; print a table and the findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="", help="its address; without it one is started")
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of the npm package axe-core")
    given = parser.parse_args()
    rules = given.axe.read_text(encoding="utf-8")
    serious = 0
    with server_at(given.server) as server, chromium() as browser:
        say(f"axe-core {version(browser, rules)}, Chromium {browser.version}\n")
        say("| look | tab | rules passed | serious or critical | lesser |")
        say("| --- | --- | --- | --- | --- |")
        for look in ("light", "dark"):
            page = studio(browser, server, **DESK, color_scheme=look)
            page.evaluate(rules)
            for tab in TABS:
                open_tab(page, tab)
                serious += count_serious(page, look, tab)
                USES[tab](page, LOOKS[look])
                serious += count_serious(page, look, f"{tab}, used")
            serious += count_serious(with_invalid_width(page), look, "Create, with faults")
            page.context.close()
    say(f"\n{serious} serious or critical findings.")
    sys.exit(1 if serious else 0)


def with_invalid_width(page: Any) -> Any:
    """Request an invalid width and wait for the error message."""
    inside = open_tab(page, "Create")
    inside.get_by_label("Width").fill("9000")
    ask(inside, "a red circle on a blue background")
    page.locator("#sds-fault-create-width").wait_for()
    return page


def count_serious(page: Any, look: str, tab: str) -> int:
    """Run axe-core, print all findings, return the number of serious ones."""
    page.wait_for_timeout(_FADED_IN)
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    found = result["violations"]
    serious = [violation for violation in found if violation["impact"] in SERIOUS]
    say(f"| {look} | {tab} | {len(result['passes'])} | {len(serious)} | {len(found) - len(serious)} |")
    for violation in found:
        say(f"  {violation['impact']}: {violation['id']}: {violation['help']}")
        for node in violation["nodes"][:_MOST_NODES]:
            say(f"    {' '.join(node['html'].split())[:160]}")
    return len(serious)


def version(browser: Any, rules: str) -> str:
    """The version of axe-core."""
    page = browser.new_page()
    page.evaluate(rules)
    found: str = page.evaluate("axe.version")
    page.close()
    return found


if __name__ == "__main__":
    main()
