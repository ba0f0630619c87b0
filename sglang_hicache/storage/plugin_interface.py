"""The interface that plug-ins are written against: names, fields and meanings of SGLang's `hicache_storage` module.

It stands in for that module where SGLang is not installed (`plugin_modules.py`), in a storage process and nowhere else.
What is here is what a plug-in may import from there, in our own words; the behaviour that SGLang documents for a method
that a plug-in leaves out is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class HostKVCache:
    """What SGLang calls the host pool; here it is always a `StagingPool`."""


@dataclass
class HiCacheStorageConfig:
    """For whom a plug-in is made."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    dp_rank: int = 0
    extra_config: dict[str, Any] | None = None
    dcp_size: int = 1
    dcp_rank: int = 0
    logical_page_size: int | None = None

    @property
    def is_storage_writer(self) -> bool:
        """Does this rank write?"""
        return not self.is_mla_model or self.tp_rank == self.dcp_rank


@dataclass
class HiCacheStorageExtraInfo:
    """What comes with a batch of keys."""

    prefix_keys: list[str] | None = None
    extra_info: dict[str, Any] | None = None


class PoolName(StrEnum):
    """Pools of a model's cache.  This server has one."""

    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    INDEXER = "indexer"
    DRAFT = "draft"


class PoolHitPolicy(StrEnum):
    """Which pages of a pool must be there for a prefix to count."""

    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    """Pages of one pool on their way."""

    name: PoolName
    host_indices: Any = None
    device_indices: Any = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES
    nodes_to_load: list[Any] | None = None
    indices_from_pool: PoolName | None = None
    block_pages: int = 0
    group_pages: int = 0


@dataclass
class PoolTransferResult:
    """How many pages of each pool are there."""

    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int] = field(default_factory=dict)
    restorable_prefix_pages: list[int] | None = None

    @classmethod
    def empty(cls) -> PoolTransferResult:
        """Nothing is there."""
        return cls(0, {})


class HiCacheStorage(ABC):
    """A store, as SGLang asks for it."""

    mem_pool_host: Any = None
    registered_pools: dict[Any, Any]

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool whose slots v1 calls speak of."""
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A pool whose slots v2 calls speak of."""
        self.registered_pools = {**vars(self).get("registered_pools", {}), host_pool_name: host_pool}

    def on_host_pools_registered(self) -> None:  # noqa: B027 - few plug-ins wait for it
        """All pools have been named; raising fails the attach."""

    @abstractmethod
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """The value as a tensor, in the target if there is one; None: it is not there."""

    @abstractmethod
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        """A list of what `get` answers."""

    @abstractmethod
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Keep a tensor; is it kept?"""

    @abstractmethod
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Are all of them kept?"""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Is it there?"""

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many are there, counted from the first one without a gap."""
        return next((index for index, key in enumerate(keys) if not self.exists(key)), len(keys))

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fill the slots of the host pool; which ones are filled?"""
        raise NotImplementedError

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Keep what is in the slots; which ones are kept?"""
        raise NotImplementedError

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """How many are there in every pool."""
        raise NotImplementedError

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[Any, list[bool]]:
        """`batch_get_v1` for each pool."""
        raise NotImplementedError

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[Any, list[bool]]:
        """`batch_set_v1` for each pool."""
        raise NotImplementedError

    def clear(self) -> None:  # noqa: B027 - most plug-ins cannot
        """Forget everything."""

    def get_stats(self) -> Any:
        """Measurements, or None."""
        return None
