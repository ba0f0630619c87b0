"""The storage driver against played storage processes: every way in which one can speak, refuse, end or not end."""

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.errors import ProtocolError, UserError
from sglang_hicache.scheduler.storage_driver import ALL_PAGES, LAST_WORDS_US, REAP_TIMEOUT_US, RELAPSE_US
from sglang_hicache.storage.attachment_events import Kill, Spawn, Stop

READ = wire.ReadPages(op_id=7, keys=[b"k"], host_pages=[0])


def spawn(storage, epoch: int = 1):
    storage.driver.carry_out(Spawn(epoch, "memory", "{}"), now_us=0)
    return storage.clients[epoch]


def facts(storage, now_us: int = 0):
    storage.driver.poll(now_us)
    return storage.driver.take_facts()


def kinds(found) -> list[str]:
    return [fact.kind for fact in found.storage]


def test_opened_tells_what_the_backend_says_of_itself(storage):
    spawn(storage).said = [wire.BackendOpened(epoch=1, info={"path": "/x", "fsync": "none"})]
    (fact,) = facts(storage).storage
    assert (fact.kind, fact.epoch, fact.detail) == ("opened", 1, "path=/x\nfsync=none")
    assert storage.driver.info(1) == {"path": "/x", "fsync": "none"}
    assert storage.driver.info(2) == {}
    assert not storage.driver.take_facts(), "a fact is told once"


def test_a_refused_open_is_followed_by_the_reap_and_is_not_lost(storage):
    client = spawn(storage)
    client.said, client.status = [wire.BackendOpenFailed(epoch=1, reason="no such host")], 1
    found = facts(storage)
    assert kinds(found) == ["open_failed", "reaped", "quiet"]
    assert found.storage[0].detail == "no such host"
    assert client.did == ["stop", "reap", "close"]


@pytest.mark.parametrize("refusal", [OSError("no memory"), UserError("too long")])
def test_a_process_that_cannot_be_started_failed_to_open(storage, refusal):
    storage.refusal = refusal
    storage.driver.carry_out(Spawn(1, "memory", "{}"), now_us=0)
    found = facts(storage)
    assert kinds(found) == ["open_failed", "reaped", "quiet"]
    assert str(refusal) in found.storage[0].detail


def test_only_the_newest_progress_of_an_op_is_told(storage):
    spawn(storage).said = [
        wire.OpProgress(op_id=7, pages=1, settled=False, closed=False),
        wire.OpProgress(op_id=7, pages=2, settled=True, closed=True, corrupt=1, reason="checksum"),
        wire.OpProgress(op_id=8, pages=0, settled=False, closed=False),
    ]
    assert list(facts(storage).ops.values()) == [
        wire.OpFact(7, 2, True, True, "checksum"),
        wire.OpFact(8, 0, False, False),
    ]
    assert storage.driver.counters.snapshot() == {"storage_corrupt_pages": 1, "storage_stopped_other": 1}


def test_a_store_that_fails_says_why_once_in_the_log_and_always_in_the_status(storage, caplog):
    """1. The disk is full. 2. Serving goes on, every write fails. 3. Nobody was told: attached, and no error."""
    client = spawn(storage)
    assert storage.driver.failure(1) == ("", 0)
    client.said = [wire.OpProgress(op_id=1, pages=0, settled=True, closed=True, reason="revoked")]
    facts(storage)
    assert storage.driver.failure(1) == ("", 0) and not caplog.records, "a revoked op is no failure"
    for op_id in (2, 3):
        reason = f"no_space: cannot write page {op_id}"
        client.said = [wire.OpProgress(op_id=op_id, pages=0, settled=True, closed=True, reason=reason)]
        facts(storage)
        assert storage.driver.failure(1)[0] == reason
    client.said = [wire.OpProgress(op_id=4, pages=0, settled=True, closed=True, reason="revoked")]
    facts(storage)
    assert storage.driver.failure(1)[0] == "no_space: cannot write page 3"
    assert [record.getMessage() for record in caplog.records] == ["storage failed: no_space: cannot write page 2"]
    storage.driver.carry_out(Stop(1), now_us=0)
    client.status = 0
    facts(storage)
    assert storage.driver.failure(1) == ("", 0), "the next attachment starts clean"


def test_a_failure_has_an_age_and_is_news_again_after_a_rest(storage, caplog):
    """1. The disk is full at one, and has room at two. 2. It is full again the next night. 3. The log said nothing of
    the second time, and the status showed an error of which nobody knew whether it was over.  Of two failures that took
    turns, on the other hand, the log told each time."""
    client = spawn(storage)
    for number, now_us in enumerate((7, 8, 8 + RELAPSE_US, 10 + 2 * RELAPSE_US)):
        client.said = [wire.OpProgress(op_id=8, pages=0, settled=True, closed=True, reason=f"io: page {number}")]
        facts(storage, now_us=now_us)
        reason = f"no_space: page {number}"
        client.said = [wire.OpProgress(op_id=number, pages=0, settled=True, closed=True, reason=reason)]
        facts(storage, now_us=now_us)
        assert storage.driver.failure(1) == (reason, now_us)
    assert [record.getMessage()[-1] for record in caplog.records] == ["0", "0", "3", "3"]
    client.said = [wire.OpProgress(op_id=9, pages=0, settled=True, closed=True, reason="revoked")]
    facts(storage, now_us=11 + 2 * RELAPSE_US)
    assert storage.driver.failure(1) == (reason, 10 + 2 * RELAPSE_US), "a revoked op is no failure"


