"""A drill as it is written down: the tables of a scenario file as strict records, and their words for people.

`scenario_file.py` reads them, `docs/drills.md` explains every key.  Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from sglang_hicache.storage.faulty_settings import Fault, FaultCall, Faults
from sglang_hicache.wire import Mode

_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Amount = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,40}$")]

#: The storage process of a rank, for a `kill`; every other name is one of `[programs]`.
STORAGE = "storage"


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table of a scenario."""


class ServerTable(_Record, kw_only=True):
    """`[server]`: the server that the drill starts, unless it is told to use another one."""

    #: Tensor-parallel ranks.
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    #: Flags on top of those that every drill has; "{folder}" is the drill's own folder.
    flags: list[str] = []
    #: Flags that change what is computed (`--model-path` ...): drills with other ones do not share a reference.
    model_flags: list[str] = []
    #: Store that is attached before the load begins; of a server that is not the drill's own: the one that is attached.
    store: str = ""
    #: How long a request waits for its prefix; see `docs/extra-config.md`.
    prefetch_policy: str = "wait_complete"


class StoreTable(_Record, kw_only=True):
    """`[stores.NAME]`: a store that steps attach, break and mend."""

    #: Name of the backend.
    backend: str
    #: Its extra config, with the keys that every backend has; a `file_storage_path` is added where none is given.
    extra_config: dict[str, Any] = {}
    #: Attached inside the saboteur, so that steps can inject faults.
    sabotaged: bool = False
    #: Stores that fault tolerance may fall back to, in this order.
    standby: list[str] = []
    #: Wrong on purpose, and so not checked.
    broken: bool = False


class ProgramTable(_Record, kw_only=True):
    """`[programs.NAME]`: something that the drill starts before the server, such as a store's own server."""

    #: Program and arguments; "{port}" is a port that is free, "{folder}" the drill's own folder.
    command: Annotated[list[str], msgspec.Meta(min_length=1)]


class NeedsTable(_Record, kw_only=True):
    """`[needs]`: without these the drill is skipped."""

    #: Programs on the PATH, or beside the interpreter.
    programs: list[str] = []
    #: Backends that this server has.
    backends: list[str] = []


class LoadTable(_Record, kw_only=True):
    """`[load]`: conversations that share their beginnings, asked again and again until the timeline is over."""

    #: Conversations at the same time.
    streams: _Count = 4
    #: Different conversations; the streams take one after the other and begin again after the last.
    conversations: _Count = 12
    #: Questions of each; every one has all questions and answers before it as its beginning.
    turns: _Count = 2
    #: Different beginnings, shared by the conversations in turn.
    prefixes: _Count = 2
    #: Tokens of each such beginning.
    shared_tokens: _Amount = 64
    #: Tokens that each question adds.
    unique_tokens: _Count = 64
    #: Tokens of each answer.
    output_tokens: _Count = 4
    #: Other tokens for another number.
    seed: _Amount = 1
    #: Seconds that a stream waits between an answer and its next question.
    pause_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.05

    def prompt_tokens(self) -> int:
        """Of the longest prompt."""
        return self.shared_tokens + self.turns * self.unique_tokens + (self.turns - 1) * self.output_tokens


class StatusTable(_Record, kw_only=True):
    """What every rank must say of itself; of the breaker, rank 0."""

    #: detached, attaching, attached, draining, detaching, failed.
    state: str | None = None
    #: Name of the store that is attached, as the scenario calls it; "" for none.
    store: str | None = None
    #: closed, open, half_open, off.
    breaker: str | None = None
    #: "primary", "standby 1" ...
    serving: str | None = None
    #: Part of what `last_error` says.
    last_error: str | None = None
    #: At least so many operations on their way.
    in_flight: _Amount | None = None


class Condition(_Record, kw_only=True):
    """Something to wait for.  All that is given must hold; what is counted is counted since the step before ended."""

    #: Seconds since the load began.
    at_s: _Seconds | None = None
    #: Seconds since the step before.
    seconds: _Seconds | None = None
    #: Answers.
    requests: _Count | None = None
    #: Prompt tokens that came from storage.
    storage_tokens: _Count | None = None
    #: What the status says.
    status: StatusTable | None = None


class _Step(_Record, tag_field="do", kw_only=True):
    """`[[timeline]]`: one thing that happens."""

    #: For the report; "": what is done.
    name: str = ""
    #: Wait for this first.
    after: Condition = Condition()


class FaultStep(_Step, tag="fault", kw_only=True):
    """From now on these faults and no others, in every process of the store."""

    #: Which store.
    store: str
    #: Call to what goes wrong in it; see `docs/drills.md`.
    faults: dict[FaultCall, Fault]

    def __post_init__(self) -> None:
        Faults(faults=self.faults)


class HealStep(_Step, tag="heal", kw_only=True):
    """No faults any more; calls that hang come back."""

    #: Which store.
    store: str


