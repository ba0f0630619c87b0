"""Plug-ins that answer what they may not: `lies.NOW.lie` says what, "" is the truth."""

from __future__ import annotations

import torch

from tests.storage.plugins import lies
from tests.storage.plugins.copies import Deleting
from tests.storage.plugins.slots import NamedPools


def lied(lie: str, answer):
    """An answer, bent."""
    match lie:
        case "none":
            return None
        case "short":
            return answer[:-1] if isinstance(answer, list) else -1
        case "long":
            return [*answer, answer[0]] if isinstance(answer, list) else 10**6
        case "type":
            return "yes"
        case "inner":
            return ["yes"] * len(answer) if isinstance(answer, list) else 1.5
        case "error":
            raise RuntimeError("the store of this plug-in is down")
        case "exit":
            raise SystemExit(3)
        case "missing":
            raise NotImplementedError("in the next release")
    return answer


def lied_before() -> None:
    """Whoever raises has stored nothing."""
    if lies.NOW.lie in ("error", "exit", "missing"):
        lied(lies.NOW.lie, None)


class LyingCopies(Deleting):
    """v0."""

    def batch_get(self, keys, target_locations=None, target_sizes=None):
        answer = super().batch_get(keys, target_locations)
        match lies.NOW.lie:
            case "nothing":  # says that it has filled what it has not
                return [torch.zeros_like(target) for target in target_locations]
            case "bytes":
                return [bytes(one.numpy()) for one in answer]
            case "size":
                return [one[:-1] for one in answer]
        return lied(lies.NOW.lie, answer)

    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None):
        lied_before()
        return lied(lies.NOW.lie, super().batch_set(keys, values))

    def batch_exists(self, keys, extra_info=None):
        return lied(lies.NOW.lie, super().batch_exists(keys, extra_info))


class LyingPools(NamedPools):
    """v1, or v2."""

    def batch_get_v1(self, keys, host_indices, extra_info=None):
        if lies.NOW.lie == "nothing":
            return [True] * len(keys)
        answer = [self._load(*one) for one in self._meta(keys, host_indices)]
        if lies.NOW.lie == "late":
            for pointer, size in zip(*self.mem_pool_host.get_page_buffer_meta(host_indices), strict=True):
                lies.late(pointer, size)
        return lied(lies.NOW.lie, answer)

    def batch_set_v1(self, keys, host_indices, extra_info=None):
        lied_before()
        return lied(lies.NOW.lie, [self._save(*one) for one in self._meta(keys, host_indices)])

    def batch_exists(self, keys, extra_info=None):
        return lied(lies.NOW.lie, super().batch_exists(keys, extra_info))

    def batch_get_v2(self, transfers, extra_info=None):
        answer = super().batch_get_v2(transfers)
        if lies.NOW.lie in ("none", "type", "error", "exit", "missing"):
            return lied(lies.NOW.lie, answer)
        return {name: lied(lies.NOW.lie, one) for name, one in answer.items()}

    def batch_set_v2(self, transfers, extra_info=None):
        lied_before()
        answer = super().batch_set_v2(transfers)
        if lies.NOW.lie in ("none", "type", "error", "exit", "missing"):
            return lied(lies.NOW.lie, answer)
        return {name: lied(lies.NOW.lie, one) for name, one in answer.items()}
