"""Plug-ins of the first generation, with tensors in and out, as somebody outside of this project would write them."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig

from tests.storage.plugins.shelf import shelf_of


class Copies(HiCacheStorage):
    """Knows no deletion."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict) -> None:
        self.config, self.kwargs = storage_config, kwargs
        self.values = shelf_of(storage_config)

    def get(self, key, target_location=None, target_sizes=None):
        value = self.values.get(key)
        if value is None:
            return None
        target_location.copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8))
        return target_location

    def batch_get(self, keys, target_locations=None, target_sizes=None):
        return [self.get(key, target) for key, target in zip(keys, target_locations, strict=True)]

    def set(self, key, value=None, target_location=None, target_sizes=None):
        self.values[key] = value.numpy().tobytes()
        return True

    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None):
        return all(self.set(key, value) for key, value in zip(keys, values, strict=True))

    def exists(self, key):
        return key in self.values

    def clear(self):
        self.values.clear()


class Deleting(Copies):
    """Knows one."""

    def delete(self, key):
        self.values.pop(key)


class OneByOne(Copies):
    """Has no batches, takes no extra info, and gives a tensor of its own."""

    def get(self, key, target_location=None, target_sizes=None):
        value = self.values.get(key)
        return None if value is None else torch.frombuffer(bytearray(value), dtype=torch.int32)

    def batch_get(self, keys, target_locations=None, target_sizes=None):
        raise NotImplementedError

    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None):
        raise NotImplementedError

    def batch_exists(self, keys):
        return sum(key in self.values for key in keys[:1]) and 1 + self.batch_exists(keys[1:])

    def remove(self, key):
        return 0 if self.values.pop(key) else -1


class Keeping(Copies):
    """Keeps the tensors that it is given, and keeps what it has when a key comes again."""

    def get(self, key, target_location=None, target_sizes=None):
        return self.values.get(key)

    def set(self, key, value=None, target_location=None, target_sizes=None):
        self.values.setdefault(key, value)
        return True
