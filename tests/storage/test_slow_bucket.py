"""A slow bucket: a flood of reads and deletions by one caller does not take the bucket and threads from others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from live_servers import LiveServer
from storage_servers import KEYS, MisbehavingStore, StorageServer, make_s3_bucket

pytestmark = pytest.mark.slow

STORED = "/files/static/uploads/none"
FLOODS = {
    "reads": ("GET", f"{STORED}-%d.webp"),
    "records": ("GET", f"{STORED}-%d.webp?record=1"),
    "heads": ("HEAD", f"{STORED}-%d.webp"),
    "deletions": ("DELETE", f"{STORED}-%d.webp"),
}
SECRETS = {"ann": "secret-of-ann-1234567", "bob": "secret-of-bob-1234567"}
CALL_SECONDS, PATIENCE = 1.0, 5.0


@pytest.fixture
def live(
    live_of: Callable[..., LiveServer], s3_server: StorageServer, rascal_before: Callable[..., MisbehavingStore]
) -> LiveServer:
    """A server with two keys whose bucket takes 1 s per call, and counts as down after 5 s."""
    slow = rascal_before(s3_server)
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    where = {"bucket_name": make_s3_bucket(s3_server), "r2_endpoint_url": slow.url, "storage_provider": "r2"}
    named = ",".join(f"{name}:{secret}" for name, secret in SECRETS.items())
    live = live_of(storage_timeout=PATIENCE, api_keys=named, **where, **keys)

    def pass_on_late(method: str, path: str, headers: object) -> str:
        time.sleep(CALL_SECONDS)
        return ""

    slow.rule = pass_on_late
    return live


@contextmanager
def flooded(live: LiveServer, floods: list[tuple[str, str]], at_once: int = 40) -> Iterator[list[int]]:
    """So many concurrent requests of Ann's, repeated while the block lasts; their statuses."""
    statuses: list[int] = []
    going = True

    def ask(number: int) -> None:
        with httpx.Client(base_url=live.url, headers={"X-API-Key": SECRETS["ann"]}, timeout=60) as client:
            turn = number
            while going:
                method, path = floods[turn % len(floods)]
                statuses.append(client.request(method, path % turn if "%d" in path else path).status_code)
                turn += at_once + 1
                if statuses[-1] == 429:
                    time.sleep(0.2)

    with ThreadPoolExecutor(at_once) as pool:
        asked = [pool.submit(ask, number) for number in range(at_once)]
        time.sleep(1.0)
        try:
            yield statuses
        finally:
            going = False
    for one in asked:
        one.result()


def drawn(live: LiveServer, prompt: str) -> dict[str, object]:
    """Bob's response to a prompt."""
    asked = {"prompt": prompt, "width": 64, "height": 64, "num_inference_steps": 2}
    answer = httpx.post(
        f"{live.url}/create_and_upload_image", json=asked, headers={"X-API-Key": SECRETS["bob"]}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.fault(193)
@pytest.mark.parametrize("kinds", [*([kind] for kind in FLOODS), list(FLOODS)], ids=lambda kinds: " and ".join(kinds))
def test_a_flood_at_a_slow_bucket_keeps_nobody_from_drawing(live: LiveServer, kinds: list[str]) -> None:
    """One key's requests wait for the bucket; another key's images are stored, and nothing counts as down."""
    with flooded(live, [FLOODS[kind] for kind in kinds]) as statuses:
        for number in range(2):
            began = time.monotonic()
            receipt = drawn(live, f"a red square {number}")
            assert receipt["stored"] is True, receipt
            assert time.monotonic() - began < 40
        readiness = httpx.get(f"{live.url}/readyz", headers={"X-API-Key": SECRETS["bob"]}, timeout=30)
        assert readiness.status_code == 200, readiness.text
        text = httpx.get(f"{live.url}/metrics", headers={"X-API-Key": SECRETS["bob"]}, timeout=30).text
    assert statuses, "nothing was flooded"
    assert 503 not in statuses
    failures = [line for line in text.splitlines() if line.startswith("sds_storage_failures")]
    assert failures
    assert float(failures[0].rsplit(" ", 1)[1]) == 0


@pytest.mark.fault(193)
@pytest.mark.parametrize("name", ["sd-models", "samplers", "loras"])
def test_lists_of_one_caller_leave_threads_to_others(
    live_of: Callable[..., LiveServer], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Eighty concurrent slow lists: one caller gets at most half of the slots, the rest is 429."""
    under_way, most = [0], [0]
    from stable_diffusion_server.api.automatic1111 import list_routes, responses

    function = {"sd-models": "models_body", "samplers": "samplers_body", "loras": "loras_body"}[name]
    right = getattr(responses, function)

    def slow(running_app: object) -> object:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        under_way[0] -= 1
        return right(running_app)

    monkeypatch.setattr(responses, function, slow)
    live = live_of(api_keys=",".join(f"{who}:{secret}" for who, secret in SECRETS.items()))
    with flooded(live, [("GET", f"/sdapi/v1/{name}")], 80) as statuses:
        headers = {"X-API-Key": SECRETS["bob"]}
        answer = httpx.get(f"{live.url}/sdapi/v1/{name}", headers=headers, timeout=30)
        assert answer.status_code == 200
        assert httpx.get(f"{live.url}/readyz", headers=headers, timeout=30).status_code == 200
    assert most[0] <= list_routes.LIST_CONCURRENCY
    assert {200, 429} == set(statuses)
