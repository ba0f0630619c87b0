"""Any faults in any store inside, in any order: compared with what an honest dictionary would know.

What must hold whatever happens: a page that is read is the page that was written, and nothing but a `StorageError`
comes out.  What must hold when the faults are over: a page that counted as written is there, even when the first store
forgets all it has, if that is what was promised; and nothing comes back that was cleared.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hicache.errors import StorageError
from tests.storage import pages
from tests.storage.composite_world import Composite

_PAGES = 6
#: Trouble of a store that keeps what it says it has.
_HONEST = [
    *((call, kind) for call in ("read", "write") for kind in ("error", "none", "wrong_type", "short_list", "twice")),
    *(("exists", kind) for kind in ("error", "none", "wrong_type", "stale", "disappear", "twice")),
    *((call, "error") for call in ("touch", "delete", "set_aside", "clear")),
    *((call, kind) for call in ("delete", "clear") for kind in ("none", "wrong_type", "twice")),
    ("write", "no_space"),
    # What costs a store a page, and not only an answer, comes more often.
    *[("write", "error"), ("read", "error"), ("exists", "error")] * 4,
]
#: A store that loses or changes what it has.
_LIES = [(call, kind) for call in ("read", "write") for kind in ("flip", "short", "disappear", "duplicate")]

_chain = st.tuples(st.just(1), st.integers(1, _PAGES)) | st.tuples(st.integers(1, _PAGES), st.just(1))
_step = st.one_of(
    st.tuples(st.sampled_from(["write", "read", "look up"]), _chain),
    st.tuples(st.just("write"), _chain),
    st.tuples(st.sampled_from(["touch", "delete"]), st.integers(1, _PAGES)),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0, 100.0])),
    st.tuples(st.just("well"), st.integers(0, 1)),
    st.tuples(st.just("sick"), st.tuples(st.integers(0, 1), st.sampled_from(_HONEST), st.integers(0, 2))),
    st.tuples(st.just("lie"), st.tuples(st.sampled_from(_LIES), st.integers(0, 2))),
)


class _Model:
    """A composite of two stores, of which the first may lie, and what it owes."""

    def __init__(self, name: str, **config: Any) -> None:
        self.composite = Composite(name, **config)
        self.composite.backend.open_blocking()
        #: Pages that counted as written and were not deleted since.
        self.owed: set[int] = set()
        #: Pages that nobody has deleted for sure.
        self.possible: set[int] = set()
        self.lies = False

    def do(self, step: tuple[str, Any]) -> None:
        composite, (action, what) = self.composite, step
        with suppress(StorageError):
            match action:
                case "write":
                    self._write(*what)
                case "read":
                    composite.read(what[1], what[0])
                case "look up":
                    composite.store.lookup_blocking(pages.keys(what[1], what[0]))
                case "touch":
                    composite.store.touch_blocking([pages.key(what)])
                case "delete":
                    self.owed.discard(what)
                    composite.backend.delete_blocking([pages.layout().name(pages.key(what))])
                case "clear":
                    self.owed.clear()
                    composite.store.clear_blocking()
                    self.possible.clear()
                case "wait":
                    composite.clock.now_s += what
                case "well":
                    composite.sabotage(what)
                case "sick":
                    number, (call, kind), first = what
                    composite.sabotage(number, call, kind=kind, first=first)
                case "lie":
                    (call, kind), first = what
                    self.lies = True
                    composite.sabotage(0, call, kind=kind, first=first)

    def _write(self, first: int, count: int) -> None:
        self.possible |= set(range(first, first + count))
        # What is known to be unreadable is deleted and written anew; where that stops nothing is owed any more.
        before, self.owed = self.owed, self.owed - set(range(first, first + count))
        written = self.composite.write(count, first).pages
        self.owed |= set(range(first, first + written)) | (before - set(range(first, first + count)))

    def end(self, is_first_lost: bool) -> set[int]:
        """The faults are over: what is there."""
        for number in range(2):
            self.composite.sabotage(number)
        self.composite.clock.now_s += 1000
        self.composite.idle()
        if is_first_lost:
            self.composite.drop(0, *range(1, _PAGES + 1))
        found = {page for page in range(1, _PAGES + 1) if self.composite.read(1, page).pages}
        assert found <= self.possible, "pages came back that were cleared"
        return found


def _check(model: _Model, steps: list[tuple[str, Any]], is_first_lost: bool) -> None:
    """`is_first_lost`: the first store has lost everything in the end, and may have lied before."""
    try:
        for step in steps:
            model.do(step)
        found = model.end(is_first_lost)
        if is_first_lost or not model.lies:
            assert model.owed <= found, f"lost {model.owed - found}"
        assert model.composite.write(_PAGES).pages == _PAGES
        assert model.composite.read(_PAGES).pages == _PAGES, "something is poisoned"
        assert model.composite.store.clear_blocking() == _PAGES
    finally:
        model.composite.backend.close_blocking()


@settings(max_examples=200)
@given(steps=st.lists(_step, min_size=5, max_size=20))
def test_tiers_lose_nothing_that_the_last_one_took(steps: list[tuple[str, Any]]) -> None:
    _check(_Model("tiered"), steps, is_first_lost=True)


@settings(max_examples=100)
@given(steps=st.lists(_step, min_size=5, max_size=20))
def test_tiers_of_which_any_may_take_a_page_lose_nothing_while_nobody_lies(steps: list[tuple[str, Any]]) -> None:
    _check(_Model("tiered", required="any"), steps, is_first_lost=False)


@settings(max_examples=200)
@given(steps=st.lists(_step, min_size=5, max_size=20))
def test_a_mirror_loses_nothing_while_nobody_lies(steps: list[tuple[str, Any]]) -> None:
    _check(_Model("mirror"), steps, is_first_lost=False)


@settings(max_examples=200)
@given(steps=st.lists(_step, min_size=5, max_size=20))
def test_a_mirror_that_asks_for_both_survives_the_loss_of_one(steps: list[tuple[str, Any]]) -> None:
    _check(_Model("mirror", min_writes=2), steps, is_first_lost=True)
