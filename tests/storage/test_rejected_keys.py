"""A name that the storage rejects: 422 for its own caller, no effect on other spooled objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import RunningApp
from fakes import until
from storage_servers import (
    KEYS,
    MisbehavingStore,
    Said,
    StorageServer,
    make_gcs_bucket,
    make_s3_bucket,
    opened,
    r2_options,
    refused,
    s3_client,
)

from stable_diffusion_server.app import commands
from stable_diffusion_server.errors import InvalidInput, StorageRefused, StorageUnavailable
from stable_diffusion_server.storage.dead_letters import DeadLetters

pytestmark = pytest.mark.slow

Rule = Callable[[str, str, Mapping[str, str]], str | Said]


def too_long(method: str, path: str, headers: Mapping[str, str]) -> str | Said:
    """As MinIO: no component of a name has more than 255 bytes. A HEAD response has no body with an error code."""
    if max(map(len, unquote(path.partition("?")[0]).encode().split(b"/"))) <= 255:
        return ""
    return Said(400) if method == "HEAD" else refused("KeyTooLongError", 400)


def denied_folder(method: str, path: str, headers: Mapping[str, str]) -> str | Said:
    """As a bucket policy that denies one folder."""
    return "" if "/poison" not in path else Said(403) if method == "HEAD" else refused("AccessDenied", 403)


def poisoned(code: str, status: int, methods: str = "PUT") -> Rule:
    """Every request with these methods and "poison" in the name is refused; no other is."""
    return lambda method, path, headers: refused(code, status) if "poison" in path and method in methods else ""


def word_for_poison(word: str) -> Rule:
    return lambda method, path, headers: word if "poison" in path and method == "PUT" else ""


# Rejection and name. The first group is permanent.
FOR_GOOD: dict[str, tuple[Rule, str]] = {
    "too long for the store": (too_long, "a" * 250 + "poison.webp"),
    "a denied folder": (denied_folder, "poison/a.webp"),
    "a bad name": (poisoned("XMinioInvalidObjectName", 400), "poison.webp"),
    "too large": (poisoned("EntityTooLarge", 413), "poison.webp"),
    "bad metadata": (poisoned("MetadataTooLarge", 400), "poison.webp"),
    "held by a lock": (poisoned("InvalidRequest", 422), "poison.webp"),
}
# The second group is transient.
FOR_NOW: dict[str, tuple[Rule, str]] = {
    "412 for what is not there": (poisoned("PreconditionFailed", 412), "poison.webp"),
    "500 for one name": (poisoned("InternalError", 500), "poison.webp"),
    "a connection that closes for one name": (word_for_poison("close"), "poison.webp"),
    "a put that hangs for one name": (word_for_poison("slow"), "poison.webp"),
}
ALL = {**FOR_GOOD, **FOR_NOW}


@pytest.fixture
def behind(
    s3_server: StorageServer, rascal_before: Callable[[StorageServer], MisbehavingStore]
) -> tuple[str, MisbehavingStore]:
    """A new bucket's name, and the proxy in front of it."""
    return make_s3_bucket(s3_server), rascal_before(s3_server)


@pytest.fixture
def running_app(run_app: Callable[..., RunningApp], behind: tuple[str, MisbehavingStore]) -> RunningApp:
    """A server that stores there."""
    return run_app(**settings_of(behind))


def settings_of(behind: tuple[str, MisbehavingStore]) -> dict[str, Any]:
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    where = {"bucket_name": behind[0], "r2_endpoint_url": behind[1].url}
    return {"storage_provider": "r2", "storage_timeout": 15.0, "rate_limit": "", **where, **keys}


def keys_in(server: StorageServer, name: str) -> set[str]:
    listed = s3_client(server.url).list_objects_v2(Bucket=name).get("Contents", ())
    return {item["Key"].removeprefix("static/uploads/") for item in listed} - {".stable-diffusion-server"}


def letters(running_app: RunningApp) -> list[str]:
    return [letter.key for letter in DeadLetters(running_app.folder / "data" / "dead-letters", 10**9).list_all()]


