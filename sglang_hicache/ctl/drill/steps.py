"""Carries out the steps of a timeline, one after the other, and says of each whether it went as it should.

A step that goes wrong ends the timeline: what comes after it was written for a server that had taken it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from sglang_hicache.ctl.drill.load import Load
from sglang_hicache.ctl.drill.own_server import DrillError
from sglang_hicache.ctl.drill.progress import Voice
from sglang_hicache.ctl.drill.result import Assertion, Mark, Verdict
from sglang_hicache.ctl.drill.scenario import (
    STORAGE,
    AttachStep,
    Condition,
    DetachStep,
    DryRunStep,
    FaultStep,
    FlushStep,
    HealStep,
    KillStep,
    RestartStep,
    Scenario,
    StartStep,
    StatusTable,
    Step,
    SwitchStep,
    WaitStep,
    title,
    words,
)
from sglang_hicache.ctl.drill.site import STATUS, OwnSite, Site
from sglang_hicache.ctl.drill.watch import Sample, Watch
from sglang_hicache.ctl.exits import OutcomeUnknown, Refused, Unreachable

#: For what stands before a step: it says when, and promises nothing.
_PATIENCE_S = 180.0
#: Longer than any deadline of the server: it answers by itself that it does not know.
_COMMAND_TIMEOUT_S = 300.0
#: Until what the load has begun is written, or given up.
_REST_TIMEOUT_S = 60.0
_POLL_S = 0.02

#: What a step found, and what was wrong about it; "": nothing.
Outcome = tuple[str, str]


class Timeline:
    """The steps of one drill."""

    def __init__(self, scenario: Scenario, site: Site, load: Load, watch: Watch, voice: Voice) -> None:
        self._scenario = scenario
        self._site = site
        self._load = load
        self._watch = watch
        self._voice = voice
        #: Where counting begins for the next condition: time, answers, tokens from storage.
        self._since = (0.0, 0, 0)
        self.marks: list[Mark] = []
        self.assertions: list[Assertion] = []

    def run_blocking(self) -> None:
        """All steps, or up to the first one that goes wrong."""
        for step in self._scenario.timeline:
            if not self._step_blocking(step):
                return

    def _step_blocking(self, step: Step) -> bool:
        name = title(step)
        if not self._reached_blocking(step.after, _PATIENCE_S):
            self._judge(step, f"before it: {words(step.after)}", "", self._instead(step.after, _PATIENCE_S))
            return False
        begin_s = self._load.now_s()
        try:
            detail, problem = self._do_blocking(step)
        except (Refused, Unreachable, OutcomeUnknown, DrillError) as error:
            detail, problem = "", str(error)
        took_s = self._load.now_s() - begin_s
        limit_s = _within(step)
        if not problem and limit_s is not None and took_s > limit_s:
            problem = f"it took {took_s:.2f} s; at most {limit_s:g} s are allowed"
        self._voice.tell(f"{begin_s:7.2f} s  {name}  ({took_s:.2f} s){f': {problem}' if problem else ''}")
        self.marks.append(Mark(begin_s, took_s, name, problem or detail))
        self._judge(step, name, f"{took_s:.2f} s{f'; {detail}' if detail else ''}", problem)
        self._since = (self._load.now_s(), len(self._load.records), self._load.storage_tokens)
        return not problem

    def _judge(self, step: Step, name: str, detail: str, problem: str) -> None:
        """A step that may only do something is no assertion, unless it could not."""
        asserts = isinstance(step, WaitStep | AttachStep | SwitchStep | DetachStep | DryRunStep)
        if asserts or problem:
            verdict = Verdict.FAILED if problem else Verdict.PASSED
            self.assertions.append(Assertion(name, verdict, problem or detail))

    def _do_blocking(self, step: Step) -> Outcome:
        site = self._site
        match step:
            case FaultStep():
                site.stores[step.store].inject(step.faults)
            case HealStep():
                site.stores[step.store].heal()
            case AttachStep() | SwitchStep():
                body = attach_body(site, step.store, self._scenario.server.prefetch_policy) | _mode(step)
                body |= {"switch": True} if isinstance(step, SwitchStep) else {}
                return _command(site, "PUT", body, step)
            case DetachStep():
                return _command(site, "DELETE", _mode(step), step)
            case DryRunStep():
                return _dry_run(site, step)
            case FlushStep():
                with self._load.held():
                    flush_blocking(site)
            case KillStep() if step.what == STORAGE:
                site.kill_storage_blocking(step.rank)
            case WaitStep():
                if not self._reached_blocking(step.until, step.within_s):
                    return "", self._instead(step.until, step.within_s)
            case _:
                return self._do_to_own_blocking(step)
        return "", ""

    def _do_to_own_blocking(self, step: Step) -> Outcome:
        """What only a server of the drill's own takes."""
        site = self._site
        if not isinstance(site, OwnSite):
            raise DrillError("this is for a server of the drill's own only")
        match step:
            case KillStep():
                site.programs.kill_blocking(step.what)
            case StartStep():
                site.programs.start_blocking(step.program)
            case RestartStep():
                with self._load.held():
                    return "", "; ".join(site.restart_blocking(step.signal))
        return "", ""

    def _reached_blocking(self, condition: Condition, timeout_s: float) -> bool:
        """Wait until it holds, or that long."""
        if condition == Condition():
            return True
        deadline, seen_s = time.monotonic() + timeout_s, self._since[0]
        while True:
            sample = self._watch.newer_than(seen_s, _POLL_S)
            seen_s = sample.at_s if sample is not None else seen_s
            if self._holds(condition, None if sample is None else sample.status):
                return True
            if time.monotonic() > deadline:
                return False
            self._voice.now(f"{self._load.now_s():7.1f} s  waits for {words(condition)}; {self._now(sample)}")

    def _now(self, sample: Sample | None) -> str:
        """For whoever watches."""
        failed = sum(bool(record.error) for record in self._load.records)
        state = f", {sample.state} {sample.backend}" if sample is not None else ""
        return f"{len(self._load.records)} answers, {failed} failed{state}"

    def _holds(self, condition: Condition, status: Mapping[str, Any] | None) -> bool:
        since_s, answers, storage_tokens = self._since
        now_s = self._load.now_s()
        wanted = (
            (condition.at_s, now_s),
            (condition.seconds, now_s - since_s),
            (condition.requests, len(self._load.records) - answers),
            (condition.storage_tokens, self._load.storage_tokens - storage_tokens),
        )
        if any(least is not None and found < least for least, found in wanted):
            return False
        return condition.status is None or (status is not None and not self._missing(condition.status, status))

    def _missing(self, wanted: StatusTable, status: Mapping[str, Any]) -> bool:
        """Does the status lack anything of what is wanted?"""
        return any(True for _ in _differences(wanted, status, self._site))

    def _instead(self, condition: Condition, limit_s: float) -> str:
        """What there was in the place of what was waited for."""
        _, answers, storage_tokens = self._since
        answers, storage_tokens = len(self._load.records) - answers, self._load.storage_tokens - storage_tokens
        hint = ""
        if condition.storage_tokens and not storage_tokens:
            hint = (
                " (it is asked for what neither device nor host holds, and only if that is prefetch_threshold tokens "
                "or more: smaller pools, a smaller threshold or more load make it needed)"
            )
        counted = f"{answers} answers, {storage_tokens} tokens from storage{hint}"
        return f"not so after {limit_s:g} s: {counted}; {self._last()}"

    def _last(self) -> str:
        """What the ranks said."""
        sample = self._watch.newer_than(-1.0, 0.0)
        if sample is None:
            return "the server does not say anything"
        error = next((rank["last_error"] for rank in sample.status["ranks"] if rank.get("last_error")), None)
        return f"the last status: {sample.ranks}, backend {sample.backend or 'none'}, breaker {sample.breaker}" + (
            f", last_error {error!r}" if error else ""
        )


