"""Two ranks, their storage processes and a leader around the real `StorageSlot`, played through completely.

Here is the environment of the replicas: plans on their way to a follower, storage processes that fail, hang, or
cannot be killed, and a leader that decides from what the ranks reported and from its clock, whose deadline may
pass at any moment.

`explore` plays every interleaving of a scenario, checks the promises of the design in every world, and checks
that every run ends, and ends well.  What leader and ranks decide is in
`Rules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from sglang_hicache.errors import IntegrityError
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import Answer, Kill, Spawn, State, Stop, Verdict
from tests.machines.attachment_replicas import BrokenPromise, Plan, Replica, Replicas, promise
from tests.machines.attachment_rules import Fact, Life, Process, Rank, Rules

#: What a rank reports of its storage process, and the outcome that it can lead to.
LEADS_TO = {"opened": "commit", "open_failed": "open_failed", "lost": "lost", "reap_timeout": "reap_timeout"}


class World(NamedTuple):
    #: Rank 0 is the leader: it has applied every plan.
    ranks: tuple[Rank, ...]
    facts: frozenset[Fact]
    commands_sent: int
    ops_sent: int
    faults_left: int

    def put(self, number: int, rank: Rank) -> World:
        return self._replace(ranks=self.ranks[:number] + (rank,) + self.ranks[number + 1 :])


class Scenario(NamedTuple):
    """What the environment may do: commands in order, so many operations, so many faults."""

    script: tuple[str, ...]
    ranks: int = 2
    pages: int = 1
    ops: int = 1
    faults: int = 1
    #: How many plans a follower may be behind.
    lag: int = 1

    def plan(self, number: int) -> Plan:
        """What the leader plans for a command: its verb, and a name of its own."""
        verb, *rest = self.script[number].split()
        if verb == "cancel":  # its name ends with that of the command that it means, if that has come before
            target = int(rest[0])
            meant = self.plan(target)[1] if target < number else "?"
            return verb, f"{number}: cancel {meant}"
        return verb, f"{number}: {self.script[number]}"


class Urgency(StrEnum):
    """Whether a run may end with this move still possible."""

    MUST = "must"
    #: Commands, operations, faults.
    MAY = "may"
    #: Happens some day: a reap that took for ever, the end of late I/O.
    SOME_DAY = "some day"


Move = tuple[Urgency, str, World]


class Explorer:
    """Plays one scenario completely."""

    def __init__(self, scenario: Scenario, rules: Rules | None = None) -> None:
        self.scenario = scenario
        self.rules = rules or Rules()
        self.replicas = Replicas(scenario.pages)
        #: Runs that ended, by where their slot came to rest.
        self.rest: dict[State, int] = {}
        self.worlds = 0

    # ---- what happens

    def moves(self, world: World) -> Iterator[Move]:
        yield from self._leader_moves(world)
        for number, rank in enumerate(world.ranks):
            if rank.plans:
                plan, *rest = rank.plans
                late = world.put(number, rank._replace(plans=tuple(rest)))
                yield Urgency.MUST, f"rank {number} applies {plan}", self._deliver(late, number, plan)
            if number:
                for plan in self.rules.own_decisions(rank, self.replicas[rank.replica].slot):
                    yield Urgency.MUST, f"rank {number} decides {plan}", self._deliver(world, number, plan)
            for process in rank.processes:
                yield from self._process_moves(world, number, rank, process)

    def _leader_moves(self, world: World) -> Iterator[Move]:
        if any(len(rank.plans) >= self.scenario.lag for rank in world.ranks[1:]):
            return
        replica = self.replicas[world.ranks[0].replica]
        for plan in self.rules.outcomes(replica, world.facts, len(world.ranks)):
            yield Urgency.MUST, f"leader plans {plan}", self._issue(world, plan)
        if world.ops_sent < self.scenario.ops and replica.free and replica.slot.gate() is not None:
            plan = ("admit", world.ops_sent)
            yield Urgency.MAY, f"leader plans {plan}", self._issue(world._replace(ops_sent=world.ops_sent + 1), plan)
        if world.commands_sent < len(self.scenario.script):
            plan = self.scenario.plan(world.commands_sent)
            next_world = world._replace(commands_sent=world.commands_sent + 1)
            yield Urgency.MAY, f"leader plans {plan}", self._issue(next_world, plan)

    def _issue(self, world: World, plan: Plan) -> World:
        ranks = tuple(rank._replace(plans=(*rank.plans, plan)) for rank in world.ranks[1:])
        return self._deliver(world._replace(ranks=(world.ranks[0], *ranks)), 0, plan)

    def _deliver(self, world: World, number: int, plan: Plan) -> World:
        """One rank applies a plan; its driver does what comes out."""
        rank = world.ranks[number]
        before = self.replicas[rank.replica]
        step = self.replicas.apply(rank.replica, plan)
        after = self.replicas[step.after]
        self._check_end_of_attached(before.slot, after.slot, plan)
        rank = rank._replace(replica=step.after)
        facts: list[Fact] = []
        if plan[0] == "admit":
            rank = self._start_job(rank, number, plan[1], after, facts)
        for instruction in step.instructions:
            match instruction:
                case Spawn(epoch):
                    promise(rank.process(epoch) is None, "an epoch number was used again")
                    late_io = after.slot.find(epoch).late_io
                    rank = rank._replace(processes=(*rank.processes, Process(epoch, late_io, Life.STARTING)))
                case Stop(epoch):
                    process = rank.process(epoch)
                    if process and process.life is Life.OPEN:
                        rank = rank.put(process._replace(life=Life.LEAVING))
                case Kill(epoch):
                    process = rank.process(epoch)
                    if process and process.life is not Life.LINGERING:
                        rank = rank.put(process._replace(life=Life.DYING))
                case Answer(command_id, Verdict.OK):
                    self._check_ok(world.put(number, rank), number, command_id, before, after)
        return self._tell(world.put(number, rank), *facts)

    def _start_job(self, rank: Rank, number: int, op: int, replica: Replica, facts: list[Fact]) -> Rank:
        epoch, page = replica.ops[op]
        process = rank.process(epoch)
        if process is None or process.life is Life.LINGERING:
            facts.append(("closed", op, number))  # died here, the leader does not know yet: nothing will touch it
            return rank
        promise(process.life in (Life.OPEN, Life.HUNG), f"operation sent to a process that is {process.life}")
        return rank.put(process._replace(jobs=(*process.jobs, (op, page))))

    def _process_moves(self, world: World, number: int, rank: Rank, process: Process) -> Iterator[Move]:
        epoch, life, name = process.epoch, process.life, f"rank {number} process {process.epoch}"

        def becomes(life: Life, *kinds: str, world: World = world) -> World:
            changed = world.put(number, rank.put(process._replace(life=life)))
            return self._tell(changed, *((kind, epoch, number) for kind in kinds))

        match life:
            case Life.STARTING:
                yield Urgency.MUST, f"{name} opens", becomes(Life.OPEN, "opened")
            case Life.OPEN:
                for job in process.jobs:
                    rest = process._replace(jobs=tuple(other for other in process.jobs if other is not job))
                    closed = self._tell(world.put(number, rank.put(rest)), ("closed", job[0], number))
                    yield Urgency.MUST, f"{name} closes {job[0]}", closed
            case Life.LEAVING | Life.DYING:
                yield Urgency.MUST, f"{name} ends", self._end(world, number, process)
            case Life.STUCK:
                yield Urgency.SOME_DAY, f"{name} ends at last", self._end(world, number, process)
            case Life.LINGERING:
                quiet = self._tell(world.put(number, rank.without(epoch)), ("quiet", epoch, number))
                yield Urgency.SOME_DAY, f"{name} is quiet", quiet
        if not world.faults_left:
            return
        fault = world._replace(faults_left=world.faults_left - 1)
        match life:
            case Life.STARTING:
                yield Urgency.MAY, f"{name} fails to open", self._end(fault, number, process, "open_failed")
                yield Urgency.MAY, f"{name} hangs opening", becomes(Life.HUNG, world=fault)
            case Life.OPEN:
                yield Urgency.MAY, f"{name} dies", self._end(fault, number, process, "lost")
                yield Urgency.MAY, f"{name} hangs", becomes(Life.HUNG, "lost", world=fault)
            case Life.LEAVING:
                yield Urgency.MAY, f"{name} hangs leaving", becomes(Life.HUNG, world=fault)
            case Life.DYING:
                yield Urgency.MAY, f"{name} cannot be killed", becomes(Life.STUCK, "reap_timeout", world=fault)

    def _end(self, world: World, number: int, process: Process, *kinds: str) -> World:
        """The pidfd fired.  What the hardware of a `late_io` backend still writes does not end with that."""
        rank = world.ranks[number]
        if process.late_io and process.jobs:
            rank, kinds = rank.put(process._replace(life=Life.LINGERING)), (*kinds, "reaped")
        else:
            rank, kinds = rank.without(process.epoch), (*kinds, "reaped", "quiet")
        return self._tell(world.put(number, rank), *((kind, process.epoch, number) for kind in kinds))

    def _tell(self, world: World, *facts: Fact) -> World:
        """Report to the leader, who drops what it can no longer use; so equal worlds also look equal."""
        replica = self.replicas[world.ranks[0].replica]
        slot = replica.slot
        alive = {a.epoch for a in slot.places()} | slot.quarantined.keys()

        def useful(fact: Fact) -> bool:
            kind, number, _ = fact
            if kind == "closed":
                return number in replica.ops
            return slot.expects(LEADS_TO[kind], number) if kind in LEADS_TO else number in alive

        return world._replace(facts=frozenset(fact for fact in (*world.facts, *facts) if useful(fact)))

    # ---- what must hold

    def _check_end_of_attached(self, before: StorageSlot, after: StorageSlot, plan: Plan) -> None:
        epoch = before.gate()
        if epoch is not None and after.gate() != epoch:
            allowed = plan[0] in ("detach", "commit") or plan == ("lost", epoch)
            promise(allowed, f"ATTACHED ended by {plan}")  # so a switch that fails leaves the old one attached

    def _check_ok(self, world: World, number: int, command_id: str, before: Replica, after: Replica) -> None:
        if "detach" in command_id:
            promise(not after.slot.places(), f"{command_id!r} said ok, but something is attached")
            for rank in world.ranks if number == 0 else (world.ranks[number],):
                promise(not rank.processes, f"{command_id!r} said ok, but a storage process lives")
            return
        epoch = after.slot.last_epoch
        promise(after.slot.gate() == epoch, f"{command_id!r} said ok, but it is not attached")
        if number == 0:
            # The votes, as they stood when the leader planned the commit.
            for other in range(len(world.ranks)):
                promise(
                    ("opened", epoch, other) in world.facts, f"{command_id!r} said ok, but rank {other} is not open"
                )

    def check(self, world: World) -> None:
        """Promises in every world; those about a replica alone were checked when it came up."""
        leader = world.ranks[0].replica
        for rank in world.ranks:
            self._check_rank(rank)
            number = rank.replica
            for plan in rank.plans:
                number = self.replicas.apply(number, plan).after
            promise(number == leader, "replicas differ after the same plans")

    def _check_rank(self, rank: Rank) -> None:
        replica = self.replicas[rank.replica]
        slot = replica.slot
        for process in rank.processes:
            attachment = slot.find(process.epoch)
            held = process.epoch in slot.quarantined
            promise(attachment or held, "a storage process was forgotten")
            killed = process.life in (Life.DYING, Life.STUCK)
            failed = attachment is not None and attachment.state is State.FAILED
            promise(not killed or failed or held, "killed, yet not FAILED")
            promise(not failed or killed or process.life is Life.LINGERING, "FAILED, yet never killed")
            for op, page in process.jobs:
                promise(page not in replica.free, "a free page may still be written")
                mine = replica.ops.get(op) == (process.epoch, page) or page in replica.quarantine.get(process.epoch, ())
                promise(mine, "a page of a new operation may still be written by an old one")

    def check_calm(self, world: World) -> None:
        """Nothing is left that must happen."""
        for rank in world.ranks:
            replica = self.replicas[rank.replica]
            if replica.waits_patiently():
                continue
            places = [(a is replica.slot.current, a.state) for a in replica.slot.places()]
            promise(not rank.plans and places in ([], [(True, State.ATTACHED)]), f"came to rest in {replica.slot!r}")
            promise(len(replica.answers) == world.commands_sent, "a command was never answered")

    def check_end(self, world: World) -> None:
        """Nothing at all is left to happen."""
        for rank in world.ranks:
            replica = self.replicas[rank.replica]
            if replica.waits_patiently():
                continue
            promise(len(replica.free) == self.scenario.pages, "pages leaked at rest")
            promise({p.epoch for p in rank.processes} == {a.epoch for a in replica.slot.places()}, "processes leaked")

    # ---- the walk

    def start(self) -> World:
        """Nothing has happened yet."""
        return World((Rank(self.replicas.first),) * self.scenario.ranks, frozenset(), 0, 0, self.scenario.faults)

    def run(self) -> None:
        """Visit every world; raise BrokenPromise with the moves that led there."""
        first = self.start()
        numbers: dict[World, int] = {first: 0}
        came_from: list[tuple[int, str]] = [(0, "start")]
        followers: dict[int, list[int]] = {}
        stack = [first]
        while stack:
            world = stack.pop()
            here = numbers[world]
            label, followers[here], urgencies = "the end", [], set()
            try:
                for urgency, label, after in self.moves(world):
                    urgencies.add(urgency)
                    number = numbers.setdefault(after, len(came_from))
                    if number == len(came_from):
                        came_from.append((here, label))
                        self.check(after)
                        stack.append(after)
                    followers[here].append(number)
                if Urgency.MUST not in urgencies:
                    self.check_calm(world)
                if not urgencies:
                    self.check_end(world)
                    face = self.replicas[world.ranks[0].replica].slot.face()
                    self.rest[face] = self.rest.get(face, 0) + 1
            except (BrokenPromise, IntegrityError) as error:
                raise BrokenPromise(f"{error}\nafter:{_path(came_from, here)}\n  {label}") from error
        self.worlds = len(numbers)
        promise(_has_no_cycle(followers), "a run may go round for ever")


def _path(came_from: list[tuple[int, str]], number: int) -> str:
    labels = []
    while number:
        number, label = came_from[number]
        labels.append(label)
    return "".join(f"\n  {label}" for label in reversed(labels))


def _has_no_cycle(followers: dict[int, list[int]]) -> bool:
    arriving = [0] * len(followers)
    for targets in followers.values():
        for target in targets:
            arriving[target] += 1
    ready, passed = [0], 0
    while ready:
        passed += 1
        for target in followers[ready.pop()]:
            arriving[target] -= 1
            if not arriving[target]:
                ready.append(target)
    return passed == len(followers)


def explore(scenario: Scenario, rules: Rules | None = None) -> Explorer:
    explorer = Explorer(scenario, rules)
    explorer.run()
    return explorer
