"""The server with remote buckets: real server processes, an S3 server and a GCS emulator on loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from conftest import ROOT, Server, free_port, start_server
from fakes import until
from storage_servers import (
    SECRET,
    StorageServer,
    make_gcs_bucket,
    make_s3_bucket,
    s3_client,
    start_s3,
)

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}
SERVE = (sys.executable, "-m", "stable_diffusion_server", "serve")


def r2_settings(url: str, name: str, **more: str) -> dict[str, str]:
    return {
        "STORAGE_PROVIDER": "r2",
        "R2_ENDPOINT_URL": url,
        "BUCKET_NAME": name,
        "PUBLIC_BASE_URL": f"{url}/{name}",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        **more,
    }


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start server processes, each with a port and, by default, a separate folder."""
    running: list[Server] = []

    def start(name: str = "one", **environment: str) -> Server:
        folder, port = tmp_path / name, free_port()
        folder.mkdir(exist_ok=True)
        running.append(start_server(folder, port, *SERVE, PORT=str(port), CPU_THREADS="1", **environment))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.stop()


def ask(server: Server, **parameters: Any) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}{CREATE}", params={"prompt": "a red circle", **SMALL, **parameters}, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def objects_in(url: str, name: str) -> dict[str, bytes]:
    client = s3_client(url)
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=name, Prefix="static/uploads/").get("Contents", ())]
    found = {key: client.get_object(Bucket=name, Key=key)["Body"].read() for key in keys}
    return {key: data for key, data in found.items() if not key.endswith(".stable-diffusion-server")}


@dataclass(frozen=True)
class Shared:
    """A bucket that several servers share: their settings, its public base URL, its content."""

    settings: dict[str, str]
    base: str
    objects: Callable[[], dict[str, bytes]]


@pytest.fixture(params=["r2", "gcs"])
def shared(request: pytest.FixtureRequest, s3_server: StorageServer, gcs_server: StorageServer) -> Shared:
    """A new bucket of each kind."""
    if request.param == "r2":
        name = make_s3_bucket(s3_server)
        settings = r2_settings(s3_server.url, name, STORAGE_TIMEOUT="60")
        return Shared(settings, f"{s3_server.url}/{name}", lambda: objects_in(s3_server.url, name))
    name = make_gcs_bucket(gcs_server)
    base = f"{gcs_server.url}/{name}"
    settings = {"STORAGE_PROVIDER": "gcs", "BUCKET_NAME": name, "PUBLIC_BASE_URL": base, "STORAGE_TIMEOUT": "60"}

    def objects() -> dict[str, bytes]:
        listed = httpx.get(f"{gcs_server.url}/storage/v1/b/{name}/o", params={"prefix": "static/uploads/"}).json()
        keys = [item["name"] for item in listed["items"] if not item["name"].endswith(".stable-diffusion-server")]
        return {key: httpx.get(f"{base}/{quote(key)}").content for key in keys}

    return Shared({**settings, "STORAGE_EMULATOR_HOST": gcs_server.url}, base, objects)


@pytest.mark.fault(41)
def test_two_servers_share_a_bucket(serving: Callable[..., Server], shared: Shared) -> None:
    """Responses of first, cached and other servers' images have one working URL.

    20 requests sent to both are 20 objects.
    """
    with ThreadPoolExecutor(2) as starters:
        one, two = starters.map(lambda folder: serving(folder, **shared.settings), ("one", "two"))
    first = ask(one, save_path="a b/100%+猫.webp")
    assert (first["cached"], first["stored"]) == (False, True)
    assert first["path"] == f"{shared.base}/static/uploads/a%20b/100%25%2B%E7%8C%AB.webp"
    for server in (one, two):
        again = ask(server, save_path="a b/100%+猫.webp")
        assert (again["cached"], again["stored"], again["path"]) == (True, True, first["path"])
    picture = httpx.get(first["path"])
    assert (picture.status_code, picture.content[8:12]) == (200, b"WEBP")
    with ThreadPoolExecutor(40) as pool:
        orders = [(server, number) for number in range(20) for server in (one, two)]
        receipts = list(pool.map(lambda order: ask(order[0], prompt=f"a blue square {order[1]}"), orders))
    stored = shared.objects()
    assert len(stored) == 21
    for (_, number), receipt in zip(orders, receipts, strict=True):
        assert receipt["path"] == receipts[2 * number]["path"]
        assert httpx.get(receipt["path"]).content == stored[receipt["key"]]
    drawn = sum(not receipt["cached"] for receipt in receipts)
    print(f"{len(receipts)} answers, {drawn} of them drawn, {len({r['key'] for r in receipts})} objects, one URL each")  # noqa: T201  # shown with -s
    assert not list((one.folder / "data" / "spool").iterdir())