@pytest.mark.parametrize(("status", "level"), [(0, "INFO"), (-9, "WARNING"), (1, "WARNING")])
def test_a_stop_that_ends_otherwise_than_by_exit_0_is_a_warning(storage, caplog, status, level):
    """A backend that crashes while it closes: the detach succeeds, and the log must not call it an ordinary end."""
    caplog.set_level("INFO")
    client = spawn(storage)
    storage.driver.carry_out(Stop(1), now_us=0)
    client.status = status
    assert kinds(facts(storage)) == ["reaped", "quiet"]
    assert [record.levelname for record in caplog.records] == [level]


def test_an_op_that_meets_a_full_socket_is_closed_at_zero(storage):
    spawn(storage).is_full = True
    storage.driver.send(1, READ)
    assert facts(storage).ops == {7: wire.OpFact(7, 0, True, True, "queue_full")}
    assert storage.driver.counters.get("storage_stopped_queue_full") == 1


def test_an_op_for_a_process_that_is_gone_is_closed_at_zero_and_one_that_was_sent_is_not(storage):
    """Ops that were handed over are closed by the reap, in the plan that carries it for every rank."""
    client = spawn(storage)
    storage.driver.send(1, READ)
    client.status = -9
    found = facts(storage)
    assert kinds(found) == ["lost", "reaped", "quiet"]
    assert found.ops == {}
    storage.driver.send(1, wire.WritePages(op_id=8, keys=[b"k"], host_pages=[0], parent=b"", depth=0))
    storage.driver.send(1, wire.RevokeOp(op_id=7))
    storage.driver.send(1, wire.ClearPages(command_id="c"))
    found = facts(storage)
    assert found.ops == {8: wire.OpFact(8, 0, True, True, "gone")}
    assert found.clears == [wire.ClearFact("c", "the storage process is gone")]


def test_a_refusal_that_arrives_after_the_end_was_seen_is_told(storage):
    """Its reason is what an operator needs; "exit code 1" helps nobody."""
    client = spawn(storage)
    client.status = 1
    assert not facts(storage, now_us=1)
    assert storage.driver.wake_at_us() == 1 + LAST_WORDS_US
    client.said = [wire.BackendOpenFailed(epoch=1, reason="no such host")]
    found = facts(storage, now_us=2)
    assert kinds(found) == ["open_failed", "reaped", "quiet"]
    assert found.storage[0].detail == "no such host"


@pytest.mark.parametrize(("status", "waits"), [(0, True), (3, True), (-9, False)])
def test_an_end_without_a_word_is_a_loss(storage, status, waits):
    client = spawn(storage)
    client.status = status
    if waits:
        assert not facts(storage, now_us=1) and not facts(storage, now_us=LAST_WORDS_US)
    assert kinds(facts(storage, now_us=1 + LAST_WORDS_US)) == ["lost", "reaped", "quiet"]
    assert storage.driver.wake_at_us() is None


def test_last_words_are_heard_before_the_reap_is_told(storage):
    client = spawn(storage)
    client.status = 0
    client.said = [wire.OpProgress(op_id=7, pages=1, settled=True, closed=True)]
    storage.driver.carry_out(Stop(1), now_us=0)
    found = facts(storage)
    assert found.ops[7].pages == 1
    assert kinds(found) == ["reaped", "quiet"]


def test_an_end_that_was_asked_for_is_not_lost(storage):
    client = spawn(storage)
    storage.driver.carry_out(Stop(1), now_us=0)
    assert client.did == ["stop"]
    assert not facts(storage)
    client.status = 0
    assert kinds(facts(storage)) == ["reaped", "quiet"]


def test_a_killed_process_that_does_not_end_is_told_once_and_its_late_end_as_well(storage):
    client = spawn(storage)
    storage.driver.carry_out(Kill(1), now_us=1_000)
    assert storage.driver.wake_at_us() == 1_000 + REAP_TIMEOUT_US
    assert not facts(storage, now_us=REAP_TIMEOUT_US)
    found = facts(storage, now_us=1_000 + REAP_TIMEOUT_US)
    assert kinds(found) == ["reap_timeout"]
    assert "4711" in found.storage[0].detail
    assert storage.driver.wake_at_us() is None
    assert not facts(storage, now_us=10 * REAP_TIMEOUT_US)
    client.status = -9
    assert kinds(facts(storage)) == ["reaped", "quiet"]


