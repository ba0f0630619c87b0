"""What the backend of plug-ins is told: which class, how it is made and called, and what it gets to know itself.

A plug-in is a class that somebody wrote for SGLang's `HiCacheStorage`.  Used by `registry.py` in every process that
checks a command; nothing of a plug-in is imported for that.  Names that SGLang has for plug-ins of its own are names
here as well: `ALIASES` says which class each of them means.  Pure.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec

from sglang_hicache.storage.settings import BackendSettings

#: How a plug-in is made:  cls(config, kwargs)  cls(config)  cls(config, host_pool)  cls.from_env_config(bytes per page,
#: dtype, config).  The first one is what SGLang does with a class that a config names.
Constructor = Literal["config_kwargs", "config", "config_pool", "env_config"]

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ALLOCATORS = ("", "default", "shm")


class DynamicSettings(BackendSettings, frozen=True, kw_only=True):
    """One plug-in.  Keys that are none of these are the plug-in's own."""

    #: The field that takes every other key of the extra config.
    REST: ClassVar[str] = "rest"

    #: What SGLang shows the plug-in as; only told to the plug-in here.
    backend_name: str
    #: Module of the class, dotted, as `import` takes it.
    module_path: str
    #: Name of the class in that module.
    class_name: str
    #: True, or what passes for it: pages go through `batch_get_v1` and `batch_set_v1`, as slots of a host pool.
    interface_v1: bool | int | str | None = False
    #: The same for `batch_get_v2`, `batch_set_v2` and `batch_exists_v2`, with one pool, "kv".
    interface_v2: bool | int | str | None = False
    #: "default" or "shm", which mean the same here: the staging memory is always shared memory with a descriptor.
    allocator: str = "default"
    #: How the class is made.
    constructor: Constructor = "config_kwargs"
    #: The plug-in's store is ours alone: clearing may call its `clear()`, which removes everything.
    clear_all: bool = False
    #: What the plug-in gets as its kwargs.
    rest: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if not _DOTTED.fullmatch(self.module_path):
            raise ValueError(f"module_path={self.module_path!r} is no dotted name of a module, spelled out")
        if not _WORD.fullmatch(self.class_name):
            raise ValueError(f"class_name={self.class_name!r} is no name of a class, spelled out")
        if "${" in self.backend_name:
            raise ValueError(f"backend_name={self.backend_name!r} takes no placeholder")
        if self.interface_v1 and self.interface_v2:
            raise ValueError("interface_v1 and interface_v2 exclude each other; pages go one way")
        if self.allocator not in _ALLOCATORS:
            raise ValueError(f"allocator={self.allocator!r} is not known here; it takes 'default' or 'shm'")

    def place(self) -> str:
        return self.plug_in()

    def plug_in(self) -> str:
        return f"{self.module_path}:{self.class_name}"

    def extra_config(self) -> dict[str, Any]:
        """The extra config as SGLang would hand it on: all of it, without the controller's keys."""
        own = {name: value for name, value in msgspec.structs.asdict(self).items() if name not in _OURS}
        return own | self.rest


#: Keys that SGLang does not have: they are between the operator and this server.
_OURS = ("interface_v2", "constructor", "clear_all", "rest")


class Alias(NamedTuple):
    """A plug-in that SGLang brings along under a name of its own."""

    module_path: str
    class_name: str
    constructor: Constructor
    interface_v1: bool
    #: Packages that it needs beside SGLang itself, for error texts.
    needs: str = ""

    def preset(self, name: str) -> dict[str, Any]:
        """The keys of the extra config that the name stands for."""
        return {"backend_name": name} | {key: value for key, value in self._asdict().items() if key != "needs"}


_HOME = "sglang.srt.mem_cache.storage"

#: As SGLang 0.5.23 registers them.  `file` and `mooncake` are backends of our own; `sim` keeps no bytes and `shm`
#: stores nothing, so that their self-test fails, and says so.
ALIASES = {
    "hf3fs": Alias(f"{_HOME}.hf3fs.storage_hf3fs", "HiCacheHF3FS", "env_config", True, "hf3fs_fuse"),
    "eic": Alias(f"{_HOME}.eic.eic_storage", "EICStorage", "config_pool", True, "eic"),
    "nixl": Alias(f"{_HOME}.nixl.hicache_nixl", "HiCacheNixl", "config", True, "nixl"),
    "aibrix": Alias(
        f"{_HOME}.aibrix_kvcache.aibrix_kvcache_storage", "AibrixKVCacheStorage", "config_pool", False, "aibrix-kvcache"
    ),
    "simm": Alias(f"{_HOME}.simm.hicache_simm", "HiCacheSiMM", "config_pool", True, "simm"),
    "mori": Alias(f"{_HOME}.umbp.umbp_store", "UMBPStore", "config_pool", True, "mori"),
    "npu_memcache": Alias(
        f"{_HOME}.npu_memcache.npu_memcache_store", "NpuMemcacheStore", "config_pool", True, "memcache-hybrid"
    ),
    "tensorcast": Alias(f"{_HOME}.tensorcast_store.tensorcast_store", "TensorcastStore", "config", True, "tensorcast"),
    "seaweedfs": Alias(f"{_HOME}.seaweedfs.seaweedfs_store", "SeaweedFSStore", "config_pool", True, "boto3"),
    "sim": Alias(f"{_HOME}.sim_storage", "SimHiCacheStorage", "config", False),
    "shm": Alias(f"{_HOME}.shm", "HiCacheShm", "config_pool", False),
}
