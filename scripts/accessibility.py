"""Holds every tab of the studio against axe-core's rules, in Chromium; ends with 1 at a serious finding.

npm install --prefix FOLDER axe-core
python -m scripts.accessibility --axe FOLDER/node_modules/axe-core/axe.min.js

Each tab is looked at as it is opened and once more after it was used, light and dark; Create also with faults beside
its fields. It starts a server with the embedded models in an empty folder, unless one is named by --server.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.loopback import say
from scripts.studio_pictures import LOOKS, USES
from scripts.visiting import DESK, TABS, ask, chromium, open_tab, server_at, studio

GRAVE = ("serious", "critical")
_MOST_NODES = 4
# In milliseconds: what fades in is judged when it has.
_FADED_IN = 800


def main() -> None:
    """Look at everything, print a table and what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="", help="its address; without it one is started")
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of the npm package axe-core")
    given = parser.parse_args()
    rules = given.axe.read_text(encoding="utf-8")
    graves = 0
    with server_at(given.server) as server, chromium() as browser:
        say(f"axe-core {version(browser, rules)}, Chromium {browser.version}\n")
        say("| look | tab | rules passed | serious or critical | lesser |")
        say("| --- | --- | --- | --- | --- |")
        for look in ("light", "dark"):
            page = studio(browser, server, **DESK, color_scheme=look)
            page.evaluate(rules)
            for tab in TABS:
                open_tab(page, tab)
                graves += judged(page, look, tab)
                USES[tab](page, LOOKS[look])
                graves += judged(page, look, f"{tab}, used")
            graves += judged(misused(page), look, "Create, with faults")
            page.context.close()
    say(f"\n{graves} serious or critical findings.")
    sys.exit(1 if graves else 0)


def misused(page: Any) -> Any:
    """The page with a size that cannot be, and the sentence about it."""
    inside = open_tab(page, "Create")
    inside.get_by_label("Width").fill("9000")
    ask(inside, "a red circle on a blue background")
    page.locator("#sds-fault-create-width").wait_for()
    return page


def judged(page: Any, look: str, tab: str) -> int:
    """How many grave findings there are; each is printed."""
    page.wait_for_timeout(_FADED_IN)
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    found = result["violations"]
    graves = [violation for violation in found if violation["impact"] in GRAVE]
    say(f"| {look} | {tab} | {len(result['passes'])} | {len(graves)} | {len(found) - len(graves)} |")
    for violation in found:
        say(f"  {violation['impact']}: {violation['id']}: {violation['help']}")
        for node in violation["nodes"][:_MOST_NODES]:
            say(f"    {' '.join(node['html'].split())[:160]}")
    return len(graves)


def version(browser: Any, rules: str) -> str:
    """Which axe-core it is."""
    page = browser.new_page()
    page.evaluate(rules)
    told: str = page.evaluate("axe.version")
    page.close()
    return told


if __name__ == "__main__":
    main()