def _differences(wanted: StatusTable, status: Mapping[str, Any], site: Site) -> Iterator[str]:
    """What is otherwise than wanted."""
    ranks, breaker = status["ranks"], status.get("breaker") or {}
    if wanted.state is not None and any(rank["state"] != wanted.state for rank in ranks):
        yield "state"
    if wanted.store == "" and status["hicache_storage_backend"] is not None:
        yield "store"
    if wanted.store and not site.stores[wanted.store].is_attached(status):
        yield "store"
    if wanted.breaker is not None and breaker.get("state") != wanted.breaker:
        yield "breaker"
    if wanted.serving is not None and breaker.get("serving") != wanted.serving:
        yield "serving"
    if wanted.last_error is not None and any(wanted.last_error not in (rank["last_error"] or "") for rank in ranks):
        yield "last_error"
    if wanted.in_flight is not None and any(sum((r["in_flight"] or {}).values()) < wanted.in_flight for r in ranks):
        yield "in_flight"


def attach_body(site: Site, store: str, prefetch_policy: str) -> dict[str, Any]:
    """The body of an attach."""
    found = site.stores[store]
    return {
        "hicache_storage_backend": found.backend,
        "hicache_storage_backend_extra_config_json": json.dumps(found.config),
        "hicache_storage_prefetch_policy": prefetch_policy,
    }


