"""Reports: whole, self-contained, and harmless whatever servers and stores have written into them."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from xml.dom import minidom
from xml.etree import ElementTree

import pytest

from sglang_hicache.ctl.drill import plots, report
from sglang_hicache.ctl.drill.load import Record
from sglang_hicache.ctl.drill.result import Assertion, Mark, Result, Verdict, quantile
from sglang_hicache.ctl.drill.watch import sample_of
from sglang_hicache.errors import UserError

EVIL = "</title><script>alert('1')</script> \x1b[31m & \"quoted\""


def _result(**more: object) -> Result:
    records = [
        Record(question=(0, 0), start_s=at / 10, ttft_s=0.01 * (1 + at), total_s=0.2, prompt_tokens=100,
               cached={"device": 10, "host": 20, "storage": 30}, answer=(1,))
        for at in range(20)
    ]  # fmt: skip
    records.append(Record(question=(1, 0), start_s=1.0, total_s=0.5, error=EVIL))
    states = ["attached"] * 5 + ["draining"] + ["detached"] * 3 + [EVIL]
    samples = [
        sample_of({"hicache_storage_backend": EVIL, "ranks": [{"state": state, "epoch": 1}]}, at * 0.2)
        for at, state in enumerate(states)
    ]
    return Result(
        name="evil", about=EVIL, where=EVIL, began="today", took_s=2.0, records=records, samples=samples,
        marks=[Mark(0.5, 0.1, EVIL, EVIL)],
        assertions=[Assertion(EVIL, Verdict.FAILED, EVIL), Assertion("good", Verdict.PASSED, "so")], **more,
    )  # fmt: skip


def test_a_page_needs_nothing_else_and_runs_nothing() -> None:
    page = report.page(_result())
    assert "<script" not in page and "\x1b" not in page
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|https?://", page)
    for name in ("Assertions", "Steps", "Time line", "Time to the first token", "Where prompt tokens came from"):
        assert name in page


def test_pictures_are_drawn_and_well_formed() -> None:
    svgs = dict(plots.pictures(_result()))
    assert len(svgs) == 3
    parsed = [minidom.parseString(svg) for svg in svgs.values()]
    timeline, dots, bars = parsed
    assert len([node for node in timeline.getElementsByTagName("rect") if "band" in node.getAttribute("class")]) >= 5
    assert len(dots.getElementsByTagName("circle")) == 21
    assert [node.getAttribute("class") for node in dots.getElementsByTagName("circle")].count("failed") == 1
    assert bars.getElementsByTagName("rect")


def test_a_drill_without_a_single_request_has_a_page() -> None:
    empty = Result("empty", "Nothing.", "it did not start", Verdict.ERROR)
    assert "it did not start" in report.page(empty)
    assert empty.figures()["requests"] == 0


def test_shares_of_prompt_tokens() -> None:
    assert plots.shares(_result().records[:20]) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert plots.shares([]) == [0.0] * 4


def test_junit_counts_what_did_not_pass() -> None:
    results = [
        _result(), Result("there-is-none", "", "no redis", Verdict.SKIPPED), Result("bad", "", "boom", Verdict.ERROR)
    ]  # fmt: skip
    suites = list(ElementTree.fromstring(report.junit(results)))
    found = [(suite.get("failures"), suite.get("skipped"), suite.get("errors"), suite.get("tests")) for suite in suites]
    assert found == [("1", "0", "0", "2"), ("0", "1", "0", "1"), ("0", "0", "1", "1")]
    failure = suites[0][0][0]
    assert failure.tag == "failure" and "alert" in failure.get("message")


def test_files_are_for_this_user_alone(tmp_path: Path) -> None:
    written = report.write(tmp_path / "new" / "folder", [_result()])
    assert [path.name for path in written] == ["evil.html", "junit.xml"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o600}
    with pytest.raises(UserError, match="cannot be written"):
        report.write(Path("/proc/no-such-folder"), [])


def test_a_verdict_is_red_if_one_assertion_is() -> None:
    assert _result().verdict is Verdict.FAILED
    assert Result("a", "", assertions=[Assertion("x", Verdict.SKIPPED, "")]).verdict is Verdict.PASSED
    assert report.as_json(_result())["verdict"] == "failed"


def test_quantiles() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert quantile([1.0], 0.99) == 1.0
