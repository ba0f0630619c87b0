"""What `tiered` and `mirror` have in common: several stores that look like one.

A page is there if any store inside has it.  Reads go from the first store to the last, page by page: what one lacks, or
has not whole, is asked of the next, and a copy that is damaged is set aside where a whole one was found.  So a page is
judged here as it is stored, before anything is made of it; `checked.py` judges it again, with the encryption key, and
hashes no byte twice.  Writes and deletions go to all; whether enough of them did it, the two kinds decide.

Threads: as any backend, and one helper (`composite_helper.py`), which copies pages to stores that lack them and opens
stores that did not open.  A deletion makes every copy that waits void, or it would bring back what was deleted.

Capacity, order of eviction and age are the business of each store inside.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import INSIDE, LEVELS, SharedCounters
from sglang_hicache.storage.backend import Capabilities, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.composite_helper import Helper, StoredPage
from sglang_hicache.storage.composite_member import Member
from sglang_hicache.storage.composite_reading import Reading
from sglang_hicache.storage.composite_settings import CompositeSettings
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageName

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Makes the store at a place anew, not open.
Remake = Callable[[int], StorageBackend]

#: A look-up asks every store so often at most.  Stores that lack every other page are a sign of too little room, and
#: a request waits for a look-up for some 50 ms only.
_LOOKUP_ROUNDS = 3

#: What is shown of every store, of all that may fall.
_SHOWN_LEVELS = ("max_bytes", "used_bytes", "used_pages")


class Composite(StorageBackend):
    """Several stores, in order."""

    def __init__(
        self,
        settings: CompositeSettings,
        inside: Sequence[StorageBackend],
        remake: Remake | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._word = settings.word()
        self._counters = SharedCounters()
        self._members = [
            Member(index, settings, backend, self._counters, clock) for index, backend in enumerate(inside)
        ]
        self._remake = remake
        self._helper = Helper(f"{self._word} helper")
        #: Goes up with every deletion: a copy that was taken before it is void.
        self._deletions = 0
        #: "" until there are new weights.
        self._namespace = ""
        late_io = any(member.capabilities.late_io for member in self._members)
        durable = self._is_durable([member.capabilities.durable for member in self._members])
        self.capabilities = Capabilities(late_io=late_io, durable=durable)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._members}>"

    @abstractmethod
    def _is_durable(self, durable: list[bool]) -> bool:
        """Does what counts as written outlive the process?"""

    @abstractmethod
    def _is_enough(self, did: list[bool]) -> bool:
        """Is a call a success that these stores did, and those did not?"""

    def _main(self) -> Member:
        """The store whose size is shown as that of the whole."""
        return next((member for member in self._members if member.is_well()), self._members[0])

    def _blamed(self, errors: Sequence[StorageError | None]) -> StorageError:
        """The error of a call that too few did."""
        return next(error for error in errors if error is not None)

    def _copies(self) -> bool:
        """Are pages copied to stores that lack them?"""
        return True

    def open_blocking(self) -> None:
        errors = [member.open_blocking() for member in self._members]
        if not self._is_enough([error is None for error in errors]):
            raise self._blamed(errors)
        for error in errors:
            if error is not None:
                _logger.warning("opened without %s", error)

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        asked = self._asked()
        found, errors = 0, dict[Member, StorageError]()
        #: Stores that have said that the next page is not there.
        lacking: set[Member] = set()
        for member in asked * _LOOKUP_ROUNDS:
            if member in lacking or member in errors or found == len(names):
                continue
            count = member.exists_blocking(names[found:])
            if isinstance(count, StorageError):
                errors[member] = count
                continue
            found += count
            lacking = {member} if count else lacking | {member}
        if len(errors) == len(asked):
            raise next(iter(errors.values()), self._nobody())
        return found

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        deletions = self._deletions
        reading = Reading(pages)
        asked = self._asked()
        if not asked:
            return [self._nobody()]
        reading.read_blocking(asked)
        for index, page in enumerate(pages):
            giver, damaged = reading.giver(index), reading.damaged(index)
            if giver is None or (giver is asked[0] and not damaged):
                continue  # nothing to heal with (of damage the caller hears, and sets it aside), or nothing to heal
            for member in damaged:
                # A whole copy goes out: nobody behind us will ever hear of this one.
                self._counters.add("healed_pages")
                member.set_aside_blocking(page.name)
            nearer = [member for member in reading.lacking(index) if member.index < giver.index]
            if damaged or nearer:
                self._offer_copy(page, [*damaged, *nearer], deletions)
        return reading.outcomes()

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        asked = self._asked()
        answers = [
            self._alone(member, partial(Member.write_blocking, pages=pages))
            if member in asked
            else [member.rest_error()]
            for member in self._members
        ]
        outcomes: list[PageOutcome] = []
        for index in range(len(pages)):
            # A list ends with the page that failed: it speaks for all behind it.
            of_page = [answer[min(index, len(answer) - 1)] for answer in answers]
            errors = [outcome if isinstance(outcome, StorageError) else None for outcome in of_page]
            if not self._is_enough([error is None for error in errors]):
                return [*outcomes, self._blamed(errors)]
            # Once there, it may be there damaged; who knows that deletes it everywhere when it hears of it.
            was_there = PageResult.PRESENT in of_page
            outcomes.append(PageResult.PRESENT if was_there else PageResult.WRITTEN)
        return outcomes

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        """Of several names, at least so many: stores say how many they had, and not which."""
        self._deletions += 1
        asked = self._asked()
        counts = [self._alone(member, partial(Member.delete_blocking, names=names)) for member in asked]
        for count in counts:
            if isinstance(count, StorageError):
                raise count  # it would be found again, and a write would leave it as it is
        if not asked:
            raise self._nobody()
        return max(counts)

    def set_aside_blocking(self, name: PageName) -> bool:
        """In all stores: had one of them a whole page, the caller would have got that."""
        answers = [member.set_aside_blocking(name) for member in self._asked()]
        if True not in answers:
            for answer in answers:
                if isinstance(answer, StorageError):
                    raise answer
        return True in answers

    def clear_blocking(self, namespace: str) -> int:
        """Of every store, or it has failed: an operator who clears wants nothing left.  How many there were: at least
        as many as in the store that had most."""
        self._deletions += 1
        counts = [self._alone(member, partial(Member.clear_blocking, namespace=namespace)) for member in self._members]
        errors = [count for count in counts if isinstance(count, StorageError)]
        if errors:
            raise StorageError(f"not cleared everywhere: {errors[0]}", errors[0].reason, errors[0].code)
        return max(count for count in counts if not isinstance(count, StorageError))

    def touch_blocking(self, names: Sequence[PageName]) -> None:
        asked = self._asked()
        errors = [member.touch_blocking(names) for member in asked]
        if asked and None not in errors:
            raise self._blamed(errors)

    def use_namespace(self, namespace: str) -> None:
        self._namespace = namespace
        for member in self._members:
            member.use_namespace(namespace)

    def info(self) -> dict[str, str]:
        """Of each store its backend, whether it opened, and what it says of itself.  Asked when all were opened, and
        shown for as long as they are attached: how they are later, `stats` says."""
        found: dict[str, str] = {}
        for member in self._members:
            state = "opened" if member.is_well() else str(member.rest_error())
            found[self._prefix(member)] = f"{member.kind}: {state}"
            found |= {f"{self._prefix(member)}_{name}": value for name, value in member.info().items()}
        return found

    def stats(self) -> dict[str, int]:
        """Sizes are those of the main store, and `tier1_...` of each; what stores count is summed.  Of stores within
        a store inside only the sums are there: the list must not grow without end."""
        found = Counter(self._counters.snapshot())
        main = self._main()
        for member in self._members:
            prefix, tally, away = self._prefix(member), member.tally.snapshot(), int(not member.is_well())
            found["away_stores"] += away
            found[f"{prefix}_away"] = away
            found.update({f"{prefix}_{name}": number for name, number in tally.items()})
            for name, number in member.stats().items():
                if INSIDE.match(name):
                    continue
                if name not in LEVELS or name == "away_stores":
                    found[name] += number
                    continue
                if name in _SHOWN_LEVELS:
                    found[f"{prefix}_{name}"] = number
                if member is main:
                    found[name] = number
        return dict(found)

    def close_blocking(self) -> None:
        self._helper.close_blocking()
        with ExitStack() as stack:
            for member in self._members:
                stack.callback(member.close_blocking)

    def _prefix(self, member: Member) -> str:
        return f"{self._word}{member.index + 1}"

    def _asked(self) -> list[Member]:
        """The stores that calls go to now, in order.  One that did not open is tried again, behind our back."""
        for member in self._members:
            if self._remake is not None and member.claim_opening():
                make = partial(self._remake, member.index)
                self._helper.offer(0, partial(member.reopen_blocking, make, lambda: self._namespace))
        return [member for member in self._members if member.is_asked()]

    def _nobody(self) -> StorageError:
        """The error of a call that had nobody to go to."""
        return self._blamed([member.rest_error() for member in self._members])

    def _alone(self, member: Member, call: Callable[[Member], _T]) -> _T:
        """A call that changes a store, while nobody else changes it."""
        with member.writing:
            return call(member)

    def _offer_copy(self, page: IncomingPage, lacking: list[Member], deletions: int) -> None:
        """Have a page that was read put where it is missing."""
        if not self._copies():
            return
        if not self._helper.has_room(page.size_bytes):
            self._counters.add("dropped_copies")
            return
        stored = StoredPage(page)
        if not self._helper.offer(stored.size_bytes, partial(self._copy, stored, lacking, deletions)):
            self._counters.add("dropped_copies")

    def _copy(self, page: StoredPage, lacking: list[Member], deletions: int) -> None:
        """Helper thread."""
        for member in lacking:
            with member.writing:
                # Seen with the lock in hand: whoever deletes counts first and then waits for the lock.
                if deletions != self._deletions:
                    return
                if not member.is_asked():
                    continue
                outcome = member.write_blocking([page])[0]
            self._counters.add("copied_pages", outcome is PageResult.WRITTEN)
