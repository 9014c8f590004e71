"""Half an hour or more of random mixed load; the same images are generated alone before and after.

    python benchmarks/long_soak.py [minutes] [at once] [plot.svg]

Tasks, sizes, formats, routes and endings are random: synchronous requests, jobs that are followed, cancelled or too
late, clients that disconnect, cache hits, concurrent equal requests, replays, and invalid requests. Each response is
checked: its status, and the size and decodability of its image. The probe images are requested one at a time on an idle
server, so their pixels must be equal at both ends. The server's memory, descriptors and threads are recorded
throughout.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import random
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from loopback import say
from PIL import Image
from watching import Watch, asked_for_health, machine, milliseconds, plotted, serving

MINUTES = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
AT_ONCE = int(sys.argv[2]) if len(sys.argv) > 2 else 16
PLOT = Path(sys.argv[3]) if len(sys.argv) > 3 else None
CREATE, STYLE, INPAINT = "/create_and_upload_image", "/style_transfer_and_upload_image", "/inpaint_and_upload_image"
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
THINGS = ("circle", "square", "star", "hexagon", "triangle", "heart")
SIDES = (64, 96, 128, 128, 128, 160, 192, 256)
ASYNC = {"Prefer": "respond-async"}
# Invalid requests, and the status code that each must get.
WRONG: tuple[tuple[str, dict[str, Any], int], ...] = (
    (CREATE, {}, 422),
    (CREATE, {"prompt": "a", "width": 1_000_000_000}, 422),
    (CREATE, {"prompt": "a", "seed": -1}, 422),
    (CREATE, {"prompt": "a", "num_inference_steps": 0}, 422),
    (CREATE, {"prompt": "a", "save_path": "../../escape.webp"}, 422),
    (CREATE, {"prompt": "a", "colour": "red"}, 422),
    (CREATE, {"prompt": "a" * 33_000}, 422),
    (STYLE, {"prompt": "a", "image_url": "http://127.0.0.1:1/a.png"}, 422),
    ("/v1/images/generations", {"prompt": "a", "n": 11}, 400),
)


@dataclass
class Soak:
    """One client: what it requested, the results, and the errors."""

    client: httpx.AsyncClient
    chance: random.Random
    until: float
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    made: deque[tuple[dict[str, Any], bytes]] = field(default_factory=lambda: deque(maxlen=64))
    count: int = 0

    async def run(self) -> None:
        """Send requests until the time is over."""
        ways = (
            (self.waits, 40),
            (self.job, 10),
            (self.followed_job, 6),
            (self.cancelled_job, 6),
            (self.hangs_up, 6),
            (self.deadline, 5),
            (self.hit, 12),
            (self.twins, 4),
            (self.replay, 5),
            (self.mistake, 10),
            (self.looks, 4),
        )
        while time.monotonic() < self.until:
            ((way, _),) = self.chance.choices(ways, [share for _, share in ways])
            try:
                came_to = await way()
            except httpx.HTTPError as error:
                came_to = f"broken off ({type(error).__name__})"
                self.wrong[f"{way.__name__}: {came_to}"] += 1
            self.outcomes[f"{way.__name__}: {came_to}"] += 1

    def order(self) -> tuple[str, dict[str, str], dict[str, bytes]]:
        """Path, parameters and files of a request of any task."""
        self.count += 1
        width, height = self.chance.choice(SIDES), self.chance.choice(SIDES)
        colour, behind = self.chance.choice(COLOURS), self.chance.choice(COLOURS)
        prompt = f"a {colour} {self.chance.choice(THINGS)} on a {behind} background"
        fields = {
            "prompt": prompt if self.chance.random() < 0.7 else f"{prompt}, number {self.chance.randrange(10**6)}",
            "seed": str(self.chance.randrange(2**32)),
            "num_inference_steps": str(self.chance.randrange(2, 9)),
            "model": self.chance.choice(("sdxl", "sdxl", "flux")),
            "format": self.chance.choice(("webp", "png", "jpeg")),
        }
        if self.chance.random() < 0.3:
            fields["save_path"] = f"{self.chance.randrange(16)}/{id(self)}-{self.count}"
        match self.chance.randrange(4):
            case 0:
                edges = self.chance.random() < 0.5 and fields["model"] == "sdxl"  # the embedded Flux has no ControlNet
                fields |= {"strength": "0.6", "canny": str(edges).lower()}
                return STYLE, fields, {"image_file": picture(self.chance, width, height)}
            case 1:
                files = {"image_file": picture(self.chance, width, height), "mask_file": mask(width, height)}
                return INPAINT, fields | {"strength": "0.8"}, files
        return CREATE, fields | {"width": str(width), "height": str(height)}, {}

    async def ask(self, headers: dict[str, str] | None = None, **more: str) -> tuple[httpx.Response, dict[str, Any]]:
        """Send any request, as a form."""
        path, fields, files = self.order()
        fields |= more
        named = {name: (name, data) for name, data in files.items()}
        answer = await self.client.post(path, data=fields, files=named or None, headers=headers)
        return answer, {"path": path, "fields": fields, "files": named}

    def checked(self, answer: httpx.Response, *fine: int) -> str:
        """The status code; an unexpected one is recorded as an error."""
        if answer.status_code not in fine:
            self.wrong[f"{answer.status_code} {answer.text[:160]}"] += 1
        return str(answer.status_code)

    async def waits(self) -> str:
        """A synchronous request; downloads and checks its image."""
        answer, asked = await self.ask()
        reported = self.checked(answer, 200, 429)
        if answer.status_code == 200:
            receipt = answer.json()
            file = (await self.client.get(httpx.URL(receipt["path"]).path)).content
            with Image.open(io.BytesIO(file)) as image:
                image.load()
                if image.size != (receipt["width"], receipt["height"]):
                    self.wrong[f"{image.size} instead of {receipt['width']} × {receipt['height']}"] += 1
            self.made.append((asked, file))
        return reported

    async def job(self) -> str:
        """A job that is polled until it has ended."""
        answer, _ = await self.ask(ASYNC)
        reported = self.checked(answer, 202, 429)
        return await self.ended(answer) if answer.status_code == 202 else reported

    async def ended(self, answer: httpx.Response, *fine: str) -> str:
        """The final state of a job."""
        path = answer.headers["location"]
        while (standing := (await self.client.get(path)).json())["state"] in ("queued", "running"):  # noqa: ASYNC110  # polls
            await asyncio.sleep(0.2)
        if standing["state"] not in (fine or ("done",)):
            self.wrong[f"job {standing['state']}: {standing.get('problem')}"] += 1
        return str(standing["state"])

    async def followed_job(self) -> str:
        """A job whose events are read to the last one."""
        answer, _ = await self.ask(ASYNC)
        if answer.status_code != 202:
            return self.checked(answer, 429)
        events = (await self.client.get(f"{answer.headers['location']}/events")).text
        if "event: done" not in events:
            self.wrong[f"no end in {events[-200:]!r}"] += 1
        return "followed"

    async def cancelled_job(self) -> str:
        """A job that is cancelled at a random moment."""
        answer, _ = await self.ask(ASYNC)
        if answer.status_code != 202:
            return self.checked(answer, 429)
        await asyncio.sleep(self.chance.random())
        await self.client.delete(answer.headers["location"])
        return await self.ended(answer, "done", "cancelled")

    async def hangs_up(self) -> str:
        """A client with a short timeout."""
        path, fields, files = self.order()
        named = {name: (name, data) for name, data in files.items()}
        patience = self.chance.uniform(0.02, 1.0)
        try:
            answer = await self.client.post(path, data=fields, files=named or None, timeout=patience)
        except httpx.TimeoutException:
            return "gone"
        return self.checked(answer, 200, 429)

    async def deadline(self) -> str:
        """A request whose deadline may pass."""
        answer, _ = await self.ask(timeout=f"{self.chance.uniform(0.02, 1.5):.3f}")
        return self.checked(answer, 200, 429, 504)

    async def hit(self) -> str:
        """A request that was answered before."""
        if not self.made:
            return "nothing yet"
        asked, _ = self.chance.choice(self.made)
        answer = await self.client.post(asked["path"], data=asked["fields"], files=asked["files"] or None)
        reported = self.checked(answer, 200)
        if answer.status_code == 200 and not answer.json()["cached"]:
            self.wrong["a stored order was drawn again"] += 1
        return reported

    async def twins(self) -> str:
        """Four concurrent equal requests, which must return one image."""
        path, fields, files = self.order()
        named = {name: (name, data) for name, data in files.items()}
        asked = [self.client.post(path, data=fields, files=named or None) for _ in range(4)]
        answers = await asyncio.gather(*asked)
        reported = {self.checked(answer, 200, 429) for answer in answers}
        drawn = [answer.json() for answer in answers if answer.status_code == 200]
        if len({receipt["path"] for receipt in drawn}) > 1:
            self.wrong["twins with several pictures"] += 1
        return ", ".join(sorted(reported))

    async def replay(self) -> str:
        """Replay an image of this server from its own file."""
        if not self.made:
            return "nothing yet"
        asked, file = self.chance.choice(self.made)
        files = {"picture_file": ("a", file), **asked["files"]}
        answer = await self.client.post("/v1/replay", files=files)
        return self.checked(answer, 200, 429)

    async def mistake(self) -> str:
        """An invalid request."""
        path, parameters, status = self.chance.choice(WRONG)
        if self.chance.random() < 0.3:
            rubbish = {"image_file": ("a.png", self.chance.randbytes(2000))}
            return self.checked(await self.client.post(STYLE, data={"prompt": "a"}, files=rubbish), 415, 422)
        return self.checked(await self.client.post(path, json=parameters), status)

    async def looks(self) -> str:
        """Read-only routes, and the OpenAI dialect."""
        for path in ("/metrics", "/readyz", "/history", "/jobs", "/v1/models"):
            self.checked(await self.client.get(path), 200)
        body = {"prompt": "a red circle", "size": "128x128", "n": 1, "response_format": "b64_json"}
        answer = await self.client.post("/v1/images/generations", json=body)
        if answer.status_code == 200:
            base64.b64decode(answer.json()["data"][0]["b64_json"], validate=True)
        return self.checked(answer, 200, 429)


async def probes(client: httpx.AsyncClient) -> list[str]:
    """The digests of a few images, generated one at a time in the same order."""
    chance = random.Random(11)  # noqa: S311  # no secret
    image, repaint = picture(chance, 128, 128), mask(128, 128)
    common = {"prompt": "a red circle on a blue background", "seed": "7", "format": "png", "overwrite": "true"}
    found = []
    for model in ("sdxl", "flux"):
        orders: list[tuple[str, dict[str, str], dict[str, bytes]]] = [
            (CREATE, {"width": "128", "height": "128"}, {}),
            (CREATE, {"width": "256", "height": "192"}, {}),
            (STYLE, {"strength": "0.6", "canny": "false"}, {"image_file": image}),
            (INPAINT, {"strength": "0.8"}, {"image_file": image, "mask_file": repaint}),
        ]
        if model == "sdxl":
            orders.append((STYLE, {"strength": "0.6", "canny": "true"}, {"image_file": image}))
        for number, (path, fields, files) in enumerate(orders):
            asked = {**common, **fields, "model": model, "save_path": f"probes/{model}-{number}.png"}
            named = {name: (name, data) for name, data in files.items()}
            answer = (await client.post(path, data=asked, files=named or None)).raise_for_status()
            file = (await client.get(httpx.URL(answer.json()["path"]).path)).raise_for_status().content
            found.append(hashlib.sha256(np.asarray(Image.open(io.BytesIO(file)))).hexdigest())
    return found


async def soak(url: str) -> tuple[list[Soak], list[str], list[str]]:
    """The probes, the random load, and the probes again."""
    # The client closes idle connections before the server does, since a request may arrive just as the server closes
    # one.
    limits = httpx.Limits(max_connections=4 * AT_ONCE, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        before = await probes(client)
        until = time.monotonic() + 60 * MINUTES
        clients = [Soak(client, random.Random(number), until) for number in range(AT_ONCE)]  # noqa: S311  # no secret
        await asyncio.gather(*(each.run() for each in clients))
        for _ in range(600):  # cancelled and abandoned requests end at their next step
            figures = (await client.get("/metrics")).text
            if "sds_queue_running 0.0" in figures and "sds_queue_waiting 0.0" in figures:
                break
            await asyncio.sleep(0.1)
        return clients, before, await probes(client)


def main() -> None:
    """Start a server in an empty folder, run the soak test, print the results, stop the server."""
    with tempfile.TemporaryDirectory() as folder:
        # Small caches that fill within the first minutes, so that later growth is not due to caches.
        settings = {
            "QUEUE_LIMIT": "64",
            "RATE_LIMIT": "",
            "PROMPT_CACHE_BYTES": "4000000",
            "EXISTENCE_CACHE_SIZE": "500",
        }
        with serving(Path(folder), **settings) as (url, pid), Watch(pid) as watch, asked_for_health(url) as health:
            clients, before, after = asyncio.run(soak(url))
    outcomes, wrong = (sum((getattr(each, name) for each in clients), Counter[str]()) for name in ("outcomes", "wrong"))
    say(f"{machine()}.\n")
    say("| what | measured |\n| --- | --- |")
    say(f"| minutes; clients at once | {watch.at[-1] / 60:.1f}; {AT_ONCE} |")
    say(f"| requests | {outcomes.total()} |")
    say(f"| of them not as they should be | {wrong.total()} |")
    same = sum(one == other for one, other in zip(before, after, strict=True))
    say(f"| probes drawn alone before and after: equal to the bit | {same} of {len(before)} |")
    say(f"| `/healthz` in ms: half / 99 % / longest of {len(health)} | {milliseconds(health)} |")
    for row in watch.reported():
        say(row)
    say("\n| way: what came of it | how often |\n| --- | --- |")
    for what, number in sorted(outcomes.items()):
        say(f"| {what} | {number} |")
    for what, number in wrong.most_common():
        say(f"\nWrong, {number} times: {what}")
    if PLOT is not None:
        shown = {"memory in MB": watch.memory, "descriptors": watch.descriptors, "threads": watch.threads}
        PLOT.write_text(plotted(f"{MINUTES:g} minutes of everything, {AT_ONCE} at once", watch.at, shown))
    if wrong or before != after:
        raise SystemExit(1)


def picture(chance: random.Random, width: int, height: int) -> bytes:
    """An image file of two random colours, as PNG, JPEG or WebP."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:] = [chance.randrange(256) for _ in range(3)]
    pixels[height // 4 : height // 2, width // 4 : width // 2] = [chance.randrange(256) for _ in range(3)]
    return file_of(pixels, chance.choice(("PNG", "JPEG", "WEBP")))


def mask(width: int, height: int) -> bytes:
    """A mask that repaints the right half."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    return file_of(pixels, "PNG")


def file_of(pixels: np.ndarray, kind: str) -> bytes:
    """An image file of an array."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind)
    return target.getvalue()


if __name__ == "__main__":
    main()
