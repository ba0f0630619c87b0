"""Calls of a plug-in, in each generation of its interface; whatever it answers becomes something that holds.

Nothing but StorageError comes out: "io" for what a plug-in raises (its store may be down, a second try may help),
"contract" for an answer that its interface does not allow - None, a list of another length, another type.  Both are
counted.  A page that a plug-in says it has not is a miss.  Whether it is the page that was meant nobody asks here:
header and checksum tell.

Called by `DynamicBackend` alone, on either lane.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import SharedCounters
from sglang_hicache.storage.plugin_pool import StagingPool, tensor_bytes

_logger = logging.getLogger(__name__)

_BOOLEANS = (bool, int, numpy.bool_, numpy.integer)


class NotWrittenError(StorageError):
    """A method that the interface has, and whoever wrote the plug-in has not written."""


def careful(what: str, call: Callable[..., Any], *args: Any) -> Any:
    """One call into foreign code.  StorageError: it raised, or wanted to end the process; `what` says where."""
    try:
        return call(*args)
    except NotImplementedError as error:
        raise NotWrittenError(f"{what}: it is not written ({error})", "contract") from error
    except (Exception, SystemExit) as error:
        _logger.debug("%s", what, exc_info=True)
        raise StorageError(f"{what}: {type(error).__name__}: {error}") from error


class PlugIn:
    """One object of somebody else's, called with care."""

    def __init__(self, instance: Any, name: str, counters: SharedCounters) -> None:
        self._instance = instance
        self._name = name
        self._counters = counters
        #: By method: does it take the extra info that newer callers send along?
        self._modern: dict[str, bool] = {}

    def __str__(self) -> str:
        return self._name

    def has(self, method: str) -> bool:
        """Can it be called at all?"""
        return callable(self._careful(method, lambda: getattr(self._instance, method, None)))

    def has_own(self, method: str, base: type) -> bool:
        """The same, and not by what it inherits from `base`, which does nothing."""
        return self.has(method) and getattr(type(self._instance), method, None) is not vars(base).get(method)

    def call(self, method: str, *args: Any) -> Any:
        """What it answers, whatever that is; StorageError if it raises."""
        return self._careful(method, lambda: getattr(self._instance, method)(*args))

    def call_with(self, method: str, *args: Any, extra: Any) -> Any:
        """The same; `extra` goes along if the method takes one argument more."""
        if method not in self._modern:
            count = len(args) + 1
            self._modern[method] = self._careful(method, lambda: _takes(getattr(self._instance, method), count))
        return self.call(method, *args, *([extra] if self._modern[method] else []))

    def _careful(self, method: str, call: Callable[[], Any]) -> Any:
        try:
            return careful(f"the plug-in {self._name} raised in {method}", call)
        except NotWrittenError:
            raise  # an answer of its kind: instead of a batch, one by one will do
        except StorageError:
            self._counters.add("raised_calls")
            raise

    def broken(self, method: str, answer: object) -> StorageError:
        """The answer is none."""
        self._counters.add("wrong_answers")
        return StorageError(f"the plug-in {self._name} answered {_short(answer)} to {method}", "contract")

    def count(self, method: str, answer: Any, most: int) -> int:
        """A number of pages."""
        is_number = isinstance(answer, (int, numpy.integer)) and not isinstance(answer, bool)
        if not is_number or not 0 <= answer <= most:
            raise self.broken(method, answer)
        return int(answer)

    def truths(self, method: str, answer: Any, count: int) -> list[bool]:
        """A yes or no for each page."""
        if not isinstance(answer, (list, tuple)) or len(answer) != count:
            raise self.broken(method, answer)
        for one in answer:
            if not isinstance(one, _BOOLEANS):
                raise self.broken(method, answer)
        return [bool(one) for one in answer]


class Interface(ABC):
    """How pages get into a plug-in and out of it."""

    name = ""
    #: Methods without which it cannot be used.
    needs: tuple[str, ...] = ()

    def __init__(self, plug_in: PlugIn, pool: StagingPool, types: ModuleType) -> None:
        self._plug_in = plug_in
        self._pool = pool
        self._types = types

    def _extra(self) -> Any:
        return self._types.HiCacheStorageExtraInfo()

    def count(self, keys: list[str]) -> int:
        """How many are there, from the first one on."""
        answer = self._plug_in.call_with("batch_exists", keys, extra=self._extra())
        return self._plug_in.count("batch_exists", answer, len(keys))

    def clear(self) -> None:
        """Have it forget everything.  StorageError: it cannot, or says that it did not."""
        if not self._plug_in.has_own("clear", self._types.HiCacheStorage):
            raise StorageError(f"the plug-in {self._plug_in} has no clear() of its own: its pages stay", "refused")
        if self._plug_in.call("clear") is False:
            raise StorageError(f"the plug-in {self._plug_in} did not clear its store")

    @abstractmethod
    def read(self, keys: list[str], slots: range) -> list[memoryview | None]:
        """The value of each page, in its slot or elsewhere; None: it is not there."""

    @abstractmethod
    def write(self, keys: list[str], slots: range) -> list[bool]:
        """Is the page of each slot kept now?"""