@pytest.mark.fault(44)
def test_an_outage_loses_no_picture(serving: Callable[..., Server], tmp_path: Path) -> None:
    """Storage down: ten images returned all the same. Server killed, storage up: all ten in the bucket."""
    storage = start_s3(tmp_path)
    make_s3_bucket(storage, "pictures")
    settings = r2_settings(storage.url, "pictures", STORAGE_TIMEOUT="2")
    server = serving(**settings)
    storage.stop()
    pictures = {}
    for number in range(10):
        receipt = ask(server, save_path=f"{number}.webp", prompt=f"a green star {number}")
        assert receipt["stored"] is False
        assert [warning["code"] for warning in receipt["warnings"]][-1] == "stored-later"
        assert receipt["path"].startswith(f"{server.url}/files/")
        pictures[receipt["key"]] = httpx.get(receipt["path"]).content
        assert pictures[receipt["key"]][8:12] == b"WEBP"
    assert ask(server, save_path="3.webp", prompt="a green star 3")["cached"] is True
    server.stop(signal.SIGKILL)
    spool = server.folder / "data" / "spool"
    assert len(list(spool.glob("*.spool"))) == 10
    with ThreadPoolExecutor(1) as starter:
        starting = starter.submit(serving, **settings)
        until(lambda: "the storage is down" in server.log.read_text(), 60)
        storage = start_s3(tmp_path, storage.port)
        try:
            make_s3_bucket(storage, "pictures")
            again = starting.result()
            until(lambda: not list(spool.iterdir()), 90)
            assert objects_in(storage.url, "pictures") == pictures
            brought = ask(again, save_path="3.webp", prompt="a green star 3")
            assert (brought["cached"], brought["stored"]) == (True, True)
            assert brought["path"] == f"{storage.url}/pictures/static/uploads/3.webp"
            old = httpx.get(f"{again.url}/files/{brought['key']}", follow_redirects=True)
            assert old.content == pictures[brought["key"]], "the address given in the outage leads to the bucket now"
        finally:
            storage.stop()


def check_storage(folder: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(  # our own interpreter and program
        [sys.executable, "-m", "stable_diffusion_server", "check-storage"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert SECRET not in done.stdout
    return done.returncode, done.stdout


ALL_WELL = "open put stat conditional-put read address delete"


def lines_of(output: str) -> list[str]:
    return output.splitlines()[1:]


@pytest.mark.parametrize("signed", ["0", "60"])
def test_check_storage_finds_a_good_bucket_good(tmp_path: Path, s3_server: StorageServer, signed: str) -> None:
    """One line each, exit status 0, nothing left behind; with signed URLs as well."""
    name = make_s3_bucket(s3_server)
    status, output = check_storage(tmp_path, **r2_settings(s3_server.url, name, SIGNED_URL_SECONDS=signed))
    assert [line.split(maxsplit=1)[1].replace(" ", "-") for line in lines_of(output)] == ALL_WELL.split()
    assert {line.split()[0] for line in lines_of(output)} == {"ok"}
    assert status == 0
    assert objects_in(s3_server.url, name) == {}


def test_check_storage_finds_a_folder_good(tmp_path: Path) -> None:
    """The local bucket, which needs no setting at all."""
    status, output = check_storage(tmp_path)
    assert (status, output.count("  ok  ")) == (0, 7)


def test_check_storage_names_a_missing_bucket(tmp_path: Path, s3_server: StorageServer) -> None:
    """The error has the bucket's name and the setting."""
    status, output = check_storage(tmp_path, **r2_settings(s3_server.url, "no-such-bucket"))
    assert status == 1
    assert "  FAIL  open: There is no bucket 'no-such-bucket' at the storage (BUCKET_NAME)." in output


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[StorageServer, dict[str, str]]]:
    """An S3 server that checks signatures and permissions, and a read-only key."""
    server = start_s3(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="1000000")
    s3_client(server.url).create_bucket(Bucket="pictures")
    people = s3_client(server.url, service="iam")
    people.create_user(UserName="reader")
    reading = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
    rights = json.dumps({"Version": "2012-10-17", "Statement": [reading]})
    people.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=rights)
    key = people.create_access_key(UserName="reader")["AccessKey"]
    httpx.post(f"{server.url}/moto-api/reset-auth", content=b"0").raise_for_status()
    yield server, {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    server.stop()


def test_check_storage_tells_wrong_keys_from_missing_rights(
    tmp_path: Path, guarded: tuple[StorageServer, dict[str, str]]
) -> None:
    """An unknown key, a wrong secret, and a read-only key: three different sentences."""
    server, reader = guarded
    settings = r2_settings(server.url, "pictures")
    status, output = check_storage(tmp_path, **settings)
    assert status == 1
    assert "  FAIL  open: The storage does not accept the credentials (InvalidAccessKeyId)." in output
    wrong = {**settings, **reader, "AWS_SECRET_ACCESS_KEY": SECRET}
    assert "does not accept the credentials (SignatureDoesNotMatch)" in check_storage(tmp_path, **wrong)[1]
    status, output = check_storage(tmp_path, **{**settings, **reader})
    assert status == 1
    denied = "The storage does not let these credentials write to it: bucket 'pictures' (AccessDenied)."
    assert f"  FAIL  put: {denied}" in output
