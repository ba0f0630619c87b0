"""Whether a request fetches, and how long it waits for that.

Policies, budget and thresholds are those of the contract (section 4.4): `timeout` budget in seconds =
base + (tokens // page_size) * (page_size / 1024 * per_ki_token), counted from the first time the request could
have run but for the prefetch.  Under that policy the cost gate (`cost_gate.py`) stands before both: it says who asks
the store at all, and waiting ends when it no longer pays.  What came during a forward is seen only after it, so that a
deadline is judged as of the forward's beginning.  Replicated; changed only by `apply`.
"""

from __future__ import annotations

import msgspec

from sglang_hicache import wire
from sglang_hicache.cache.cost_gate import PATIENCE, CostGate
from sglang_hicache.cache.evidence import HARMLESS
from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.cache.prefetch_record import Prefetch, PrefetchPhase
from sglang_hicache.cache.storage_ops import UNASKED
from sglang_hicache.storage.settings import PrefetchSettings


class Waits:
    """Decisions for the requests that wait in line, and the ends of their patience."""

    def __init__(self, gate: CostGate, page_size: int, lookup_timeout_s: float) -> None:
        self.gate = gate
        self._page_size = page_size
        self._lookup_timeout_us = int(lookup_timeout_s * 1e6)
        #: Leader's clock, and when it last saw what has arrived: now, or before the forward that has just ended.
        self._now_us = self._seen_us = 0
        #: By request; of those only that lack something which may be fetched.
        self._decisions: dict[str, wire.FetchDecision] = {}

    def begin_tick(self, now_us: int, forward_us: int) -> None:
        """The clock of a plan, and how long the forward before it took."""
        self._now_us, self._seen_us = now_us, now_us - forward_us
        self.gate.forward_took(forward_us)

    def ended(self, op: Op, threshold_pages: int) -> None:
        """Every rank has ended a look-up or a read, in time or not.  Fewer hits than the threshold are not read."""
        if op.reason in UNASKED:
            return
        if op.kind is OpKind.LOOKUP:
            # Without a forward on the way the plans say it better: messages take their time, too.
            us = self._now_us - op.started_us if self._seen_us == self._now_us else op.took_us
            if op.reason in HARMLESS:
                self.gate.looked_up(op.epoch, us, op.done if op.done >= threshold_pages else 0, op.pages)
            else:
                self.gate.lookup_failed(op.epoch, us)
        else:
            self.gate.read(op.epoch, op.took_us, op.pages * self._page_size, op.done * self._page_size)

    def given_up(self, prefetch: Prefetch, policy: str) -> None:
        """It takes longer than anybody waits.  Where nobody ever does, that says nothing."""
        op, us = prefetch.op, max(0, self._seen_us - prefetch.op.started_us)
        if policy == "best_effort":
            return
        if prefetch.phase is PrefetchPhase.LOOKUP:
            self.gate.lookup_given_up(op.epoch, us)
        else:
            self.gate.read_given_up(op.epoch, us, op.pages * self._page_size + prefetch.ahead)

    # --------------------------------------------------------------------------------------------- decisions

    def decide(
        self, tokens: int, ahead: int, now_us: int, may_probe: bool, policy: str, settings: PrefetchSettings
    ) -> wire.FetchDecision:
        """Of a request that lacks so many tokens, while so many are being read for others."""
        if _is_gated(policy, settings):
            return self.gate.decide(tokens, ahead, now_us, may_probe)
        why = "cost_gate is false" if policy == "timeout" else f"prefetch policy {policy}"
        return wire.FetchDecision(verdict="fetch", reason=why, tokens=tokens)

    def decided(self, rid: str, decision: wire.FetchDecision | None) -> None:
        """Remember it; None: the request leaves the line.  Who does not fetch is in the way of those who compute."""
        before = self._decisions.pop(rid, None)
        if before is not None and before.verdict != "fetch":
            self.gate.waiting_tokens -= before.tokens
        if decision is not None:
            self._decisions[rid] = decision
            self.gate.waiting_tokens += decision.tokens if decision.verdict != "fetch" else 0

    def decision(self, rid: str, waits_since_us: int | None, now_us: int) -> wire.FetchDecision | None:
        """What was decided for a request, and how long it has waited; None: there was nothing to decide."""
        decision = self._decisions.get(rid)
        if decision is None or waits_since_us is None:
            return decision
        return msgspec.structs.replace(decision, waited_s=(now_us - waits_since_us) / 1e6)

    def objects_to_read(
        self, prefetch: Prefetch, tokens: int, ahead: int, policy: str, settings: PrefetchSettings
    ) -> bool:
        """The store has so many tokens of it; True: to compute them is quicker all the same."""
        decision = self._decisions.get(prefetch.rid)
        if prefetch.is_probe or decision is None or not _is_gated(policy, settings):
            return False
        objection = self.gate.objects_to_read(tokens, ahead)
        if objection:
            self.decided(prefetch.rid, msgspec.structs.replace(decision, verdict="recompute", reason=objection))
        return bool(objection)

    def reads(self, prefetch: Prefetch, tokens: int, now_us: int) -> None:
        """Its read begins."""
        expected_us = self.gate.read_us(tokens, prefetch.ahead)
        prefetch.read_by_us = None if expected_us is None else now_us + PATIENCE * expected_us

    # ------------------------------------------------------------------------------------------- the patience

    def is_over(self, prefetch: Prefetch, policy: str, settings: PrefetchSettings) -> bool:
        """It has been waited for long enough."""
        deadline_us = self.deadline_us(prefetch, policy, settings)
        return deadline_us is not None and self._seen_us >= deadline_us

    def deadline_us(self, prefetch: Prefetch, policy: str, settings: PrefetchSettings) -> int | None:
        """When waiting ends: of a look-up its own deadline, of a read the policy's; of both when it stops to pay."""
        if policy == "best_effort":
            return 0
        if policy == "wait_complete":
            return None
        lookup_us = prefetch.op.started_us + self._lookup_timeout_us
        is_lookup = prefetch.phase is PrefetchPhase.LOOKUP
        since_us = prefetch.blocked_since_us
        if since_us is None:
            return lookup_us if is_lookup else None
        tokens = len(prefetch.keys) * self._page_size
        budget_s = settings.prefetch_timeout_base + tokens / 1024 * settings.prefetch_timeout_per_ki_token
        budget_us = since_us + int(budget_s * 1e6)
        if prefetch.is_probe:
            return budget_us
        is_gated = _is_gated(policy, settings)
        if is_lookup:
            wait_us = self.gate.lookup_wait_us(tokens, prefetch.ahead) if is_gated else None
            return lookup_us if wait_us is None else min(lookup_us, since_us + wait_us)
        loss_us = self.gate.budget_us(tokens) if is_gated else None
        if loss_us is None or prefetch.read_by_us is None:
            return budget_us
        patient_us = prefetch.read_by_us if self.gate.keeps_its_word else 0
        return min(budget_us, max(since_us + loss_us, patient_us))


def _is_gated(policy: str, settings: PrefetchSettings) -> bool:
    """`wait_complete` waits whatever it costs, and under `best_effort` nobody waits."""
    return settings.cost_gate and policy == "timeout"
