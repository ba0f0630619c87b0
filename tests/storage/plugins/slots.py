"""Plug-ins of the later generations: pointers into the host pool."""

from __future__ import annotations

import ctypes

from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.memory_pool_host import HostKVCache

from tests.storage.plugins.shelf import shelf_of


class Pointers(HiCacheStorage):
    """v1."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict) -> None:
        self.config = storage_config
        self.values = shelf_of(storage_config)
        self.events: list[object] = []

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        super().register_mem_pool_host(mem_pool_host)
        assert mem_pool_host.layout == "page_first"
        self.events.append("anchor")

    def on_host_pools_registered(self) -> None:
        self.events.append("registered")

    def _meta(self, keys, indices):
        assert len(keys) == len(indices) // self.mem_pool_host.page_size
        return zip(keys, *self.mem_pool_host.get_page_buffer_meta(indices), strict=True)

    def batch_get_v1(self, keys, host_indices, extra_info: HiCacheStorageExtraInfo | None = None):
        assert extra_info.prefix_keys is None
        return [self._load(*one) for one in self._meta(keys, host_indices)]

    def batch_set_v1(self, keys, host_indices, extra_info=None):
        return [self._save(*one) for one in self._meta(keys, host_indices)]

    def _load(self, key, pointer, size):
        value = self.values.get(key, b"")
        if len(value) != size:
            return False
        ctypes.memmove(pointer, value, size)
        return True

    def _save(self, key, pointer, size):
        self.values[key] = ctypes.string_at(pointer, size)
        return True

    def exists(self, key):
        return key in self.values

    def batch_delete(self, keys):
        for key in keys:
            del self.values[key]

    def get(self, key, target_location=None, target_sizes=None):
        raise NotImplementedError

    batch_get = batch_set = set = get

    def clear(self):
        self.values.clear()

    def close(self):
        self.events.append("closed")


class NamedPools(Pointers):
    """v2, and nothing else."""

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: PoolName) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self.events.append(str(host_pool_name))

    def batch_exists_v2(self, keys, pool_transfers=None, extra_info=None):
        hits = next((index for index, key in enumerate(keys) if key not in self.values), len(keys))
        return PoolTransferResult(hits, {PoolName.KV: hits})

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info=None):
        return {one.name: [self._load(*meta) for meta in self._named(one)] for one in transfers}

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info=None):
        return {one.name: [self._save(*meta) for meta in self._named(one)] for one in transfers}

    def _named(self, transfer: PoolTransfer):
        pool = self.registered_pools[transfer.name]
        return zip(transfer.keys, *pool.get_page_buffer_meta(transfer.host_indices), strict=True)

    def batch_get_v1(self, keys, host_indices, extra_info=None):
        raise NotImplementedError

    batch_set_v1 = batch_get_v1


class Pages(Pointers):
    """v1 by way of the pool's copies of pages, made with the pool, and with writes that say no when they are full."""

    def __init__(self, storage_config: HiCacheStorageConfig, mem_pool_host: HostKVCache) -> None:
        super().__init__(storage_config, {})
        self.register_mem_pool_host(mem_pool_host)
        self.most = storage_config.extra_config.get("most", 1 << 20)

    def batch_get_v1(self, keys, host_indices, extra_info=None):
        return [self._load_page(key, index) for key, index in zip(keys, host_indices, strict=True)]

    def batch_set_v1(self, keys, host_indices, extra_info=None):
        return [self._save_page(key, index) for key, index in zip(keys, host_indices, strict=True)]

    def _load_page(self, key, index):
        page = self.mem_pool_host.get_dummy_flat_data_page()
        if key not in self.values:
            return False
        ctypes.memmove(page.data_ptr(), self.values[key], page.numel() * page.element_size())
        self.mem_pool_host.set_from_flat_data_page(index, page)
        return True

    def _save_page(self, key, index):
        if len(self.values) >= self.most:
            return False
        self.values[key] = self.mem_pool_host.get_data_page(index, flat=True).numpy().tobytes()
        return True
