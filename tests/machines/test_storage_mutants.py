"""The storage machine is only proof if it catches mistakes: each mutant is one, and some run must fail with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import Phase

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.backup_books import Books
from sglang_hicache.cache.node import Node
from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.cache.page import flat_page_keys
from sglang_hicache.cache.prefetch import Prefetcher
from sglang_hicache.cache.residency import Residency
from sglang_hicache.cache.storage_ops import StorageOps
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.cache.tree import PrefixTree
from sglang_hicache.errors import IntegrityError
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import Cleared, Event, FreeOps, Instruction, Kill
from sglang_hicache.storage.page_format import IncomingPage, Verdict
from tests.machines.storage_machine import play

Patch = pytest.MonkeyPatch


def an_unlock_is_skipped(patch: Patch) -> None:
    real = Residency.unlock_host

    def unlock_host(self: Residency, node: Node) -> None:
        if node.id % 8:
            real(self, node)

    patch.setattr(Residency, "unlock_host", unlock_host)


def pages_of_a_read_are_freed_twice(patch: Patch) -> None:
    real = Prefetcher.close

    def close(self: Prefetcher, op: Op) -> None:
        pages = list(op.host_pages)
        real(self, op)
        self._controller.host.free(pages)

    patch.setattr(Prefetcher, "close", close)


def pages_are_freed_by_the_revoke(patch: Patch) -> None:
    real = Tiers.take_effects

    def take_effects(self: Tiers) -> object:
        effects = real(self)
        for _, message in effects.to_storage:
            op = self.ops.get(message.op_id) if isinstance(message, wire.RevokeOp) else None
            if op is not None:
                self.controller.host.free(op.host_pages)
                op.host_pages = []
        return effects

    patch.setattr(Tiers, "take_effects", take_effects)


def pages_are_freed_by_the_kill(patch: Patch) -> None:
    """A process that was told to die may still finish its batch."""
    real = Tiers.carry_out

    def carry_out(self: Tiers, instructions: list[Instruction]) -> None:
        real(self, instructions)
        for kill in [each for each in instructions if isinstance(each, Kill)]:
            for op in self.ops.of_epoch(kill.epoch):
                self.controller.host.free(op.host_pages)
                op.host_pages = []

    patch.setattr(Tiers, "carry_out", carry_out)


def ops_are_forgotten_at_the_reap(patch: Patch) -> None:
    real = Tiers.carry_out

    def carry_out(self: Tiers, instructions: list[Instruction]) -> None:
        real(self, [each for each in instructions if not isinstance(each, FreeOps)])

    patch.setattr(Tiers, "carry_out", carry_out)


def pages_are_published_before_they_were_read(patch: Patch) -> None:
    real = Tiers.op_outcome

    def op_outcome(self: Tiers, outcome: wire.OpOutcome, tick: int, now_us: int) -> None:
        op = self.ops.get(outcome.op_id)
        pages = op.pages if op is not None and op.kind is OpKind.READ else outcome.pages
        real(self, wire.OpOutcome(outcome.op_id, pages, outcome.closed), tick, now_us)

    patch.setattr(Tiers, "op_outcome", op_outcome)


def half_a_node_under_a_copy_is_published(patch: Patch) -> None:
    real = PrefixTree.split

    def split(self: PrefixTree, node: Node, pages: int) -> Node:
        upper = real(self, node, pages)
        upper.landing = 0
        return upper

    patch.setattr(PrefixTree, "split", split)


def a_child_is_offered_before_its_parent(patch: Patch) -> None:
    patch.setattr(BackupQueue, "_is_stored", lambda self, node: True)


def the_key_chain_starts_in_the_middle(patch: Patch) -> None:
    def page_keys(self: Node) -> tuple[bytes, ...]:
        if self.keys is None:
            above = self.parent.keys if self.parent is not None else None
            page_bytes = len(self.key) // self.page_count
            self.keys = tuple(flat_page_keys(self.key, page_bytes, above[-1] if above else self.seed))
        return self.keys

    patch.setattr(Node, "page_keys", page_keys)


def marks_outlive_a_clear(patch: Patch) -> None:
    real = StorageSlot.handle

    def handle(self: StorageSlot, event: Event) -> list[Instruction]:
        instructions = real(self, event)
        self.generation -= isinstance(event, Cleared)
        return instructions

    patch.setattr(StorageSlot, "handle", handle)


def damage_is_not_noticed(patch: Patch) -> None:
    real = IncomingPage.judge

    def judge(self: IncomingPage, *rest: object) -> Verdict:
        verdict = real(self, *rest)
        return Verdict.GOOD if verdict is Verdict.CHECKSUM else verdict

    patch.setattr(IncomingPage, "judge", judge)


def an_op_is_closed_without_the_slot(patch: Patch) -> None:
    real = StorageOps.close

    def close(self: StorageOps, op: Op) -> None:
        if op.kind is OpKind.LOOKUP:
            self._ops.remove(op)
        else:
            real(self, op)

    patch.setattr(StorageOps, "close", close)


def a_recovery_is_not_counted(patch: Patch) -> None:
    real = Books._store

    def store(self: Books, node: Node, how: str) -> None:
        node.lost = None
        real(self, node, how)

    patch.setattr(Books, "_store", store)


MUTANTS: list[Callable[[Patch], None]] = [
    an_unlock_is_skipped, pages_of_a_read_are_freed_twice, pages_are_freed_by_the_revoke, pages_are_freed_by_the_kill,
    ops_are_forgotten_at_the_reap, pages_are_published_before_they_were_read, half_a_node_under_a_copy_is_published,
    a_child_is_offered_before_its_parent, the_key_chain_starts_in_the_middle, marks_outlive_a_clear,
    damage_is_not_noticed, an_op_is_closed_without_the_slot, a_recovery_is_not_counted,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_machine_catches(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    """Within 20,000 steps; most need some hundred."""
    mutant(monkeypatch)
    with pytest.raises((IntegrityError, AssertionError)):
        play(200, 100, derandomize=True, phases=[Phase.generate])
