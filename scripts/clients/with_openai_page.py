"""Runs with_openai.mjs in a web page of another origin: `SERVER=… NODE_FOLDER=… python with_openai_page.py`.

NODE_FOLDER is a folder where `npm install openai esbuild` was run; the server's CORS_ORIGINS must list the page's
origin, http://127.0.0.1:8201 unless PAGE_PORT is another. Needs the project's own environment (playwright, Chromium).
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from cells import KEY, SERVER

from scripts.browser import chromium

HERE = Path(__file__).resolve().parent
PAGE_PORT = int(os.environ.get("PAGE_PORT", "8201"))
_PAGE = f"""
import OpenAI from "openai";
import {{ VERSION }} from "openai/version";
import {{ ClientReport }} from "./cells.mjs";
import {{ everyColumn }} from "./with_openai.mjs";
const options = {{ baseURL: "{SERVER}/v1", apiKey: "{KEY}", maxRetries: 0, dangerouslyAllowBrowser: true }};
const report = new ClientReport(`openai (Node) ${{VERSION}} in a page of another origin`, window.report);
await everyColumn(new OpenAI(options), report, false);
window.ended();
"""


def main() -> None:
    """Bundle, serve and open the page, and print what it reports."""
    with tempfile.TemporaryDirectory() as folder:
        bundle(Path(folder))
        handler = functools.partial(QuietHandler, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", PAGE_PORT), handler) as pages:
            threading.Thread(target=pages.serve_forever, daemon=True).start()
            follow(f"http://127.0.0.1:{PAGE_PORT}/index.html")
            pages.shutdown()


def bundle(folder: Path) -> None:
    """Write the page and its script into `folder`."""
    modules = (Path(os.environ["NODE_FOLDER"]) / "node_modules").resolve()  # esbuild runs in another folder
    (folder / "node_modules").symlink_to(modules)
    for script in ("cells.mjs", "with_openai.mjs"):
        shutil.copy(HERE / script, folder)
    (folder / "page.mjs").write_text(_PAGE)
    options = ["--bundle", "--format=esm", "--outfile=page.js", "--log-level=error"]
    command = [modules / ".bin" / "esbuild", "page.mjs", *options]
    subprocess.run(command, cwd=folder, check=True)  # noqa: S603  # esbuild, on our own files
    (folder / "index.html").write_text('<!doctype html><script type="module" src="page.js"></script>')


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a line per request."""

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def follow(url: str) -> None:
    """Open the page and wait until it has reported everything."""
    ended = threading.Event()
    with chromium() as browser:
        page = browser.new_page()
        page.expose_function("report", lambda line: (sys.stdout.write(f"{line}\n"), sys.stdout.flush(), None)[-1])
        page.expose_function("ended", ended.set)
        page.on("pageerror", lambda error: sys.stderr.write(f"{error}\n"))
        page.goto(url)
        for _ in range(300):
            if ended.is_set():
                return
            page.wait_for_timeout(1_000)
        raise SystemExit("the page did not end")


if __name__ == "__main__":
    main()
