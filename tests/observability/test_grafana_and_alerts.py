"""The dashboard and the alerts in `deploy/` use only metrics and labels that the server emits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from conftest import ROOT, Server

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.observability.metrics import Metrics, RequestSample
from stable_diffusion_server.types import EngineEvent, EngineEventKind

DASHBOARD = ROOT / "deploy" / "grafana" / "stable-diffusion-server.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
# Labels that Prometheus itself adds.
ITS_OWN = {"instance", "job", "le"}
_NAME = re.compile(r"\b(?:sds|process)_[a-z_]+\b")
_SELECTOR = re.compile(r"\b(?P<name>(?:sds|process)_[a-z_]+)\{(?P<labels>[^}]*)\}")
_GROUPING = re.compile(r"\bby \((?P<labels>[^)]*)\)")


@pytest.fixture(scope="module")
def emitted(server: Server) -> dict[str, set[str]]:
    """Names → labels, from a server that has generated images, plus metrics that only appear on failures."""
    asked = {"prompt": "a red circle", "width": 64, "height": 64, "save_path": "figures.webp"}
    assert httpx.get(f"{server.url}/create_and_upload_image", params=asked, timeout=120).status_code == 200
    metrics = Metrics()
    metrics.observe(EngineEvent(EngineEventKind.FAILED, "a", cause="internal-error"))
    metrics.observe(EngineEvent(EngineEventKind.RESTARTED, "a", cause="out-of-memory"))
    metrics.record_quality_check("black")
    metrics.record_storage_call("stat", 0.1, failed=True)
    metrics.record_request(RequestSample("/a", 401, 0.1, "unauthorized", "anna"))
    return labels_of(httpx.get(f"{server.url}/metrics", timeout=60).text + metrics.exposition().decode())


def labels_of(text: str) -> dict[str, set[str]]:
    """Every name in the text format, with the labels of its samples; also names without samples."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if declared := re.match(r"# TYPE (\S+) (\S+)", line):
            endings = ("_bucket", "_count", "_sum") if declared[2] == "histogram" else ("",)
            for ending in endings:
                found.setdefault(declared[1] + ending, set())
        elif sample := re.match(r"(\w+)\{(.*)\} ", line):
            found.setdefault(sample[1], set()).update(re.findall(r'(\w+)="', sample[2]))
    return found


def panels() -> list[dict[str, Any]]:
    reported: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in reported if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, and where it is used."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in rules():
        yield rule["alert"], rule["expr"]


def test_every_figure_that_is_asked_for_is_emitted(emitted: dict[str, set[str]]) -> None:
    """A metric renamed in the code cannot leave a panel or an alert empty."""
    asked = {(where, name) for where, expression in expressions() for name in _NAME.findall(expression)}
    assert len(asked) > 40
    assert sorted((where, name) for where, name in asked if name not in emitted) == []


def test_every_label_that_is_asked_for_is_carried(emitted: dict[str, set[str]]) -> None:
    """In selectors the metric's own labels; in groupings those of any metric in the expression."""
    for where, expression in expressions():
        for selector in _SELECTOR.finditer(expression):
            asked = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector["labels"])) - ITS_OWN
            assert asked <= emitted[selector["name"]], f"{where}: {expression}"
        carried = set().union(*(emitted[name] for name in _NAME.findall(expression)), ITS_OWN)
        for grouping in _GROUPING.finditer(expression):
            assert {label.strip() for label in grouping["labels"].split(",")} <= carried, f"{where}: {expression}"


def test_every_question_of_an_operator_has_a_panel(emitted: dict[str, set[str]]) -> None:
    """Every metric is on the dashboard, except those it shows in another form."""
    shown = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    counted = {re.sub("_(bucket|count|sum)$", "", name) for name in emitted if name.startswith("sds_")}
    assert sorted(name for name in counted if name not in shown and not name.endswith("_created")) == []


def test_reasons_in_alerts_are_kinds_of_errors() -> None:
    """Renaming an error type cannot silence its alert."""
    kinds = {error.kind for error in _below(ServerError)}
    for rule in rules():
        for label, value in re.findall(r'\b(reason|cause|kind)(?:=~|=|!=)"([^"]*)"', rule["expr"]):
            assert set(value.split("|")) <= kinds, f"{rule['alert']}: {label}"


def test_every_alert_has_a_sentence_a_severity_and_a_way_to_act() -> None:
    """The operations page has a heading with the alert's name."""
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in rules():
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert f"### {rule['alert']}\n" in page


def test_the_dashboards_panels_do_not_overlap_and_are_drawn_from_the_chosen_servers() -> None:
    """Each has its own position and id, and selects the chosen instances only."""
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel["targets"]:
            assert 'instance=~"$instance"' in target["expr"]
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(set(ids)) == len(ids)


def _below(kind: type[ServerError]) -> Iterator[type[ServerError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _below(child)
