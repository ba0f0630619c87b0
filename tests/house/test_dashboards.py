"""Alert rules and dashboard ask for metrics, labels and values that a scrape has, and lead to pages that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import yaml

from sglang_hicache.tokenizer.metrics_series import Series
from sglang_hicache.tokenizer.metrics_table import table
from tests.house.source import ROOT
from tests.ranks.world import server_config

RUNBOOKS = ROOT / "docs" / "runbooks"
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "docs" / "alerts" / "sglang-hicache.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
BOARD = json.loads((ROOT / "docs" / "grafana" / "sglang-hicache.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]

#: Labels that the scraper adds, and the one of buckets.
ADDED = {"instance", "job", "le"}
_SELECTOR = re.compile(r"(sglang(?:_hicache)?:\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
#: Labels of a clause such as `sum by (instance, job)`.
_CLAUSE = re.compile(r"\b(?:by|ignoring|on)\s*\(([^)]*)\)")


def names() -> dict[str, Series]:
    """What a scrape has, by every name that an expression can use."""
    found = {}
    for series in table(server_config(1, 8, 8)):
        endings = ("_bucket", "_sum", "_count") if series.kind == "histogram" else ("",)
        found |= {series.name + ending: series for ending in endings}
    return found


NAMES = names()


def mistakes(expression: str) -> Iterator[str]:
    """What an expression asks for and no scrape has."""
    if expression.count("(") != expression.count(")"):
        yield "brackets"
    labels = set(ADDED)
    for name, matchers in _SELECTOR.findall(expression):
        series = NAMES.get(name)
        if series is None:
            yield f"no metric {name}"
            continue
        labels |= set(series.labels)
        for label, operator, value in _MATCHER.findall(matchers):
            if label not in {*series.labels, *ADDED}:
                yield f"{name} has no label {label}"
            elif label in series.extra[:1]:
                wanted = value.split("|") if "~" in operator else [value]
                yield from (f"{name} has no {label} {value}" for value in wanted if value not in series.cases)
    for clause in _CLAUSE.findall(expression):
        yield from (f"no label {label}" for label in re.findall(r"\w+", clause) if label not in labels)


@pytest.mark.parametrize(
    ("expression", "mistake"),
    [
        ("sum(sglang_hicache:rank_up", "brackets"),
        ("sglang_hicache:ranks_up == 0", "no metric sglang_hicache:ranks_up"),
        ('sglang_hicache:rank_up{state="open"}', "sglang_hicache:rank_up has no label state"),
        ('sglang_hicache:breaker_state{state=~"open|shut"}', "sglang_hicache:breaker_state has no state shut"),
        ("sum by (reason) (sglang_hicache:rank_up)", "no label reason"),
        ("rate(sglang_hicache:op_duration_seconds[5m])", "no metric sglang_hicache:op_duration_seconds"),
        ('sum by (instance) (rate(sglang_hicache:lost_tokens_total{reason!="policy"}[5m]))', ""),
    ],
)
def test_mistakes_are_found(expression: str, mistake: str) -> None:
    assert list(mistakes(expression)) == ([mistake] if mistake else [])


# ------------------------------------------------------------------------------------------------------ alerts


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_can_fire_and_leads_to_a_page(rule: dict[str, Any]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert list(mistakes(rule["expr"])) == [] and _SELECTOR.search(rule["expr"])
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
    assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, section = rule["annotations"]["runbook_url"].partition("#")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert page.startswith("docs/runbooks/")
    assert not section or section in [heading.lower() for heading in re.findall(r"^## (\w+)$", text, re.MULTILINE)]


def test_alerts_have_names_of_their_own_and_every_section_has_its_alert() -> None:
    alerts = [rule["alert"] for rule in RULES]
    assert len(set(alerts)) == len(alerts)
    sections = re.findall(r"^## (.+)$", (RUNBOOKS / "alerts.md").read_text(encoding="utf-8"), re.MULTILINE)
    urls = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in RULES}
    assert sections == [alert for alert, url in urls.items() if url == f"docs/runbooks/alerts.md#{alert.lower()}"]


# --------------------------------------------------------------------------------------------------- dashboard


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_shows_what_there_is(panel: dict[str, Any]) -> None:
    assert panel["targets"] and panel["description"]
    for target in panel["targets"]:
        assert list(mistakes(target["expr"])) == [] and 'instance=~"$instance"' in target["expr"]
        known = set.union(*(set(NAMES[name].labels) for name, _ in _SELECTOR.findall(target["expr"]))) | ADDED
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known
        assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_dashboard_loads() -> None:
    """What Grafana needs to take a file: a version of its schema, numbers of its own, places that do not overlap."""
    assert BOARD["schemaVersion"] >= 36 and BOARD["uid"] and BOARD["title"]
    assert BOARD.get("id") is None, "a number that another dashboard may have"
    assert [each["name"] for each in BOARD["templating"]["list"]] == ["datasource", "instance"]
    assert list(mistakes(BOARD["templating"]["list"][1]["query"]["query"])) == []
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in combinations([panel["gridPos"] for panel in BOARD["panels"]], 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"], (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in BOARD["panels"])
