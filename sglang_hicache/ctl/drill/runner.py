"""One drill from its first request to its verdict.

The order matters: faults are taken away before the load stops, since a request that waits for a hung store would hold
up the end; and what is left over is judged last, on a server that is at rest.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from sglang_hicache.ctl.drill import checks
from sglang_hicache.ctl.drill.load import Answers, Load
from sglang_hicache.ctl.drill.own_server import DrillError
from sglang_hicache.ctl.drill.progress import Voice
from sglang_hicache.ctl.drill.result import Assertion, Result, Verdict
from sglang_hicache.ctl.drill.scenario import Scenario
from sglang_hicache.ctl.drill.site import STATUS, OwnSite, Site
from sglang_hicache.ctl.drill.steps import Timeline, attach_body, flush_blocking, wait_for_rest
from sglang_hicache.ctl.drill.watch import Watch
from sglang_hicache.ctl.exits import OutcomeUnknown, Refused, Unreachable

_TIDY_TIMEOUT_S = 120.0

#: What a server can answer that ends a drill.
SERVER_ERRORS = (Refused, Unreachable, OutcomeUnknown, DrillError)


class Drill:
    """One scenario on one site.  `answers`: of the reference run; None where the text cannot be judged.
    `key`: of the ordinary routes, where that is not the key of the client."""

    def __init__(
        self, scenario: Scenario, site: Site, answers: Answers, *,
        is_exact: bool, key: str, voice: Voice,
    ) -> None:  # fmt: skip
        self._scenario = scenario
        self._site = site
        self._answers = answers
        self._is_exact = is_exact
        self._load = Load(scenario.load, lambda: site.client, answers, key=key)
        self._watch = Watch(lambda: site.client, self._load.now_s)
        self._timeline = Timeline(scenario, site, self._load, self._watch, voice)

    def run_blocking(self) -> Result:
        """Everything."""
        scenario, site, load, watch = self._scenario, self._site, self._load, self._watch
        result = Result(
            scenario.name, scenario.about, where=site.where, began=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            records=load.records, samples=watch.samples, marks=self._timeline.marks,
            assertions=self._timeline.assertions,
        )  # fmt: skip
        began = time.monotonic()
        try:
            before = self._prepare_blocking()
            with contextlib.ExitStack() as ends:  # the last one first, and all of them, whatever one of them meets
                load.start()
                watch.start()
                ends.callback(watch.stop_blocking)
                ends.callback(load.stop_blocking)
                ends.callback(site.heal)
                self._timeline.run_blocking()
            self._judge(result, before)
        except SERVER_ERRORS as error:
            result.outcome, result.message = Verdict.ERROR, str(error)
        result.took_s = time.monotonic() - began
        return result

    def _prepare_blocking(self) -> Mapping[str, Any]:
        """Attach what the scenario begins with, to empty caches; the status before the first request."""
        site, name = self._site, self._scenario.server.store
        if isinstance(site, OwnSite):
            flush_blocking(site)
            if name:
                body = attach_body(site, name, self._scenario.server.prefetch_policy)
                site.client.command("PUT", STATUS, body, timeout_s=_TIDY_TIMEOUT_S)
        return site.status()

    def _judge(self, result: Result, before: Mapping[str, Any]) -> None:
        expect, site = self._scenario.expect, self._site
        add = result.assertions
        add += checks.of_load(expect, result, self._answers if self._is_exact else None)
        add += checks.of_status(expect, self._watch, site)
        if not isinstance(site, OwnSite):
            add.append(_left_as_found(before, site.status()))
        left = self._left_over_blocking()
        if expect.no_leak:
            verdict = Verdict.FAILED if left else Verdict.PASSED
            add.append(Assertion("nothing is left over", verdict, "; ".join(left) or "all pages are free or in use"))

    def _left_over_blocking(self) -> list[str]:
        """Of one's own server the storage is detached and the caches are emptied: then every page must be free."""
        site = self._site
        try:
            status = wait_for_rest(site)
            if not isinstance(site, OwnSite):
                return list(checks.of_pools(status, is_empty=False))
            detach_blocking(site)
            flush_blocking(site)
            status = wait_for_rest(site)
        except SERVER_ERRORS as error:
            return [str(error)]
        left = [f"storage process {pid}" for pid in site.server.pids("storage_process")]
        return left + list(checks.of_pools(status, is_empty=True))


def detach_blocking(site: Site) -> None:
    """Whatever is attached, or on its way there."""
    if site.status()["hicache_storage_backend"] is not None:
        site.client.command("DELETE", STATUS, {"mode": "drain"}, timeout_s=_TIDY_TIMEOUT_S)


def _left_as_found(before: Mapping[str, Any], after: Mapping[str, Any]) -> Assertion:
    """Somebody else's server goes on with the storage that it had."""
    keys = ("hicache_storage_backend", "hicache_storage_backend_extra_config")
    is_same = all(before[key] == after[key] for key in keys)
    found = f"backend {before[keys[0]] or 'none'} before, {after[keys[0]] or 'none'} after"
    return Assertion("storage left as found", Verdict.PASSED if is_same else Verdict.FAILED, found)