@pytest.mark.fault(132)
@pytest.mark.parametrize("kind", FOR_GOOD)
def test_a_refused_name_is_reported_to_its_caller_and_to_nobody_else(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], s3_server: StorageServer, kind: str
) -> None:
    """422 that names save_path; the next image is stored at once, nothing is spooled, the storage counts as up."""
    behind[1].rule, name = FOR_GOOD[kind]
    before = running_app.metric("sds_storage_failures_total")
    for _ in range(3):
        answer = running_app.draw(prompt="a red square", save_path=name)
        assert (answer.status_code, answer.json()["field"]) == (422, "save_path"), answer.text
    after = running_app.draw(prompt="a blue square", save_path="next.webp")
    assert (after.status_code, after.json()["stored"]) == (200, True)
    assert keys_in(s3_server, behind[0]) == {"next.webp"}
    assert (running_app.metric("sds_spool_pictures"), running_app.metric("sds_storage_failures_total")) == (0, before)
    assert running_app.client.get("/readyz").status_code == 200


@pytest.mark.fault(133)
@pytest.mark.parametrize("kind", ALL)
def test_a_poisoned_object_holds_up_nothing_that_is_spooled_behind_it(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], s3_server: StorageServer, kind: str
) -> None:
    """Spooled first in an outage, six others after it; then it alone is rejected: the others arrive, it stays."""
    rascal = behind[1]
    rule, name = ALL[kind]
    rascal.rule = lambda method, path, headers: "close"
    drawn = [running_app.draw(prompt="a red square", save_path=name)]
    drawn += [running_app.draw(prompt=f"a blue square {n}", save_path=f"{n}.webp") for n in range(6)]
    assert [(answer.status_code, answer.json()["stored"]) for answer in drawn] == [(200, False)] * 7
    rascal.rule = rule
    until(lambda: keys_in(s3_server, behind[0]) == {f"{n}.webp" for n in range(6)}, 60)
    fresh = running_app.draw(prompt="a green square", save_path="fresh.webp")
    assert fresh.json()["stored"], "the storage does not count as down"
    if kind in FOR_GOOD:
        until(lambda: letters(running_app) == [f"static/uploads/{name}"])
        assert running_app.metric("sds_dead_letters") == 1
    else:
        assert running_app.metric("sds_spool_pictures") == 1
    given = running_app.client.get(drawn[0].json()["path"])
    assert (given.status_code, given.content[8:12]) == (200, b"WEBP"), "its caller has an address of it"
    rascal.rule = lambda method, path, headers: ""
    rascal.release.set()
    if kind in FOR_GOOD:
        with suppress(SystemExit):
            commands.manage_dead_letters(running_app.folder / "data", "retry", ["all"])
    until(lambda: name in keys_in(s3_server, behind[0]), 60)
    until(lambda: (running_app.metric("sds_spool_pictures"), running_app.metric("sds_dead_letters")) == (0, 0))


@pytest.mark.fault(133)
def test_what_no_try_uploads_becomes_a_dead_letter(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the limit of attempts, here two, with the storage's own message."""
    monkeypatch.setattr("stable_diffusion_server.storage.spool_uploader._MAX_TRIES", 2)
    behind[1].rule = poisoned("PreconditionFailed", 412)
    assert not running_app.draw(prompt="a red square", save_path="poison.webp").json()["stored"]
    until(lambda: letters(running_app) == ["static/uploads/poison.webp"], 60)
    [letter] = DeadLetters(running_app.folder / "data" / "dead-letters", 10**9).list_all()
    assert "busy" in letter.reason


@pytest.mark.fault(132)
@pytest.mark.parametrize(("code", "status"), [("AccessDenied", 403), ("ExpiredToken", 400), ("InvalidRequest", 400)])
def test_a_refusal_of_every_name_is_of_the_storage(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], s3_server: StorageServer, code: str, status: int
) -> None:
    """Denied or expired for every name: images are spooled, no caller is refused for its name, none is quarantined."""
    behind[1].rule = lambda method, path, headers: refused(code, status) if method == "PUT" else ""
    for number in range(2):
        answer = running_app.draw(prompt="a red square", save_path=f"{number}.webp")
        assert (answer.status_code, answer.json()["stored"]) == (200, False), answer.text
    assert letters(running_app) == []
    behind[1].rule = lambda method, path, headers: ""
    until(lambda: keys_in(s3_server, behind[0]) == {"0.webp", "1.webp"}, 60)


@pytest.mark.fault(132)
def test_a_name_made_here_that_is_refused_is_not_its_callers_fault(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore]
) -> None:
    """No parameter is named, since none would help: 502, and the next named image is stored."""
    behind[1].rule = lambda method, path, headers: (
        refused("InvalidArgument", 400) if re.search(r"/[0-9a-f]{16,}[^/]*$", path) and method == "PUT" else ""
    )
    answer = running_app.draw(prompt="a red square")
    assert (answer.status_code, answer.json()["type"].rsplit(":", 1)[1]) == (502, "storage-refused"), answer.text
    assert running_app.draw(prompt="a red square", save_path="fine.webp").json()["stored"]


