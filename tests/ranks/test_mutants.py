"""The simulator is only proof if it catches mistakes: each mutant is one, and some run must fail with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.controller import CacheController
from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.cache.prefetch import Prefetcher
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.errors import IntegrityError
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.scheduler.pages import RequestPages
from sglang_hicache.scheduler.tick import Ledger
from tests.ranks.test_ranks_agree import play

Patch = pytest.MonkeyPatch


def closed_by_one_rank(patch: Patch) -> None:
    real = Ledger.add

    def add(self: Ledger, rank: int, ops: list[wire.OpFact], storage: list, clears: list) -> None:
        for everyone in range(self._ranks):
            real(self, everyone, ops, storage if everyone == rank else [], clears if everyone == rank else [])

    patch.setattr(Ledger, "add", add)


def read_pages_freed_when_settled(patch: Patch) -> None:
    real = Prefetcher.read_settled

    def read_settled(self: Prefetcher, op: Op, tick: int) -> None:
        real(self, op, tick)
        self._controller.host.free(op.host_pages)
        op.host_pages = []

    patch.setattr(Prefetcher, "read_settled", read_settled)


def published_before_it_was_read(patch: Patch) -> None:
    real = Tiers.op_outcome

    def op_outcome(self: Tiers, outcome: wire.OpOutcome, tick: int, now_us: int) -> None:
        op = self.ops.get(outcome.op_id)
        pages = op.pages if op is not None and op.kind is OpKind.READ else outcome.pages
        real(self, wire.OpOutcome(outcome.op_id, pages, outcome.closed), tick, now_us)

    patch.setattr(Tiers, "op_outcome", op_outcome)


def device_not_locked_during_write_through(patch: Patch) -> None:
    real = CacheController.write_through

    def write_through(self: CacheController, path: list) -> None:
        before = len(self.copies_out)
        real(self, path)
        for _ in self.copies_out[before:]:
            pass
        for op in [op for op in self.ops if op.kind is OpKind.WRITE_THROUGH and op.node is not None]:
            if any(copy.op_id == op.id for copy in self.copies_out[before:]):
                self.tree.unlock_device(op.node)

    patch.setattr(CacheController, "write_through", write_through)


def rank_decides_by_itself(patch: Patch) -> None:
    real = SchedulerCore.apply

    def apply(self: SchedulerCore, plan: wire.TickPlan) -> object:
        if self.commands._rank == 1 and plan.number % 50 == 0:
            self.tiers.controller.allocate_device(1)
        return real(self, plan)

    patch.setattr(SchedulerCore, "apply", apply)


def prefix_not_locked_before_eviction(patch: Patch) -> None:
    real = RequestPages.take

    def take(self: RequestPages, request: object, *rest: object) -> object:
        tree = self._controller.tree
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(tree, "lock_device", lambda node: None)
            inner.setattr(tree, "unlock_device", lambda node: None)
            match = real(self, request, *rest)
        if match is not None and request.node is not None:
            tree.lock_device(request.node)
        return match

    patch.setattr(RequestPages, "take", take)


def evictions_that_nobody_tells_the_backup_of(patch: Patch) -> None:
    patch.setattr(BackupQueue, "left_host", lambda self, node: None)


def children_stored_before_their_parents(patch: Patch) -> None:
    patch.setattr(BackupQueue, "_is_stored", lambda self, node: True)


def splits_that_nobody_tells_the_backup_of(patch: Patch) -> None:
    patch.setattr(BackupQueue, "divided", lambda self, upper, lower: None)


MUTANTS: list[Callable[[Patch], None]] = [
    closed_by_one_rank, read_pages_freed_when_settled, published_before_it_was_read,
    device_not_locked_during_write_through, rank_decides_by_itself, prefix_not_locked_before_eviction,
    evictions_that_nobody_tells_the_backup_of, children_stored_before_their_parents,
    splits_that_nobody_tells_the_backup_of,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulator_catches(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises((IntegrityError, AssertionError)):
        for seed in range(8):
            play(seed, rounds=8, steps=150)
