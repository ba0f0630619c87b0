"""The assertions of a drill as a whole, judged when its timeline is over."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from sglang_hicache.ctl.drill.load import Answers
from sglang_hicache.ctl.drill.result import Assertion, Result, Verdict
from sglang_hicache.ctl.drill.scenario import ExpectTable
from sglang_hicache.ctl.drill.site import Site
from sglang_hicache.ctl.drill.watch import Watch


def of_load(expect: ExpectTable, result: Result, answers: Answers | None) -> Iterator[Assertion]:
    """What the clients saw.  No answers: nobody knows what the text should have been."""
    figures = result.figures()
    errors = [record.error for record in result.records if record.error]
    detail = f"{len(errors)} of {len(result.records)}; at most {expect.failed_requests}"
    first = f"; the first, {errors[0]}" if errors else ""
    yield _judged("failed requests", len(errors) <= expect.failed_requests, detail + first)
    if not any(not record.error for record in result.records):
        yield Assertion("answers", Verdict.FAILED, "no request was answered at all")
    if expect.text_equal:
        yield _text_equal(result, answers)
    most: tuple[tuple[str, str, float | None], ...] = (
        ("tokens computed again", "reprefilled_tokens", expect.reprefilled_tokens),
        ("p99 of the time to the first token, s", "ttft_p99_s", expect.ttft_p99_s),
    )
    for name, figure, limit in most:
        if limit is not None:
            yield _judged(name, figures[figure] <= limit, f"{figures[figure]:g}; at most {limit:g}")
    if expect.storage_tokens is not None:
        found = figures["storage_tokens"]
        yield _judged(
            "tokens from storage", found >= expect.storage_tokens, f"{found:g}; at least {expect.storage_tokens}"
        )


def _text_equal(result: Result, answers: Answers | None) -> Assertion:
    name = "text of the reference run"
    if answers is None:
        words = "not judged: the server runs without --enable-deterministic-inference, so its text may change by itself"
        return Assertion(name, Verdict.SKIPPED, words)
    answered = [record for record in result.records if not record.error]
    others = [record for record in answered if record.answer != answers[record.question]]
    if not others:
        return Assertion(name, Verdict.PASSED, f"{len(answered)} answers are equal")
    first = others[0]
    return Assertion(
        name, Verdict.FAILED,
        f"{len(others)} of {len(answered)} answers differ; the first, at {first.start_s:.2f} s, to question "
        f"{first.question}: {list(first.answer)}, not {list(answers[first.question])}",
    )  # fmt: skip


def of_status(expect: ExpectTable, watch: Watch, site: Site) -> Iterator[Assertion]:
    """What the ranks said of themselves."""
    if expect.ranks_agree:
        looked = f"looked at {len(watch.samples)} times{'' if watch.is_whole else ', and not to the end'}"
        did_look = watch.is_whole and bool(watch.samples)
        yield _judged("ranks agree", did_look and not watch.disagreement, watch.disagreement or looked)
    if expect.breaker:
        seen = [sample.breaker for sample in watch.samples if sample.breaker]
        path = [state for at, state in enumerate(seen) if at == 0 or seen[at - 1] != state]
        rest = iter(path)
        was = all(state in rest for state in expect.breaker)
        yield _judged("breaker", was, f"{' -> '.join(path) or 'never seen'}; expected {' -> '.join(expect.breaker)}")
    if expect.trips is not None:
        counts = [sample.trips for sample in watch.samples if sample.trips is not None]
        # A server that is started again counts anew.
        trips = sum(now - before if now >= before else now for before, now in itertools.pairwise(counts))
        detail = f"{trips if counts else 'never seen'}; at most {expect.trips}"
        yield _judged("times that the breaker opened", bool(counts) and trips <= expect.trips, detail)
    if expect.store is not None:
        status = site.status()
        attached = status["hicache_storage_backend"]
        fits = site.stores[expect.store].is_attached(status) if expect.store else attached is None
        wanted, found = expect.store or "none", f"backend {attached or 'none'}"
        yield _judged("store at the end", fits, f"{wanted}; {found}" if fits else f"{found}; expected {wanted}")


def of_pools(status: Mapping[str, Any], *, is_empty: bool) -> Iterator[str]:
    """What is left over on a server that is at rest; `is_empty`: its caches were emptied."""
    for rank in status["ranks"]:
        who, load = f"rank {rank['rank']}", rank["load"]
        if rank["quarantined_pages"]:
            yield f"{who}: {rank['quarantined_pages']} pages in quarantine"
        if any((rank["in_flight"] or {}).values()):
            yield f"{who}: operations on their way: {rank['in_flight']}"
        evictable = 0 if is_empty else load["device_pages_evictable"]
        if load["device_pages_free"] + evictable != load["device_pages"]:
            yield f"{who}: {load['device_pages_free']} + {evictable} of {load['device_pages']} device pages are free"
        if is_empty and load.get("host_pages_free") != load.get("host_pages"):
            yield f"{who}: {load['host_pages_free']} of {load['host_pages']} host pages are free"


def _judged(name: str, is_so: bool, detail: str) -> Assertion:
    return Assertion(name, Verdict.PASSED if is_so else Verdict.FAILED, detail)