class _Command(_Step, kw_only=True):
    """Something that the server is asked to do."""

    #: idle, drain or force; null: what the server does by itself.
    mode: Mode | None = None
    #: Deadline that the server is given; null: the server's own.
    timeout_s: _Seconds | None = None
    #: done or refused.
    expect: Literal["done", "refused"] = "done"
    #: The answer must hold this text.
    says: str = ""
    #: The answer must come within these seconds.
    within_s: _Seconds | None = None


class AttachStep(_Command, tag="attach", kw_only=True):
    """Attach a store."""

    #: Which one.
    store: str


class SwitchStep(_Command, tag="switch", kw_only=True):
    """Put a store in the place of the one that is attached."""

    #: Which one.
    store: str


class DetachStep(_Command, tag="detach", kw_only=True):
    """Detach what is attached."""


class DryRunStep(_Step, tag="dry-run", kw_only=True):
    """Try a store out on every rank and attach nothing."""

    #: Which one.
    store: str
    #: done: usable on every rank; refused: not.
    expect: Literal["done", "refused"] = "done"
    #: Code that a rank must give, e.g. "no_space".
    code: str = ""
    #: The report must come within these seconds.
    within_s: _Seconds | None = None


class FlushStep(_Step, tag="flush", kw_only=True):
    """Empty device and host.  The load stops for that long, and until all is written."""


class KillStep(_Step, tag="kill", kw_only=True):
    """kill -9."""

    #: "storage" for the storage process of a rank, or a name from `[programs]`.
    what: str = STORAGE
    #: Whose storage process.
    rank: _Amount = 0


class StartStep(_Step, tag="start", kw_only=True):
    """Start a program again that was killed."""

    #: Name from `[programs]`.
    program: str


class RestartStep(_Step, tag="restart", kw_only=True):
    """Stop the drill's own server and start it again, with the same flags.  The load stops for that long."""

    #: TERM lets it end in order, KILL does not.
    signal: Literal["TERM", "KILL"] = "TERM"


class WaitStep(_Step, tag="wait", kw_only=True):
    """An assertion: this will hold in time."""

    #: What.
    until: Condition
    #: In how many seconds.
    within_s: _Seconds = 60.0


Step = (
    FaultStep | HealStep | AttachStep | SwitchStep | DetachStep | DryRunStep | FlushStep | KillStep | StartStep
    | RestartStep | WaitStep
)  # fmt: skip


class ExpectTable(_Record, kw_only=True):
    """`[expect]`: assertions about the drill as a whole.  null: not asserted."""

    #: At most so many requests may fail.
    failed_requests: _Amount = 0
    #: Every answer is that of the reference run, token by token.
    text_equal: bool = True
    #: All ranks are in the same state and epoch whenever they are looked at.
    ranks_agree: bool = True
    #: At the end no page, operation or storage process is left over.
    no_leak: bool = True
    #: At most so many tokens may be computed that the server had computed before.
    reprefilled_tokens: _Amount | None = None
    #: At least so many prompt tokens come from storage.
    storage_tokens: _Amount | None = None
    #: 99 of 100 first tokens come within these seconds.
    ttft_p99_s: _Seconds | None = None
    #: States of the breaker that are seen, in this order.
    breaker: list[str] = []
    #: At most so many times may the breaker open.
    trips: _Amount | None = None
    #: Name of the store that is attached when the timeline is over; "" for none.
    store: str | None = None


class Scenario(_Record, kw_only=True):
    """A whole file."""

    #: What the report and the command line call it.
    name: _Name
    #: What it shows, in a sentence or two.
    about: str
    needs: NeedsTable = NeedsTable()
    server: ServerTable = ServerTable()
    stores: dict[_Name, StoreTable] = {}
    programs: dict[_Name, ProgramTable] = {}
    load: LoadTable = LoadTable()
    timeline: Annotated[list[Step], msgspec.Meta(min_length=1)]
    expect: ExpectTable = ExpectTable()


def tag(step: Step) -> str:
    """What the step does, in the word of the file."""
    return str(step.__struct_config__.tag)


def title(step: Step) -> str:
    """What the report calls the step."""
    if step.name:
        return step.name
    match step:
        case FaultStep():
            what = ", ".join(f"{call} {fault.kind}" for call, fault in step.faults.items())
            return f"fault in {step.store}: {what}"
        case HealStep() | AttachStep() | SwitchStep() | DryRunStep():
            return f"{tag(step)} {step.store}"
        case KillStep():
            return f"kill {step.what}" + (f" of rank {step.rank}" if step.what == STORAGE else "")
        case StartStep():
            return f"start {step.program}"
        case WaitStep():
            return f"wait until {words(step.until)}"
        case DetachStep():
            return "detach" + (f" ({step.mode})" if step.mode else "")
        case _:
            return tag(step)


def words(condition: Condition) -> str:
    """A condition for people."""
    amounts = (
        (condition.at_s, "s since the load began"),
        (condition.seconds, "s have passed"),
        (condition.requests, "answers"),
        (condition.storage_tokens, "tokens from storage"),
    )
    parts = [f"{amount:g} {what}" for amount, what in amounts if amount is not None]
    status = {} if condition.status is None else msgspec.structs.asdict(condition.status)
    return ", ".join(parts + [f"{name} is {value or 'none'}" for name, value in status.items() if value is not None])
