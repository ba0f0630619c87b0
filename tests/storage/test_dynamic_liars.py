"""Plug-ins that break their word: each lie is a counted failure of one op, and nothing of it is believed."""

from __future__ import annotations

import itertools
import secrets
from typing import Any

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.checked import BatchResult, CheckedStore
from sglang_hicache.storage.dynamic import DynamicBackend
from tests.storage import pages
from tests.storage.plugins import lies
from tests.storage.plugins.shelf import SHELVES
from tests.storage.test_dynamic import V1, V2, made

COPIES = {"module_path": "tests.storage.plugins.liars", "class_name": "LyingCopies"}
POOLS = {"module_path": "tests.storage.plugins.liars", "class_name": "LyingPools"}
GENERATIONS: dict[str, dict[str, Any]] = {"v0": COPIES, "v1": {**POOLS, **V1}, "v2": {**POOLS, **V2}}
#: Lies that break the interface, and what they are counted as.
BROKEN = {
    "none": "wrong_answers", "short": "wrong_answers", "long": "wrong_answers", "type": "wrong_answers",
    "inner": "wrong_answers", "missing": "wrong_answers", "error": "raised_calls", "exit": "raised_calls",
}  # fmt: skip


class World:
    """A lying plug-in with three pages that it took while it was honest."""

    def __init__(self, generation: str) -> None:
        self.backend: DynamicBackend = made("liar", shelf=secrets.token_hex(8), **GENERATIONS[generation])
        self.backend.open_blocking()
        self.store: CheckedStore = pages.store(self.backend)
        self.keys = pages.keys(3)
        self.contents = [pages.content(n) for n in range(3)]
        assert self.store.write_blocking(self.keys, self.contents, b"", 0).pages == 3

    def lie(self, lie: str) -> None:
        lies.NOW.lie = lie

    def counted(self) -> int:
        stats = self.backend.stats()
        return stats.get("wrong_answers", 0) + stats.get("raised_calls", 0)

    def read(self) -> tuple[int, str]:
        targets = pages.empty(3)
        result = self.store.read_blocking(self.keys, targets)
        assert targets[: result.pages] == self.contents[: result.pages]
        return result.pages, result.reason

    def is_well(self) -> None:
        """Once it tells the truth, everything is there, or can be written again."""
        self.lie("")
        self.store.write_blocking(self.keys, self.contents, b"", 0)
        assert self.store.lookup_blocking(self.keys) == 3
        assert self.read() == (3, "")


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Any:
    made_world = World(request.param)
    yield made_world
    made_world.lie("")
    made_world.backend.close_blocking()
    SHELVES.clear()


def _each(*left_out: tuple[str, str], lies: Any = BROKEN) -> Any:
    """Every lie in every generation."""
    cases = [case for case in itertools.product(GENERATIONS, lies) if case not in left_out]
    return pytest.mark.parametrize(("world", "lie"), cases, indirect=["world"])


#: A plug-in without batches is asked page by page; one answer for a whole batch has nothing inside.
NO_LIE = (("v0", "missing"), ("v0", "inner"))


@_each(NO_LIE[0])
def test_fm11_a_plug_in_that_breaks_its_interface_while_it_reads_is_a_counted_miss(world: World, lie: str) -> None:
    world.lie(lie)
    before = world.counted()
    read, reason = world.read()
    assert read == 0 and reason.startswith("io" if BROKEN[lie] == "raised_calls" else "contract")
    assert world.backend.stats()[BROKEN[lie]] >= 1 and world.counted() > before
    world.is_well()


@_each(*NO_LIE)
def test_fm11_a_plug_in_that_breaks_its_interface_while_it_writes_is_not_believed(world: World, lie: str) -> None:
    world.lie(lie)
    try:
        result = world.store.write_blocking(pages.keys(2, first=50), world.contents[:2], b"", 0)
    except StorageError as error:
        result = BatchResult(0, reason=error.reason)  # the question whether they are there already
    assert result.pages == 0 and result.reason
    assert world.backend.stats()[BROKEN[lie]] >= 1
    world.is_well()


@_each(("v0", "inner"), ("v2", "inner"), *(("v2", lie) for lie in BROKEN))
def test_fm11_a_plug_in_that_breaks_its_interface_while_it_is_asked_fails_the_look_up(world: World, lie: str) -> None:
    world.lie(lie)
    with pytest.raises(StorageError) as caught:
        world.store.lookup_blocking(world.keys)
    assert caught.value.reason == ("io" if BROKEN[lie] == "raised_calls" else "contract")
    world.is_well()


@pytest.mark.parametrize("world", ["v0", "v1"], indirect=True)
def test_a_plug_in_that_says_it_has_filled_a_page_and_has_not_is_found_out(world: World) -> None:
    assert world.read() == (3, "")  # whatever is in the slots is right, for these keys
    world.lie("nothing")
    read, reason = world.read()
    assert read == 0 and reason.startswith("corrupt")
    world.is_well()


@pytest.mark.parametrize("world", ["v0"], indirect=True)
def test_a_tensor_of_another_size_is_corrupt_and_bytes_are_no_tensor(world: World) -> None:
    world.lie("bytes")
    read, reason = world.read()
    assert read == 0 and reason.startswith("contract")
    world.lie("size")
    read, reason = world.read()
    assert read == 0 and reason.startswith("corrupt")
    world.is_well()


@pytest.mark.parametrize("world", ["v1"], indirect=True)
def test_a_write_into_a_slot_after_the_call_reaches_nobody(world: World) -> None:
    """1. A plug-in's thread goes on after its call has returned. 2. The page is out of the slot by then. 3. The slot
    serves the next read: what is spoilt there is refused, and read again."""
    world.lie("late")
    targets = pages.empty(3)
    assert world.store.read_blocking(world.keys, targets).pages == 3
    lies.NOW.write_late()
    assert targets == world.contents
    world.is_well()


@pytest.mark.parametrize("world", ["v0", "v1"], indirect=True)
def test_fm43_a_plug_in_that_keeps_nothing_is_not_attached(world: World) -> None:
    """It answers every write with yes and every read with yes."""
    world.lie("nothing")
    with pytest.raises(StorageError, match="self-test: the backend could not read back what it has written"):
        world.store.self_test_blocking(0)
    world.lie("")
    world.store.self_test_blocking(0)
