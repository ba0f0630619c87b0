"""One read over several stores: which pages came from where, which are missing where, and which are damaged.

Made for one call and thrown away.  Every page is asked of one store after the other until one gives it whole; a store
is asked for many pages in one call, and for no page twice.  Used by the prefetch lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageOutcome, PageResult
from sglang_hicache.storage.composite_member import Member
from sglang_hicache.storage.page_format import IncomingPage, Verdict


@dataclass(slots=True)
class _Page:
    """What is known of one page so far."""

    giver: Member | None = None
    #: Stores that have answered for it, and what they said.
    lacking: tuple[Member, ...] = ()
    #: Stores whose call ended at an earlier page that they lack.  They may have this one, and are asked if need be.
    stopped: tuple[Member, ...] = ()
    damaged: tuple[Member, ...] = ()
    failed: tuple[Member, ...] = ()
    #: What the first of the last ones said.
    error: StorageError | None = None
    #: How the damaged page stands in the answer.
    damage: PageResult = PageResult.WRONG_SIZE

    def answered(self) -> tuple[Member, ...]:
        """Everybody who did not give it."""
        return self.lacking + self.damaged + self.failed


class Reading:
    """The pages of one call."""

    def __init__(self, pages: Sequence[IncomingPage]) -> None:
        self._pages = pages
        self._found = [_Page() for _ in pages]

    def read_blocking(self, members: Sequence[Member]) -> None:
        """Ask until every page is there, up to the first that no store has."""
        position = 0
        while position < len(self._pages):
            page = self._found[position]
            if page.giver is None:
                answered = page.answered()
                member = next((member for member in members if member not in answered), None)
                if member is not None:
                    self._ask(member, position)
                    continue
                if not page.damaged or page.error is not None:
                    return  # behind a gap nobody uses a page
            # Behind a damaged one it goes on: the caller then removes all of this batch at once.
            position += 1

    def giver(self, index: int) -> Member | None:
        """Who gave this page whole."""
        return self._found[index].giver

    def lacking(self, index: int) -> tuple[Member, ...]:
        """Stores that do not have it: they said so, or lack a page before it, which says as much of most stores."""
        found = self._found[index]
        others = (found.giver, *found.damaged, *found.failed)
        return tuple(member for member in dict.fromkeys(found.lacking + found.stopped) if member not in others)

    def damaged(self, index: int) -> tuple[Member, ...]:
        """Stores that have it, and not whole."""
        return self._found[index].damaged

    def outcomes(self) -> list[PageOutcome]:
        """What the caller is told, up to the first page that it does not get."""
        outcomes: list[PageOutcome] = []
        for page, found in zip(self._pages, self._found, strict=True):
            if found.giver is not None:
                outcomes.append(PageResult.HIT)
            elif found.error is not None:
                # Perhaps the next try gets it; "damaged" would be the end of it, "missing" would be a guess.
                return [*outcomes, found.error]
            elif found.damaged:
                # As it came, for the caller to judge and count.
                page.restart()
                outcomes.append(found.damage)
            else:
                return [*outcomes, PageResult.MISS]
        return outcomes

    def _ask(self, member: Member, position: int) -> None:
        """One call: everything from here on that is still missing and that this store has not answered for."""
        wanted = [
            index
            for index in range(position, len(self._pages))
            if self._found[index].giver is None and member not in self._found[index].answered()
        ]
        for index in wanted:
            # Also those that nobody has answered for: a store may have read and hashed what lies behind its gap.
            self._pages[index].restart()
        outcomes = member.read_blocking([self._pages[index] for index in wanted])
        given = sum([self._note(member, index, outcome) for index, outcome in zip(wanted, outcomes)])
        member.tally.add("read_pages", given)
        if outcomes[-1] is PageResult.MISS:
            for index in wanted[len(outcomes) :]:
                self._found[index].stopped += (member,)

    def _note(self, member: Member, index: int, outcome: PageOutcome) -> bool:
        """What a store said of a page; True: it gave it."""
        found = self._found[index]
        if outcome is PageResult.HIT and self._pages[index].judge_stored() is Verdict.GOOD:
            found.giver = member
            return True
        if isinstance(outcome, StorageError):
            found.error = found.error or outcome
            found.failed += (member,)
        elif outcome is PageResult.MISS:
            found.lacking += (member,)
        else:
            found.damage = outcome
            found.damaged += (member,)
            member.tally.add("damaged_pages")
        return False