class Copies(Interface):
    """v0: tensors go in and come out."""

    name = "v0"
    needs = ("get", "set", "exists")

    def count(self, keys: list[str]) -> int:
        if self._plug_in.has("batch_exists"):
            return super().count(keys)
        for index, key in enumerate(keys):
            answer = self._plug_in.call("exists", key)
            if not self._plug_in.truths("exists", [answer], 1)[0]:
                return index
        return len(keys)

    def read(self, keys: list[str], slots: range) -> list[memoryview | None]:
        targets = self._pool.tensors(slots)
        answer = self._batch("batch_get", keys, targets)
        if answer is NotImplemented:
            answer = [self._plug_in.call("get", key, target) for key, target in zip(keys, targets, strict=True)]
        if not isinstance(answer, (list, tuple)) or len(answer) != len(keys):
            raise self._plug_in.broken("batch_get", answer)
        return [None if one is None else self._bytes(one) for one in answer]

    def write(self, keys: list[str], slots: range) -> list[bool]:
        values = self._pool.copies(slots)
        answer = self._batch("batch_set", keys, values)
        if answer is NotImplemented:
            answers = []
            for key, value in zip(keys, values, strict=True):
                answers += self._plug_in.truths("set", [self._plug_in.call("set", key, value)], 1)
                if not answers[-1]:
                    break
            return answers
        if self._plug_in.truths("batch_set", [answer], 1)[0]:
            return [True] * len(keys)
        # It says of all pages what is true of one.  Those that it has found a place for are not sent again.
        kept = self.count(keys)
        return [True] * min(kept, len(keys) - 1) + [False]

    def _batch(self, method: str, keys: list[str], tensors: list[Any]) -> Any:
        """NotImplemented: the plug-in has none."""
        if not self._plug_in.has(method):
            return NotImplemented
        try:
            return self._plug_in.call(method, keys, tensors)
        except NotWrittenError:
            return NotImplemented

    def _bytes(self, value: Any) -> memoryview:
        """The bytes of a tensor, wherever it lies."""
        found = tensor_bytes(value)
        if found is None:
            raise self._plug_in.broken("batch_get", value)
        return found


class Slots(Interface):
    """v1: a plug-in reads and writes the slots of the host pool by itself."""

    name = "v1"
    needs = ("batch_get_v1", "batch_set_v1", "batch_exists")

    def read(self, keys: list[str], slots: range) -> list[memoryview | None]:
        return self._read("batch_get_v1", self._transfer("batch_get_v1", keys, slots), slots)

    def write(self, keys: list[str], slots: range) -> list[bool]:
        return self._plug_in.truths("batch_set_v1", self._transfer("batch_set_v1", keys, slots), len(slots))

    def _transfer(self, method: str, keys: list[str], slots: range) -> Any:
        return self._plug_in.call_with(method, keys, self._pool.indices(slots), extra=self._extra())

    def _read(self, method: str, answer: Any, slots: range) -> list[memoryview | None]:
        filled = self._plug_in.truths(method, answer, len(slots))
        return [self._pool.value(slot) if is_filled else None for slot, is_filled in zip(slots, filled, strict=True)]


class Pools(Slots):
    """v2: the same for pools that have names; ours is the one for keys and values."""

    name = "v2"
    needs = ("batch_get_v2", "batch_set_v2", "batch_exists_v2")

    def count(self, keys: list[str]) -> int:
        answer = self._plug_in.call_with("batch_exists_v2", keys, None, extra=self._extra())
        if not isinstance(answer, self._types.PoolTransferResult):
            raise self._plug_in.broken("batch_exists_v2", answer)
        return self._plug_in.count("batch_exists_v2", answer.kv_hit_pages, len(keys))

    def read(self, keys: list[str], slots: range) -> list[memoryview | None]:
        return self._read("batch_get_v2", self._transfer("batch_get_v2", keys, slots), slots)

    def write(self, keys: list[str], slots: range) -> list[bool]:
        return self._plug_in.truths("batch_set_v2", self._transfer("batch_set_v2", keys, slots), len(slots))

    def _transfer(self, method: str, keys: list[str], slots: range) -> Any:
        pool = self._types.PoolName.KV
        transfer = self._types.PoolTransfer(name=pool, host_indices=self._pool.indices(slots), keys=keys)
        answer = self._plug_in.call_with(method, [transfer], extra=self._extra())
        if not isinstance(answer, dict):
            raise self._plug_in.broken(method, answer)
        return answer.get(pool)


def _takes(method: Callable[..., Any], count: int) -> bool:
    """Can it be called with so many arguments?"""
    try:
        inspect.signature(method).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # written in C: it does not say
        return True
    return True


def _short(answer: object) -> str:
    """Some objects cannot even say what they are."""
    if isinstance(answer, Sequence) and not isinstance(answer, (str, bytes)):
        return f"a {type(answer).__name__} of {len(answer)}: " + ", ".join(_short(one) for one in answer[:3])
    return repr(answer)[:80] if isinstance(answer, (type(None), bool, int, float, str)) else type(answer).__name__
