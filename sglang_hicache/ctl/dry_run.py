"""The report of a dry run, for people: what each rank could do with the storage, and what the first one could not."""

from __future__ import annotations

from typing import Any

from sglang_hicache.ctl.runbook import runbook
from sglang_hicache.ctl.tables import Screen, age, printable, table
from sglang_hicache.storage.capacity import size_text

_STEPS = ("connect", "write", "exists", "read", "compare", "delete")


def show_report(report: dict[str, Any], screen: Screen) -> None:
    """A line per rank, and the reasons below."""
    good = report["ok"]
    verdict = screen.good("can be attached") if good else screen.bad("cannot be attached")
    screen.line(f"{printable(report['backend'])}: {verdict}; nothing was")
    screen.line()
    headings = ("rank", "result", *_STEPS, "look-up", "write page", "read page", "write rate", "read rate")
    screen.lines(table(headings, map(_row, report["ranks"])))
    if good:
        screen.heading("the store says of itself")
        info = report["ranks"][0]["info"]
        screen.lines(f"  {printable(name)}: {printable(value)}" for name, value in info.items())
        return
    reasons = _by_reason(report["ranks"])
    for (code, reason), ranks in reasons.items():
        screen.line()
        screen.sentence(f"rank {', '.join(map(str, ranks))}: {reason}", indent="")
        if page := runbook(f"{code}: "):
            screen.line(f"  what to do: {page}")
    if not reasons:
        # A rank that said nothing has no line above.
        screen.line()
        screen.sentence(report["message"], indent="", first="")


def _row(rank: dict[str, Any]) -> list[Any]:
    took = {step["name"]: _call_time(step["took_s"]) for step in rank["steps"]}
    steps = [took.get(name, "FAILED" if name == rank["failed_step"] else None) for name in _STEPS]
    result = "ok" if rank["ok"] else f"{rank['failed_step'] or 'failed'}: {rank['code']}"
    times = [_call_time(rank[name]) for name in ("lookup_s", "write_page_s", "read_page_s")]
    return [rank["rank"], result, *steps, *times, _rate(rank["write_rate"]), _rate(rank["read_rate"])]


def _by_reason(ranks: list[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Ranks by what they say: eight ranks with a wrong password are one sentence."""
    found: dict[tuple[str, str], list[int]] = {}
    for rank in ranks:
        if not rank["ok"]:
            found.setdefault((rank["code"], rank["reason"]), []).append(rank["rank"])
    return found


def _rate(bytes_per_s: float | None) -> str | None:
    return f"{size_text(int(bytes_per_s))}/s" if bytes_per_s else None


def _call_time(seconds: float | None) -> str | None:
    """Times of single calls: hundredths of a millisecond matter."""
    if not seconds or seconds >= 1:
        return age(seconds) if seconds else None
    return f"{seconds * 1e3:.{1 if seconds >= 1e-3 else 2}f} ms"