def test_a_process_whose_hardware_may_write_on_is_reaped_but_never_quiet(storage, monkeypatch):
    monkeypatch.setenv("SGLANG_HICACHE_ALLOW_FAULTY", "1")
    storage.driver.carry_out(Spawn(1, "faulty", '{"inner": "memory", "late_io": true}'), now_us=0)
    storage.clients[1].status = -11
    assert kinds(facts(storage)) == ["lost", "reaped"]


def test_a_process_that_speaks_nonsense_is_killed_and_lost(storage):
    client = spawn(storage)
    client.said = [ProtocolError("malformed message")]
    assert not facts(storage)
    assert client.did == ["kill"]
    client.status = -9
    assert kinds(facts(storage)) == ["lost", "reaped", "quiet"]


def test_a_revoke_that_met_a_full_socket_is_sent_later(storage):
    client = spawn(storage)
    client.is_full = True
    storage.driver.send(1, wire.RevokeOp(op_id=7))
    assert not facts(storage) and client.sent == []
    client.is_full = False
    facts(storage)
    assert client.sent == [wire.RevokeOp(op_id=7)]


def test_two_epochs_live_beside_each_other(storage):
    old, new = spawn(storage, 1), spawn(storage, 2)
    storage.driver.send(2, READ)
    assert (old.sent, new.sent) == ([], [READ])
    old.status = 0
    storage.driver.carry_out(Stop(1), now_us=0)
    assert [(fact.kind, fact.epoch) for fact in facts(storage).storage] == [("reaped", 1), ("quiet", 1)]
    storage.driver.carry_out(Kill(1), now_us=0)  # a plan that crossed with the end


def test_a_clear_is_answered(storage):
    spawn(storage).said = [wire.ClearDone(command_id="c", reason="busy")]
    assert facts(storage).clears == [wire.ClearFact("c", "busy")]


def test_finished_copies_are_whole_and_closed(storage):
    storage.driver.copies_finished([3])
    assert facts(storage).ops == {3: wire.OpFact(3, ALL_PAGES, True, True)}


def test_closing_leaves_no_process(storage):
    client = spawn(storage)
    storage.driver.close()
    assert client.did == ["kill", "close"]


def test_counters_of_a_backend_outlive_its_processes_and_levels_do_not(storage):
    """1. Attach, write. 2. Detach, attach again. 3. The series falls back to 0: a dashboard shows a negative rate."""
    client = spawn(storage)
    client.said = [wire.BackendStats(epoch=1, stats={"evicted_pages": 2}),
                   wire.BackendStats(epoch=1, stats={"evicted_pages": 3, "used_bytes": 100})]  # fmt: skip
    facts(storage)
    assert storage.driver.stats(1) == {"evicted_pages": 3, "used_bytes": 100}
    assert storage.driver.totals() == {"memory": {"evicted_pages": 3}}
    # The next one opens while this one drains, and the last words of this one come with its end.
    spawn(storage, epoch=2).said = [wire.BackendStats(epoch=2, stats={"evicted_pages": 10, "used_bytes": 7})]
    storage.driver.carry_out(Stop(1), now_us=0)
    client.said, client.status = [wire.BackendStats(epoch=1, stats={"evicted_pages": 4})], 0
    facts(storage)
    assert storage.driver.stats(1) == {}
    assert storage.driver.stats(2) == {"evicted_pages": 10, "used_bytes": 7}
    assert storage.driver.totals() == {"memory": {"evicted_pages": 14}}


def test_nothing_overtakes_a_namespace_that_did_not_fit(storage):
    """An op behind it would be carried out under the old name: with a full socket the op is refused instead."""
    client = spawn(storage)
    client.is_full = True
    storage.driver.use_namespace("n2")
    client.is_full = False
    storage.driver.send(1, READ)
    assert client.sent == []
    assert facts(storage).ops[7].closed
    assert client.sent == [wire.UseNamespace(namespace="n2")]
    storage.driver.send(1, READ)
    assert client.sent[1:] == [READ]


def test_a_vote_on_new_weights_is_a_fact(storage):
    storage.driver.weights_read("u", "no room")
    assert facts(storage).weights == [wire.WeightsFact("u", "no room")]


@pytest.mark.parametrize(
    "message",
    [
        wire.BackendStats(epoch=1, stats={"read_bytes": 1 << 63}),
        wire.BackendStats(epoch=1, stats={f"number {n}": n for n in range(1000)}),
        wire.BackendStats(epoch=1, stats={"n" * 1000: 1}),
        wire.OpProgress(op_id=7, pages=-1, settled=True, closed=True),
        wire.OpProgress(op_id=7, pages=0, settled=True, closed=True, corrupt=1 << 63),
    ],
)
def test_numbers_that_no_status_could_carry_are_malformed(message):
    """Two of them added up do not fit into any message: the rank that answers the next status would end."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=wire.FromStorage)
