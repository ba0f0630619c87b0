"""Is it quicker to fetch what a request lacks, or to compute it?  Decided from what both took lately.

    prefill    time of the forwards that computed prompts, as the plans say it, without the decodes that rode along
    look-up    from the plan that began it to the plan that ended it
    read       what the slowest rank's store worked on it, for each token that arrived
    hits       how much of what look-ups asked for was there, and enough to be read

What a plan says after a forward may have happened at any time during it.  A look-up that met one took what the store
worked on it, and a wait counts as of the forward's beginning: a request that meets one waits for that one at most.

The promise is that storage makes the median request slower than it would be without by no more than 5 % of what it
lacks.  A request waits for its look-up for no longer than that, and not at all where look-ups take longer - unless the
store has been hitting: where more than half of what was asked for lately was there, and what that should save clearly
exceeds a look-up, the request waits, and a single miss costs it that look-up.  Some misses in a row, and it is the 5 %
again.  Once the store has said that it has the pages, a request waits for the read if that should be quicker than to
compute them.  For neither it waits more than `PATIENCE` times as long as it should take; the first read that breaks its
word takes that back from all others.  What failed and what was given up is an observation, too.  Whoever is not to wait
computes; once a second one of them fetches all the same, as a probe for which nobody waits, and a store that has
recovered, or begun to hit, is found.

Replicated; changed only by `SchedulerCore.apply`, in whole microseconds of the plans.
"""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.digest import StateDigest

#: Share of the time to compute what a request lacks that it may lose to storage.  5 % are promised; the rest is for
#: what no plan sees: messages on their way, and a storage process that shares its cores with the forward.
LOSS_SHARE = 0.04

#: A read is given up when it takes so many times as long as it should: what else is read meanwhile is in nobody's sum.
#: The same goes for a look-up that is waited for because the store has been hitting.
PATIENCE = 2

#: What hits should save is this many times what a look-up takes, or nobody waits for it longer than for any other.
CLEARLY = 2

#: Look-ups of a store for which everybody waits, whatever they take: before that nothing is known of what they bring.
LEARNING = 4

#: Between two probes.
PROBE_US = 1_000_000

#: So many failures in a row, and nobody waits for the store until something has worked.  One or two prove nothing.
MOST_FAILURES = 3

#: What is said where nothing speaks against a fetch.
QUICKER = "fetching is quicker than computing, as far as is known"

#: Prompts in a forward below which it says more about forwards than about long prompts.
LEAST_PREFILL_TOKENS = 256


class Pace:
    """Microseconds and tokens of the latest observations; each new one counts for some quarters of the whole."""

    __slots__ = ("tokens", "us")

    def __init__(self) -> None:
        self.us = self.tokens = 0

    @property
    def is_known(self) -> bool:
        return bool(self.us or self.tokens)

    def see(self, us: int, tokens: int, quarters: int = 1) -> None:
        if not self.is_known:
            quarters = 4
        self.us = (self.us * (4 - quarters) + us * quarters) // 4
        self.tokens = (self.tokens * (4 - quarters) + tokens * quarters) // 4

    def took_us(self, tokens: int) -> int:
        """So long for so many; where nothing ever arrived, longer than anything."""
        return self.us * tokens // max(1, self.tokens)

    def per_second(self) -> float | None:
        """Tokens per second; None: never seen."""
        return self.tokens * 1e6 / max(1, self.us) if self.is_known else None


