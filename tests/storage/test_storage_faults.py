"""A storage that refuses temporarily or is slow, behind a whole server: nothing is lost, nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import RunningApp
from fakes import until
from storage_servers import KEYS, MisbehavingStore, StorageServer, make_s3_bucket, opened, r2_options, s3_client

from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.storage.base import Bucket

pytestmark = pytest.mark.slow


@pytest.fixture
def behind(
    s3_server: StorageServer, rascal_before: Callable[[StorageServer], MisbehavingStore]
) -> tuple[str, MisbehavingStore]:
    """A new bucket's name, and the proxy in front of it."""
    return make_s3_bucket(s3_server), rascal_before(s3_server)


@pytest.fixture
def bucket(behind: tuple[str, MisbehavingStore]) -> Bucket:
    """The bucket, opened."""
    name, rascal = behind
    return opened(r2_options(rascal.url, name))


@pytest.fixture
def running_app(run_app: Callable[..., RunningApp], behind: tuple[str, MisbehavingStore]) -> RunningApp:
    """A server that stores there."""
    name, rascal = behind
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    settings: dict[str, Any] = {"storage_provider": "r2", "bucket_name": name, "storage_timeout": 3.0, **keys}
    return run_app(r2_endpoint_url=rascal.url, public_base_url=f"{rascal.url}/{name}", **settings)


def keys_in(server: StorageServer, name: str) -> set[str]:
    listed = s3_client(server.url).list_objects_v2(Bucket=name).get("Contents", ())
    return {item["Key"].rpartition("/")[2] for item in listed} - {".stable-diffusion-server"}


@pytest.mark.fault(42)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_conflict_passes_and_the_writer_wins(
    bucket: Bucket, behind: tuple[str, MisbehavingStore], times: int
) -> None:
    """409 means a concurrent writer: checked again, retried, and stored once."""
    rascal = behind[1]
    rascal.only, before = {"PUT"}, len(rascal.requests)
    rascal.mischief.extend(["conflict"] * times)
    stored, won = bucket.create("k", b"data", "image/webp", {"seed": "7"})
    assert (won, stored.size, bucket.read("k")) == (True, 4, b"data")
    puts = [headers for method, _, headers in rascal.requests[before:] if method == "PUT"]
    assert len(puts) == times + 1
    assert {headers.get("If-None-Match") for headers in puts} == {"*"}


@pytest.mark.fault(42)
def test_a_conflict_that_another_writer_won_gives_what_is_stored(
    bucket: Bucket, behind: tuple[str, MisbehavingStore]
) -> None:
    """The loser gets the winner's object."""
    first, _ = bucket.create("k", b"first", "image/webp", {})
    rascal = behind[1]
    rascal.only = {"PUT"}
    rascal.mischief.append("conflict")
    assert bucket.create("k", b"second", "image/webp", {}) == (first, False)


@pytest.mark.fault(46, 49)
@pytest.mark.parametrize(("word", "sentence"), [("expired", "credentials"), ("skewed", "clock"), ("broken", "error")])
def test_a_refusal_is_one_sentence_and_passes(
    bucket: Bucket, behind: tuple[str, MisbehavingStore], word: str, sentence: str
) -> None:
    """503 with the cause and without a key; the same client works when the storage recovers."""
    rascal = behind[1]
    for act in (
        lambda: bucket.stat("k"),
        lambda: bucket.create("k", b"data", "image/webp", {}),
        lambda: bucket.read("k"),
    ):
        rascal.mischief.extend([word] * 9)
        with pytest.raises(StorageUnavailable) as raised:
            act()
        # A HEAD response has no body with an error code.
        assert sentence in raised.value.detail or act.__code__.co_names[0] == "stat"
        assert "AKIA" not in raised.value.detail
        rascal.mischief.clear()
    assert bucket.create("k", b"data", "image/webp", {})[1]


@pytest.mark.fault(46, 49)
@pytest.mark.parametrize("word", ["expired", "skewed"])
def test_while_writes_are_refused_no_picture_is_lost(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], s3_server: StorageServer, word: str
) -> None:
    """Generated, returned, spooled; uploaded once the storage accepts writes again."""
    name, rascal = behind
    rascal.only = {"PUT", "HEAD"}
    rascal.mischief.extend(["", *[word] * 500])
    answer = running_app.draw(prompt="a red square", save_path="kept.webp")
    assert (answer.status_code, answer.json()["stored"]) == (200, False), answer.text
    assert keys_in(s3_server, name) == set()
    rascal.mischief.clear()
    until(lambda: keys_in(s3_server, name) == {"kept.webp"}, 60)
    assert running_app.draw(prompt="a red square", save_path="kept.webp").json()["cached"]


@pytest.mark.fault(48)
def test_a_slow_storage_does_not_hold_the_device(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], s3_server: StorageServer
) -> None:
    """While one upload hangs, the next images are generated, and all arrive."""
    name, rascal = behind
    rascal.only = {"PUT"}
    rascal.mischief.extend(["slow"] * 500)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(running_app.draw, prompt="a red square", save_path="0.webp")]
        until(lambda: any(method == "PUT" and path.endswith("0.webp") for method, path, _ in rascal.requests))
        answers += [pool.submit(running_app.draw, prompt=f"a red square {n}", save_path=f"{n}.webp") for n in (1, 2, 3)]
        until(lambda: len(running_app.squares.finished) == 4)
        assert not rascal.release.is_set()
        assert all(answer.result(60).status_code == 200 for answer in answers)
    assert keys_in(s3_server, name) == set()
    rascal.mischief.clear()
    rascal.release.set()
    until(lambda: keys_in(s3_server, name) == {f"{n}.webp" for n in range(4)}, 60)
