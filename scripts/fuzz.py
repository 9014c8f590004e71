"""Fuzzes the API with schemathesis: thousands of valid and invalid requests to a server with a fake model.

`python scripts/fuzz.py [--examples N] [--seed N]`: all checks except `positive_data_acceptance`, since requests that
match the schema may still be refused (an unknown model, text that is no image, a taken name).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import uvicorn

ROOT = Path(__file__).resolve().parent.parent
# 504 is allowed, because a request can set its own deadline; no other 5xx is. Long prompts exceed the 64 KiB of a URL.
_CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]

[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "414", "415", "422", "428", "429", "431"]
"""
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    """Start the server, run schemathesis, exit with its status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=60, help="cases for each operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    from fakes import FakeImageDenoiser, settings_in

    from stable_diffusion_server.app import BoundedProtocol, create_app
    from stable_diffusion_server.cli import open_listener

    with tempfile.TemporaryDirectory() as folder:
        settings = settings_in(Path(folder), port=0, log_level="error", max_side=256, queue_limit=1000)
        listening = open_listener(settings)
        app = create_app(settings, load=lambda settings: FakeImageDenoiser())
        server = uvicorn.Server(
            uvicorn.Config(app, http=BoundedProtocol, access_log=False, log_level="warning", proxy_headers=False)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        while not server.started or httpx.get(f"{url}/readyz").status_code != httpx.codes.OK:
            time.sleep(0.1)
        config = Path(folder) / "schemathesis.toml"
        config.write_text(_CONFIG)
        command = [
            *(
                str(Path(sys.executable).parent / "schemathesis"),
                "--config-file",
                str(config),
                "run",
                f"{url}/openapi.json",
            ),
            *(
                "--checks",
                "all",
                "--exclude-checks",
                "positive_data_acceptance",
                "--phases",
                "examples,coverage,fuzzing",
            ),
            *("--max-examples", str(asked.examples), "--seed", str(asked.seed), "--continue-on-failure"),
            *("--request-timeout", "20", "--generation-database", "none", "--no-color"),
        ]
        done = subprocess.run(command, cwd=folder, check=False)  # noqa: S603  # our own command, made here
        server.should_exit = True
        thread.join()
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