class Prefill:
    """How fast prompts are computed."""

    def __init__(self, chunk_tokens: int) -> None:
        self._least_tokens = max(1, min(LEAST_PREFILL_TOKENS, chunk_tokens // 2))
        self.pace = Pace()
        #: By decoding request: the forwards without any prompt.
        self._decodes = Pace()
        #: Of the tick before: prompt tokens, requests that decoded, and whether the host waited for the device.
        self._tick = (0, 0, False)
        #: Of the forwards since it last waited: where nothing is sampled a forward is only begun, and the next pays.
        self._us = self._tokens = 0

    def computes(self, tokens: int, decodes: int, samples: bool) -> None:
        """What the forward of this tick is made of."""
        self._tick = tokens, decodes, samples

    def took(self, forward_us: int) -> bool:
        """How long the forward of the tick before was; True: the rate is another one now."""
        (tokens, decodes, samples), self._tick = self._tick, (0, 0, False)
        if not forward_us:
            return False
        if not tokens:
            self._decodes.see(forward_us, decodes)
            return False
        self._us += forward_us - min(self._decodes.took_us(decodes), forward_us // 2)
        self._tokens += tokens
        if not samples:
            return False
        (us, self._us), (total, self._tokens) = (self._us, 0), (self._tokens, 0)
        if total < self._least_tokens:
            return False
        # The quick ones count for more: the first forwards warm up and some are disturbed, and whoever believes that
        # computing takes long waits for storage too long.
        self.pace.see(us, total, 2 if us < self.pace.took_us(total) else 1)
        return True


class Hits:
    """How much of what look-ups asked for the store had.  Each look-up counts for a quarter of the whole, and a store
    begins with nothing: three good ones in a row make it one that hits, three bad ones one that does not."""

    __slots__ = ("lookups", "share")

    WHOLE = 1024

    def __init__(self) -> None:
        #: Of `WHOLE`.
        self.share = 0
        #: That were seen.
        self.lookups = 0

    @property
    def is_learning(self) -> bool:
        return self.lookups < LEARNING

    @property
    def are_usual(self) -> bool:
        """More often than not."""
        return 2 * self.share >= self.WHOLE

    def see(self, found: int, asked: int) -> None:
        """A look-up came to its end."""
        self.lookups += 1
        self.share += (self.WHOLE * found // max(1, asked) - self.share) // 4

    def see_failure(self) -> None:
        """It found nothing out, and nobody waits any more only to learn."""
        self.see(0, 1)
        self.lookups = max(self.lookups, LEARNING)


class CostGate:
    """Rates, and what follows from them for one request."""

    def __init__(self, digest: StateDigest, chunk_tokens: int, lookup_timeout_us: int) -> None:
        self._digest = digest
        self._lookup_timeout_us = lookup_timeout_us
        self._prefill = Prefill(chunk_tokens)
        self._reads = Pace()
        #: What a look-up takes; None: nothing is known of this store yet.
        self._lookup_us: int | None = None
        self._hits = Hits()
        #: Operations that failed, since the last that did not.
        self._failures = 0
        #: Reads have taken as long as they should.
        self.keeps_its_word = True
        self._epoch = 0
        self._probed_us: int | None = None
        #: Prompt tokens that running requests have still to compute, and those that wait in line and do not fetch.
        self.running_tokens = self.waiting_tokens = 0

    # ------------------------------------------------------------------------------------------------ rates

    def prefill_rate(self) -> float | None:
        """Tokens per second; None: not measured yet."""
        return self._prefill.pace.per_second()

    def storage_rate(self) -> float | None:
        """Tokens per second that reads bring, 0 where they bring nothing; None: not measured in this attachment."""
        return self._reads.per_second()

    def lookup_s(self) -> float | None:
        """Seconds of a look-up; None: not measured in this attachment."""
        return None if self._lookup_us is None else self._lookup_us / 1e6

    def hit_share(self) -> float | None:
        """Share of what look-ups asked for that was there lately; None: not measured in this attachment."""
        return self._hits.share / Hits.WHOLE if self._hits.lookups else None

    # ------------------------------------------------------------------------------------------ observations

    def computes(self, tokens: int, decodes: int, samples: bool, left_tokens: int) -> None:
        """What the forward of this tick is made of, and what is left of the prompts after it."""
        self._prefill.computes(tokens, decodes, samples)
        self.running_tokens = left_tokens

    def forward_took(self, forward_us: int) -> None:
        """How long the forward of the tick before was; 0: there was none."""
        if self._prefill.took(forward_us):
            self._mix()

    def attached(self, epoch: int) -> None:
        """Operations belong to this attachment from now on: of another one's store nothing is known."""
        if epoch != self._epoch:
            self._epoch, self._reads, self._lookup_us, self._hits = epoch, Pace(), None, Hits()
            self._failures, self.keeps_its_word, self._probed_us = 0, True, None

    def looked_up(self, epoch: int, us: int, found: int, asked: int) -> None:
        """A look-up came to its end, with so many tokens that are worth a read."""
        if epoch == self._epoch:
            self._failures = 0
            self._hits.see(found, asked)
            self._see_lookup(us)

    def lookup_failed(self, epoch: int, us: int) -> None:
        """A look-up came to its end, and nobody knows what the store has."""
        if epoch == self._epoch:
            self._failures += 1
            self._hits.see_failure()
            self._see_lookup(us)

    def lookup_given_up(self, epoch: int, us: int) -> None:
        """It took longer than that.  Doubled: from what is only known to be more, no estimate would ever rise above the
        time for which a request waits, and every one would wait anew."""
        if epoch == self._epoch:
            self._hits.see_failure()
            self._see_lookup(2 * us)

    def read(self, epoch: int, us: int, asked: int, done: int) -> None:
        """A read ended with so many tokens of those that it was asked for."""
        if epoch != self._epoch:
            return
        is_good = 2 * done > asked
        self._failures = 0 if done else self._failures + 1
        self.keeps_its_word = self.keeps_its_word or (is_good and us <= PATIENCE * self._reads.took_us(done))
        self._reads.see(max(1, us), done, 1 if is_good else 2)
        self._mix()

    def read_given_up(self, epoch: int, us: int, asked: int) -> None:
        """It took longer than that, and longer than it should: what reads have taken before says nothing any more."""
        if epoch == self._epoch:
            self.keeps_its_word = False
            if us > self._reads.took_us(asked):
                self._reads.see(2 * us, asked, 4)
            self._mix()

    def _see_lookup(self, us: int) -> None:
        """Beyond its time-out a look-up is a miss however long it takes, and what has become quick is soon known."""
        us = min(us, 2 * self._lookup_timeout_us)
        before = us if self._lookup_us is None else self._lookup_us
        self._lookup_us = (before + us) // 2 if us < before else (3 * before + us) // 4
        self._mix()

    # --------------------------------------------------------------------------------------------- decisions

    def decide(self, tokens: int, ahead: int, now_us: int, may_probe: bool) -> wire.FetchDecision:
        """Of a request that lacks so many tokens, while so many are being read for others."""
        compute_us, lookup_us = self.compute_us(tokens), self._lookup_us
        if compute_us is None or lookup_us is None:
            reason = f"the rate of {'prefill' if compute_us is None else 'storage'} is not measured yet"
            return wire.FetchDecision(verdict="fetch", reason=reason, tokens=tokens)
        fetch_us = lookup_us + (self._reads.took_us(ahead + tokens) if self._reads.is_known else 0)
        is_learning = self._hits.is_learning and self.keeps_its_word
        objection = "" if is_learning else self._objection(tokens, ahead, fetch_us, lookup_us)
        is_due = self._probed_us is None or now_us - self._probed_us >= PROBE_US
        is_probe = bool(objection) and may_probe and is_due
        self._probed_us = now_us if is_probe else self._probed_us
        self._digest.mix(73, tokens, ahead, bool(objection), is_probe)
        known = "too little is known of this store yet" if is_learning else QUICKER
        return wire.FetchDecision(
            verdict="probe" if is_probe else "recompute" if objection else "fetch",
            reason=objection or known, tokens=tokens, fetch_s=fetch_us / 1e6, recompute_s=compute_us / 1e6,
        )

    def _objection(self, tokens: int, ahead: int, fetch_us: int, lookup_us: int) -> str:
        """Why storage would cost this request more than it can bring, "" if it should not."""
        if self._failures >= MOST_FAILURES:
            return f"the last {self._failures} operations of the store failed"
        most_us = min(self.budget_us(tokens) or 0, self._lookup_timeout_us)
        if lookup_us > most_us and not self._hits_pay(tokens, ahead):
            there = f"{100 * self._hits.share // Hits.WHOLE} % of what was asked for lately was there"
            return f"look-ups take {_ms(lookup_us)}, and this request may wait for {_ms(most_us)}; {there}"
        return self._objection_to_time(tokens, fetch_us)

    def _hits_pay(self, tokens: int, ahead: int) -> bool:
        """Should a look-up save clearly more than it costs, also if it does not hit each time?"""
        compute_us, lookup_us = self.compute_us(tokens), self._lookup_us
        if compute_us is None or lookup_us is None or lookup_us > self._lookup_timeout_us:
            return False
        if not (self._hits.are_usual and self._reads.is_known and self.keeps_its_word):
            return False
        saved_us = (compute_us - self._reads.took_us(ahead + tokens)) * self._hits.share // Hits.WHOLE
        return saved_us >= CLEARLY * lookup_us

    def lookup_wait_us(self, tokens: int, ahead: int) -> int | None:
        """How long a request may wait for its look-up; None: as long as that may take at all."""
        budget_us = self.budget_us(tokens)
        if budget_us is None or self._lookup_us is None or (self._hits.is_learning and self.keeps_its_word):
            return None
        return max(budget_us, PATIENCE * self._lookup_us) if self._hits_pay(tokens, ahead) else budget_us

    def compute_us(self, tokens: int) -> int | None:
        """How long so many tokens of a prompt take; None: not measured yet."""
        return self._prefill.pace.took_us(tokens) if self._prefill.pace.is_known else None

    def budget_us(self, tokens: int) -> int | None:
        """What a request may lose to storage that lacks so many tokens; None: not known."""
        compute_us = self.compute_us(tokens)
        return None if compute_us is None else int(compute_us * LOSS_SHARE)

    def read_us(self, tokens: int, ahead: int) -> int | None:
        """How long a read should take behind so many other tokens; None: not measured yet."""
        if self.compute_us(tokens) is None or not self._reads.is_known or self._lookup_us is None:
            return None
        return self._lookup_us + self._reads.took_us(ahead + tokens)

    def objects_to_read(self, tokens: int, ahead: int) -> str:
        """The store has these tokens: why they should not be read all the same, "" if they should."""
        read_us = self.read_us(tokens, ahead)
        return "" if read_us is None else self._objection_to_time(tokens, read_us)

    def _objection_to_time(self, tokens: int, fetch_us: int) -> str:
        if not self.keeps_its_word:
            return "the latest read took longer than it should"
        queued_us = self._prefill.pace.took_us(tokens + self.running_tokens + self.waiting_tokens)
        if fetch_us < queued_us:
            return ""
        return f"fetching takes {_ms(fetch_us)}, computing with what is before it {_ms(queued_us)}"

    def _mix(self) -> None:
        """Everything that an observation changes."""
        prefill, reads = self._prefill.pace, self._reads
        lookup_us = -1 if self._lookup_us is None else self._lookup_us
        self._digest.mix(
            74, prefill.us, prefill.tokens, reads.us, reads.tokens, lookup_us, self._failures, self.keeps_its_word,
            self._hits.share, self._hits.lookups,
        )


def _ms(us: int) -> str:
    return f"{us / 1000:.1f} ms"
