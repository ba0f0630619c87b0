"""The tick loop of a single rank with a synthetic model: from a request on the socket to its answer, and the sleep."""

import contextlib
import threading
from collections.abc import Callable

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import ProtocolError
from sglang_hicache.heartbeat import Heartbeat
from sglang_hicache.observe import without_secrets
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.scheduler.failover import Canary
from sglang_hicache.scheduler.loop import TickLoop, now_us
from sglang_hicache.scheduler.mailbox import LeaderMailbox
from sglang_hicache.scheduler.probes import Probes
from sglang_hicache.scheduler.storage_driver import StorageDriver
from sglang_hicache.scheduler.weights_driver import WeightsDriver
from sglang_hicache.sockets import Poller, Pull, Push, ipc_address
from sglang_hicache.workers.batch import KVLayout
from sglang_hicache.workers.staging import StagedWeights
from sglang_hicache.workers.synthetic import SyntheticWorker
from tests.unit.rank.conftest import PlayedClient

SHUTDOWN = wire.Shutdown(id="bye")

#: Sent by the test itself when the loop has ended: nothing of the rank can come after it.
END = wire.CommandAnswer(id="end", rank=0, success=True)


class Rank:
    """Rank 0 of 1 and the tokenizer's ends of its sockets."""

    def __init__(self, config, stack: contextlib.ExitStack, worker: SyntheticWorker, answers_high_water: int = 1000):
        pool = config.pool
        worker.load_blocking(pool.page_size)
        host = stack.enter_context(HostPool(pool.host_tokens // pool.page_size, worker.layout.page_bytes))
        worker.allocate(pool.device_tokens // pool.page_size + 1, host)
        stack.callback(worker.close)
        self.worker = worker
        self.heartbeat = Heartbeat.create(1)
        stack.callback(self.heartbeat.close)
        poller = Poller()
        self.core = SchedulerCore(config, 0)
        mailbox = LeaderMailbox(config, self.core, poller)
        driver = StorageDriver(None, poller)
        self.probes = Probes(None, poller)
        self.names: list[str] = []
        weights = WeightsDriver(worker, driver, self)
        inbox = Pull(ipc_address(config.run_dir, "to_rank_0"), wire.ToRank, bind=True)
        self.from_rank = Pull(ipc_address(config.run_dir, "from_ranks"), wire.FromRank, bind=True)
        self.to_rank = Push(ipc_address(config.run_dir, "to_rank_0"), wire.ToRank)
        self.to_tokenizer = Push(
            ipc_address(config.run_dir, "from_ranks"), wire.FromRank, high_water=answers_high_water
        )
        for thing in (mailbox, inbox, self.from_rank, self.to_rank, self.to_tokenizer):
            stack.callback(thing.close)
        self.loop = TickLoop(
            0, self.core, worker, driver, self.probes, weights, mailbox, inbox, self.to_tokenizer, poller,
            self.heartbeat,
        )

    def name_pages(self, layout: KVLayout, weights_digest: str) -> str:
        """In the place of the launcher of storage processes."""
        self.names.append(weights_digest)
        return weights_digest

    def run(self, *messages: wire.ToRank) -> list[wire.FromRank]:
        """Send messages and let the rank work until a shutdown; everything that came back."""
        for message in messages:
            assert self.to_rank.send(message)
        self.loop.run_blocking()
        self.to_tokenizer.send(END)
        poller, received = Poller(), []
        poller.register(self.from_rank)
        while END not in received:
            assert poller.wait(60_000), f"the end never came after {received}"
            received += self.from_rank.receive_all()
        return received[:-1]


@pytest.fixture
def one_rank(config):
    return msgspec.structs.replace(config, tp_size=1)


def request(rid: str, tokens: list[int], count: int) -> wire.NewRequest:
    return wire.NewRequest(
        rid=rid, token_ids=tokens, sampling=wire.SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
    )


class FinalWorker(SyntheticWorker):
    """Sends the shutdown when it has computed enough, so that the loop lives as long as the requests."""

    def __init__(self, forwards: int) -> None:
        super().__init__()
        self.send_shutdown: Callable[[], object] = lambda: None
        self._left = forwards

    def forward_blocking(self, batch):
        self._left -= 1
        if self._left == 0:
            self.send_shutdown()
        return super().forward_blocking(batch)


def serving(config, stack: contextlib.ExitStack, forwards: int) -> Rank:
    """A rank that is told to stop during its last forward."""
    worker = FinalWorker(forwards)
    rank = Rank(config, stack, worker)
    worker.send_shutdown = lambda: rank.to_rank.send(SHUTDOWN)
    return rank


def test_a_request_is_answered_token_by_token(one_rank):
    with contextlib.ExitStack() as stack:
        rank = serving(one_rank, stack, forwards=5)
        outputs = [output for batch in rank.run(request("r", [5, 3, 1] * 5, 5)) for output in batch.outputs]
        assert [token for output in outputs for token in output.token_ids] == rank.worker.reference([5, 3, 1] * 5, 5)
        assert outputs[-1].finish == wire.FinishReason(type="length")
        assert [output.prompt_tokens for output in outputs] == [15] * len(outputs)


def test_the_plan_after_a_forward_says_how_long_it_took(one_rank):
    with contextlib.ExitStack() as stack:
        rank, told = serving(one_rank, stack, forwards=3), []
        apply = rank.core.apply
        rank.core.apply = lambda plan: told.append(plan.forward_us) or apply(plan)
        rank.run(request("r", [5, 3, 1], 50))
        assert told[0] == 0 < min(told[1:3]), "the first tick has none before it"


def test_the_heartbeat_counts_ticks_and_says_whether_there_is_work(one_rank):
    with contextlib.ExitStack() as stack:
        rank = serving(one_rank, stack, forwards=3)
        rank.run(request("r", [5, 3, 1], 50))
        row = rank.heartbeat.row(0)
        assert row.ticks >= 3
        assert row.pending, "the request was still running when the last tick ended"


def test_a_question_about_the_status_is_answered_without_a_plan(one_rank):
    with contextlib.ExitStack() as stack:
        rank = Rank(one_rank, stack, SyntheticWorker())
        (status,) = rank.run(wire.QueryStatus(id="q"), SHUTDOWN)
        assert (status.id, status.rank, status.state) == ("q", 0, "detached")
        assert rank.core.tick == 1, "only the shutdown took a plan"


@pytest.mark.parametrize(("refused_s_ago", "told"), [(3600, "io: page 7"), (0, "not_found: no such folder")])
def test_the_last_error_is_the_younger_of_the_slot_s_and_the_store_s(one_rank, monkeypatch, refused_s_ago, told):
    """1. A switch is refused; the old store serves on. 2. An hour later that one fails. 3. The status said "no such
    folder, 0.1 s ago", of a folder that nobody uses, and nothing of what had just happened."""
    failed_us = now_us() - 60_000_000
    monkeypatch.setattr(StorageDriver, "failure", lambda self, epoch: ("io: page 7", failed_us))
    with contextlib.ExitStack() as stack:
        rank = Rank(one_rank, stack, SyntheticWorker())
        slot = rank.core.tiers.slot
        slot.now_us = now_us() - refused_s_ago * 1_000_000
        slot.last_error = "not_found: no such folder"
        (status,) = rank.run(wire.QueryStatus(id="q"), SHUTDOWN)
    assert status.last_error == told
    assert status.last_error_age_s >= 60.0 if refused_s_ago else status.last_error_age_s < 60.0


UPDATE = wire.UpdateWeights(id="u", deadline_s=60.0, model_path="/new", weights_digest="w1", weight_version="v1")


class WaitingWorker(SyntheticWorker):
    """Reads its weights until the loop has gone to sleep over it a few times."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.read = threading.Event()
        self._error = error
        self.next_weights = StagedWeights(self._read, self._use_weights)

    def _read(self, path: str, digest: str, check: Callable[[], None]) -> str:
        assert self.read.wait(60), "nobody let it go on"
        if self._error is not None:
            raise self._error
        return digest

    def finished_copies(self):
        self.looks = self.__dict__.get("looks", 0) + 1
        if self.looks == 3:
            self.read.set()
        return super().finished_copies()


def updated(config, worker: WaitingWorker) -> tuple[Rank, wire.CommandAnswer]:
    """A rank that is told to update and to leave when it has answered."""
    with contextlib.ExitStack() as stack:
        rank = Rank(config, stack, worker)
        answers = []
        send = rank.to_tokenizer.send

        def sent(message) -> bool:
            if isinstance(message, wire.CommandAnswer) and message.id == "u":
                answers.append(message)
                rank.to_rank.send(SHUTDOWN)
            return send(message)

        rank.to_tokenizer.send = sent
        rank.run(UPDATE)
        return rank, answers[0]


def test_new_weights_are_read_on_a_thread_and_the_loop_sees_when_they_are_there(one_rank):
    rank, answer = updated(one_rank, WaitingWorker())
    assert answer.success, answer
    assert rank.names == ["w1"] and rank.core.update.weight_version == "v1"
    fresh = SyntheticWorker()
    fresh.load_blocking(one_rank.pool.page_size)
    assert rank.worker.reference([1, 2, 3], 4) != fresh.reference([1, 2, 3], 4)


def test_weights_that_cannot_be_read_leave_the_rank_as_it_was(one_rank):
    rank, answer = updated(one_rank, WaitingWorker(OSError("truncated file")))
    assert not answer.success and "rank 0: OSError: truncated file" in answer.message
    assert rank.names == [] and rank.core.update.weight_version == wire.FIRST_WEIGHT_VERSION


def test_a_refusal_is_sent_without_a_forward(one_rank):
    with contextlib.ExitStack() as stack:
        rank = Rank(one_rank, stack, SyntheticWorker())
        (batch,) = rank.run(request("r", [], 1), SHUTDOWN)
        assert batch.outputs[0].finish.type == "abort"
        assert rank.worker.forwards == 0


def test_a_tokenizer_that_does_not_read_stops_the_rank(one_rank):
    with contextlib.ExitStack() as stack:
        rank = Rank(one_rank, stack, SyntheticWorker(), answers_high_water=1)
        rank.from_rank.close()
        for number in range(5000):
            rank.to_rank.send(wire.QueryStatus(id=str(number)))
        with pytest.raises(ProtocolError, match="stopped reading"):
            rank.loop.run_blocking()


DRY_RUN = wire.DryRunStorage(
    id="d", deadline_s=60.0, backend="memory", extra_config_json='{"password": "of-a-dry-run"}'
)


def probing(rank: Rank, *said: wire.FromStorage) -> PlayedClient:
    """The process that this rank will start for its next try of a store."""
    client = PlayedClient(said=list(said))
    rank.probes._launch = lambda number, backend, extra_config_json: client
    return client


def test_a_dry_run_is_answered_without_a_plan_and_its_secrets_are_known(one_rank):
    report = wire.DryRunReport(failed_step="write", code="read_only", reason="no of-a-dry-run")
    with contextlib.ExitStack() as stack:
        rank = Rank(one_rank, stack, SyntheticWorker())
        stack.callback(rank.probes.close)
        probing(rank, wire.DryRunDone(report=report))
        (answer,) = rank.run(DRY_RUN, SHUTDOWN)
    assert (answer.id, answer.success, answer.report.code) == ("d", False, "read_only")
    assert rank.core.tick == 1, "only the shutdown took a plan"
    assert without_secrets("of-a-dry-run") == "***"


def test_a_dry_run_that_is_given_up_is_answered_as_well(one_rank):
    cancel = wire.CancelCommand(id="x", deadline_s=1.0, target="d")
    with contextlib.ExitStack() as stack:
        rank = Rank(one_rank, stack, SyntheticWorker())
        stack.callback(rank.probes.close)
        probing(rank)
        again = msgspec.structs.replace(cancel, id="y")
        answers = {answer.id: answer for answer in rank.run(DRY_RUN, cancel, again, SHUTDOWN)}
    assert answers["d"].report.code == "cancelled" and not answers["d"].success
    assert answers["x"].success and not answers["y"].success
    assert "ended already" in answers["y"].message


def test_a_canary_is_told_to_the_leader(one_rank, monkeypatch):
    with contextlib.ExitStack() as stack:
        rank = Rank(one_rank, stack, SyntheticWorker())
        stack.callback(rank.probes.close)
        probing(rank, wire.DryRunDone(report=wire.DryRunReport(write_page_s=0.25, read_page_s=0.5)))
        apply, facts = rank.core.apply, []

        def applied(plan):
            effects = apply(plan)
            if plan.number == 1:
                effects.canaries.append(Canary(7, "memory", "{}", 60.0))
            return effects

        monkeypatch.setattr(rank.core, "apply", applied)
        next_plan = rank.loop._mailbox.next_plan

        def planned(found, now_us):
            facts.extend(found.canaries)
            if facts:
                rank.loop._mailbox.receive(SHUTDOWN, now_us)
            return next_plan(found, now_us)

        monkeypatch.setattr(rank.loop._mailbox, "next_plan", planned)
        rank.run(wire.AbortRequest(rid="nobody"))
    assert facts[0] == wire.CanaryFact(7, "", 0.75)


def test_secrets_of_an_attach_are_known_to_the_rank_before_anything_else(one_rank):
    """Also of one that is refused: the refusal, and every later line of the log, must not repeat them."""
    config = '{"nested": {"password": "only-the-attach-knows"}}'
    attach = wire.AttachStorage(id="a", deadline_s=1.0, backend="nobody", extra_config_json=config)
    with contextlib.ExitStack() as stack:
        Rank(one_rank, stack, SyntheticWorker()).run(attach, SHUTDOWN)
    assert without_secrets("it was only-the-attach-knows") == "it was ***"