def flush_blocking(site: Site) -> None:
    """Empty device and host once all is written."""
    wait_for_rest(site)
    reply = site.client.send("POST", "/flush_cache", query={"timeout": "60"}, timeout_s=_COMMAND_TIMEOUT_S)
    if not reply.is_success:
        raise Refused(f"/flush_cache: {reply.message}")


def wait_for_rest(site: Site) -> dict[str, Any]:
    """Nothing is computed, copied, written or read: the status that says so, of every rank."""
    deadline, moment = time.monotonic() + _REST_TIMEOUT_S, threading.Event()
    while busy := _busy(status := site.status()):
        if time.monotonic() > deadline:
            raise DrillError(f"the server does not come to rest; it has {', '.join(busy)}")
        moment.wait(_POLL_S)
    return status


def _busy(status: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for rank in status["ranks"]:
        if rank["epoch"] is None:
            found.append(f"rank {rank['rank']} silent")
            continue
        counts = {name: rank["load"][name] for name in ("queue-req", "running-req", "copy-ops")}
        counts |= rank["in_flight"] | {"queued_backups": rank["queued_backups"] if rank["state"] == "attached" else 0}
        found += [f"rank {rank['rank']} {name} {count}" for name, count in counts.items() if count]
    return found


def _mode(step: AttachStep | SwitchStep | DetachStep) -> dict[str, Any]:
    given = {"mode": step.mode, "timeout_s": step.timeout_s}
    return {name: value for name, value in given.items() if value is not None}


def _command(site: Site, method: str, body: dict[str, Any], step: AttachStep | SwitchStep | DetachStep) -> Outcome:
    reply = site.client.send(method, STATUS, body or None, timeout_s=_COMMAND_TIMEOUT_S)
    was = "done" if reply.is_success else "refused" if reply.status in (400, 409) else f"answered {reply.status}"
    if was != step.expect:
        return "", f"it was {was}, not {step.expect}: {reply.message}"
    if step.says not in reply.message:
        return "", f"the answer does not say {step.says!r}: {reply.message}"
    return reply.message.splitlines()[-1], ""


def _dry_run(site: Site, step: DryRunStep) -> Outcome:
    store = site.stores[step.store]
    body = {
        "hicache_storage_backend": store.backend,
        "hicache_storage_backend_extra_config_json": json.dumps(store.config),
        "dry_run": True,
    }
    reply = site.client.send("PUT", STATUS, body, timeout_s=_COMMAND_TIMEOUT_S)
    report = reply.json() if reply.text.startswith("{") else None
    if not isinstance(report, dict) or "ranks" not in report:
        return "", f"there is no report ({reply.status}): {reply.message}"
    codes = sorted({rank["code"] for rank in report["ranks"] if rank["code"]})
    was = "done" if report["ok"] else "refused"
    if was != step.expect:
        return "", f"it was {was}, not {step.expect}: {reply.message}"
    if step.code and step.code not in codes:
        return "", f"no rank gave the code {step.code!r}, but {codes}"
    return ", ".join(codes) or "usable on every rank", ""


def _within(step: Step) -> float | None:
    return step.within_s if isinstance(step, AttachStep | SwitchStep | DetachStep | DryRunStep) else None