@pytest.mark.fault(132)
def test_who_may_not_list_gets_403_for_what_is_absent_and_draws(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], s3_server: StorageServer
) -> None:
    """AWS answers so without s3:ListBucket: not a rejection; the image is stored under its name."""
    there = keys_in(s3_server, behind[0])

    def rule(method: str, path: str, headers: Mapping[str, str]) -> str | Said:
        absent = path.rsplit("/", 1)[1] not in (".stable-diffusion-server", *there)
        return Said(403) if method == "HEAD" and absent else ""

    behind[1].rule = rule
    answer = running_app.draw(prompt="a red square", save_path="a.webp")
    assert (answer.status_code, answer.json()["stored"]) == (200, True), answer.text


@pytest.mark.fault(132)
def test_what_is_refused_of_every_object_alike_is_found_at_the_start(behind: tuple[str, MisbehavingStore]) -> None:
    """A bucket without ACLs and BUCKET_ACL set: the write probe uses the same options and fails the same way."""
    behind[1].rule = lambda method, path, headers: (
        refused("AccessControlListNotSupported", 400) if "x-amz-acl" in {name.lower() for name in headers} else ""
    )
    with pytest.raises(StorageUnavailable, match="AccessControlListNotSupported"):
        opened(r2_options(behind[1].url, behind[0], bucket_acl="public-read"))


@pytest.mark.fault(132)
def test_rights_without_those_to_delete_are_no_outage(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore]
) -> None:
    """The delete request fails; new images are stored at once."""
    key = running_app.draw(prompt="a red square", save_path="a.webp").json()["key"]
    before = running_app.metric("sds_storage_failures_total")
    behind[1].rule = lambda method, path, headers: refused("AccessDenied", 403) if method == "DELETE" else ""
    assert running_app.client.delete(f"/files/{key}").status_code == 502
    assert running_app.draw(prompt="a red square", save_path="b.webp").json()["stored"]
    assert running_app.metric("sds_storage_failures_total") == before


@pytest.mark.fault(132)
@pytest.mark.parametrize(("status", "methods"), [(400, "POST GET"), (403, "POST"), (413, "POST"), (412, "POST")])
def test_googles_refusals_of_one_name_stay_with_it(
    run_app: Callable[..., RunningApp],
    gcs_server: StorageServer,
    rascal_before: Callable[[StorageServer], MisbehavingStore],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    methods: str,
) -> None:
    """422 for a permanent rejection; a conflict with other writers is retried. The next image is stored either way."""
    rascal = rascal_before(gcs_server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", rascal.url)
    running_app = run_app(storage_provider="gcs", bucket_name=make_gcs_bucket(gcs_server), storage_timeout=2.0)
    said = Said(status, b'{"error": {"message": "as the test asked"}}', {"Content-Type": "application/json"})
    rascal.rule = lambda method, path, headers: said if "poison" in path and method in methods.split() else ""
    rascal.body_rule = lambda method, body: said if method in methods.split() and b"poison" in body else ""
    answer = running_app.draw(prompt="a red square", save_path="poison.webp")
    assert answer.status_code == (200 if status == 412 else 422), answer.text
    assert running_app.draw(prompt="a red square", save_path="fine.webp").json()["stored"]


@pytest.mark.fault(132)
def test_the_bucket_says_whose_refusal_it_is(behind: tuple[str, MisbehavingStore]) -> None:
    """By class: of the name, of this object, of the storage."""
    bucket = opened(r2_options(behind[1].url, behind[0]))
    behind[1].rule = denied_folder
    for call in (
        lambda: bucket.stat("poison/a"),
        lambda: bucket.create("poison/a", b"data", "image/webp", {}),
        lambda: bucket.overwrite("poison/a", b"data", "image/webp", {}),
        lambda: bucket.read("poison/a"),
    ):
        with pytest.raises(InvalidInput):
            call()
    with pytest.raises(StorageRefused):
        bucket.create("k", b"data", "image/webp", {"note": "x" * 2048})
    behind[1].rule = lambda method, path, headers: Said(403)
    with pytest.raises(StorageUnavailable):
        bucket.stat("poison/a")
