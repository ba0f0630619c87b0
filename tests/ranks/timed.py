"""A simulated server in which everything takes its time: a forward so much for each token, the store what a test says.

Time goes on from one event to the next, so that what a request waits for is exact to the microsecond.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import structs

from sglang_hicache import wire
from sglang_hicache.cache.cost_gate import CostGate
from sglang_hicache.cache.page import page_keys
from sglang_hicache.config import ServerConfig
from tests.ranks.world import PAGE, PlayedStorage, SimRank, World, server_config

US_PER_TOKEN = 200
#: Of a tick without a forward, and on top of one.
TICK_US = 200
TOKENS = 500
#: What computing a prompt of so many tokens takes, the tick included.
COMPUTE_US = TOKENS * US_PER_TOKEN + TICK_US

ATTACH = {"backend": "memory", "prefetch_policy": "timeout", "extra_config_json": '{"prefetch_threshold": 16}'}

FETCHES = wire.LookupPages | wire.ReadPages

#: Microseconds that the store needs for a message at some time; None: it never answers.
Takes = Callable[[wire.ToStorage, int], "int | None"]


def timed_config(ranks: int = 1, **cache: object) -> ServerConfig:
    """Room for everything, and long prompts in one tick."""
    config = server_config(ranks, device_pages=20_000, host_pages=20_000, **cache)
    limits = structs.replace(config.scheduler, chunked_prefill_size=2048)
    storage = structs.replace(config.storage, lookup_timeout_s=0.05, op_timeout_s=30.0, upload_rate_mib=0.0)
    return structs.replace(config, scheduler=limits, storage=storage)


def quick(message: wire.ToStorage, _now_us: int) -> int:
    """A healthy store: 1 ms for a look-up, a tenth of the time of computing for a read."""
    return 1000 if isinstance(message, wire.LookupPages) else 1000 + len(message.keys) * PAGE * US_PER_TOKEN // 10


class TimedWorld(World):
    """One store, attached with the policy `timeout` unless a test wants another one."""

    def __init__(self, ranks: int = 1, takes: Takes = quick, **attach: object) -> None:
        super().__init__(0, ranks, fault_rate=0.0, check_each_tick=False, config=timed_config(ranks))
        self.takes = takes
        #: Codes with which look-ups and reads fail.
        self.fails: dict[type, str] = {}
        self.first_token_us: dict[str, int] = {}
        #: Of the op that a process works on.
        self._began_us: dict[PlayedStorage, int] = {}
        self._ends_us: dict[PlayedStorage, int | None] = {}
        self._prompts = 0
        self.us_per_token, self.watch = US_PER_TOKEN, self._begin
        command = self.command(wire.AttachStorage, **(ATTACH | attach))
        self.settle()
        assert self.answer(command).success

    @property
    def gate(self) -> CostGate:
        return self.ranks[0].core.tiers.gate

    # ---------------------------------------------------------------------------------------------- requests

    def prompt(self, tokens: int = TOKENS, stored_pages: int = 0) -> list[int]:
        """A text that nobody has seen; so many of its pages are in the store."""
        self._prompts += 1
        text = [1000 * self._prompts + i % 900 for i in range(tokens)]
        (store,) = self.stores.values()
        for at, key in enumerate(page_keys(text, PAGE)[:stored_pages]):
            for rank in self.ranks:
                store[rank.number, key] = ("", *text[: (at + 1) * PAGE])
        return text

    def ask(self, tokens: list[int]) -> wire.RequestOutput:
        """One request, to its end."""
        rid = self.submit(tokens, max_new_tokens=1)
        self.until(lambda: rid in self.first_token_us)
        return self.output(rid)

    def first_token(self, tokens: list[int]) -> int:
        """Microseconds to the first token of one request."""
        began_us = self.now_us
        return self.first_token_us[self.ask(tokens).rid] - began_us

    def output(self, rid: str) -> wire.RequestOutput:
        return next(o for o in self.ranks[0].outputs if o.rid == rid)

    def rest(self, seconds: float) -> None:
        """Nobody asks for a while."""
        ends_us = self.now_us + int(seconds * 1e6)
        self.until(lambda: self.now_us >= ends_us, ends_us)

    # -------------------------------------------------------------------------------------------------- time

    def until(self, is_over: Callable[[], bool], latest_us: int | None = None) -> None:
        """Let time pass from one event to the next."""
        for _ in range(200_000):
            if is_over():
                return
            for rank in self.ranks:
                while rank.copies:
                    rank.finish_copy()
                for process in list(rank.storage.values()):
                    self._serve(process)
                self.deliver(rank)
            led = self.lead()
            for rank in self.ranks[1:]:
                while rank.inbox:
                    self.follow(rank)
            if not led:
                ends = [at for at in self._ends_us.values() if at is not None]
                known = [at for at in (self.leader.wake_at_us(self.ranks[0].core), latest_us, *ends) if at is not None]
                assert known, "nothing will ever happen again"
                self.now_us = max(self.now_us + 1, min(known))
        raise AssertionError("it never came to an end")

    def lead(self) -> bool:
        outputs = self.ranks[0].outputs
        seen = len(outputs)
        led = super().lead()
        self.now_us += TICK_US if led else 0
        for output in outputs[seen:]:
            self.first_token_us.setdefault(output.rid, self.now_us)
        return led

    def _begin(self, rank: SimRank) -> None:
        """Storage works while the forward runs."""
        for process in list(rank.storage.values()):
            self._serve(process)

    def _serve(self, process: PlayedStorage) -> None:
        """What a storage process has done until now: look-ups and reads take their time, all else is done at once."""
        if process.state != "open":
            process.step()
            return
        for message in [m for m in process.queue if not isinstance(m, FETCHES | wire.RevokeOp)]:
            process.queue.remove(message)
            process.queue.appendleft(message)
            while process.queue and process.queue[0] is message:
                process.work(message)
        self._revoke(process)
        began_us = self.now_us
        while process.queue:
            if process not in self._ends_us:
                takes_us = self.takes(process.queue[0], began_us)
                self._ends_us[process] = None if takes_us is None else began_us + takes_us
                self._began_us[process] = began_us
            ends_us, began_us = self._ends_us[process], self._began_us[process]
            if ends_us is None or ends_us > self.now_us:
                return
            del self._ends_us[process]
            self._end(process, ends_us - began_us)
            began_us = ends_us

    def _end(self, process: PlayedStorage, takes_us: int) -> None:
        """The head of the line has had its time."""
        message, facts = process.queue[0], process.rank.op_facts
        before = len(facts)
        code = self.fails.get(type(message))
        if code:
            process.fact(message.op_id, 0, True, code)
        while process.queue and process.queue[0] is message:
            process.work(message)
        facts[before:] = [structs.replace(fact, took_us=takes_us) for fact in facts[before:]]

    @staticmethod
    def _revoke(process: PlayedStorage) -> None:
        """An op that waits in line ends at once; one that is being done, when it has had its time."""
        revokes = [m for m in process.queue if isinstance(m, wire.RevokeOp)]
        for revoke in revokes:
            process.queue.remove(revoke)
            process.revoked.add(revoke.op_id)
        for message in list(process.queue)[1:]:
            if message.op_id in process.revoked:
                process.queue.remove(message)
                process.rank.op_facts.append(wire.OpFact(message.op_id, 0, True, True, "revoked"))
