"""Plug-ins that tell how they were made, or cannot be."""

from __future__ import annotations

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from tests.storage.plugins.slots import Pointers


class Kwargs(Pointers):
    """As SGLang makes a class that a config names."""

    def __init__(self, storage_config, kwargs) -> None:
        super().__init__(storage_config, kwargs)
        self.made = (storage_config, kwargs)


class Config(Pointers):
    """As `file`, `sim`, `nixl` and `tensorcast` are made."""

    def __init__(self, storage_config) -> None:
        super().__init__(storage_config, {})
        self.made = (storage_config,)


class Pool(Pointers):
    """As most others are."""

    def __init__(self, storage_config, mem_pool_host) -> None:
        super().__init__(storage_config, {})
        self.made = (storage_config, mem_pool_host)


class Env(Pointers):
    """As `hf3fs` is."""

    def __init__(self, *made) -> None:
        super().__init__(made[-1], {})
        self.made = made

    @classmethod
    def from_env_config(cls, bytes_per_page, dtype, storage_config):
        return cls(bytes_per_page, dtype, storage_config)


class Unmakeable(Pointers):
    """Its server is not there."""

    def __init__(self, storage_config, kwargs) -> None:
        raise ConnectionRefusedError(111, "Connection refused")


class Unready(Pointers):
    """Finds out late."""

    def on_host_pools_registered(self) -> None:
        raise RuntimeError("this cache manager wants another page size")


class NotWritten(Pointers):
    """To be made in the next release."""

    def __init__(self, storage_config, kwargs) -> None:
        raise NotImplementedError("next release")


class NotRegistered(Pointers):
    """Takes no pool in this one."""

    def on_host_pools_registered(self) -> None:
        raise NotImplementedError("next release")


class NotClosed(Pointers):
    """Stays."""

    def close(self):
        raise NotImplementedError


class NotCleared(Pointers):
    """Forgets by what it inherits, which is nothing."""

    clear = HiCacheStorage.clear


class Moody(Pointers):
    """Has a method some of the time."""

    is_well = True

    def __getattribute__(self, name):
        if name == "batch_get_v1" and not type(self).is_well:
            raise RuntimeError("not today")
        return super().__getattribute__(name)


class Bare:
    """No subclass of anything, and with half of the interface."""

    def __init__(self, storage_config, kwargs) -> None:
        pass

    def get(self, key, target_location=None):
        return None

    def exists(self, key):
        return False


NOT_A_CLASS = 7
