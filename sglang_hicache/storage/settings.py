"""The controller's own keys in an extra config, and the record of the backends that keep the bytes themselves.

Other backends have their record beside them, in `*_settings.py`.  Used by `registry.py` in every process that checks a
command; a backend gets its record ready made.  Pure.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec

from sglang_hicache.errors import UserError
from sglang_hicache.storage.capacity import DEFAULT_HIGH, DEFAULT_LOW, parse_size
from sglang_hicache.storage.fault_tolerance import FaultTolerance, check_fault_tolerance
from sglang_hicache.storage.placeholders import has_placeholder

#: A pipe takes this much without anybody reading: the config reaches the storage process before it has started.
LARGEST_CONFIG_BYTES = 32 * 1024

_DAY_S = 86_400.0
_TEN_YEARS_S = 10 * 365 * 86_400

#: Above this a low watermark would have pages go one at a time.
_HIGHEST_LOW = 0.99


class PrefetchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When a prefetch is worth while, and how long a request waits for it under the policy `timeout`."""

    #: Fewest tokens to ask the store about, and fewest hits to fetch.
    prefetch_threshold: int = 256
    #: Seconds that every prefetch may take.
    prefetch_timeout_base: float = 1.0
    #: Seconds on top per 1024 tokens.
    prefetch_timeout_per_ki_token: float = 0.25
    #: The backend is told the keys before the first one; kept for clients that send it, pages carry their parent.
    hicache_storage_pass_prefix_keys: bool = False
    #: Under the policy `timeout`: fetch only what is fetched more quickly than computed, as far as that was measured.
    cost_gate: bool = True


class EncryptionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Encryption of stored pages."""

    #: Absolute path of a file with 32 random bytes (or these in hexadecimal or base64) that only this user may read.
    key_file: str


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the storage process does around any backend, and the ranks about one that is sick; the backend never sees
    it."""

    #: Pages are encrypted before the backend gets them; null: they are not.
    encryption: EncryptionSettings | None = None
    #: Seconds for which a page that the store names but does not give is not asked for again; 0: never mind.
    negative_ttl_s: float = 60.0
    #: When the store counts as sick, and what the server does then by itself.
    fault_tolerance: FaultTolerance = FaultTolerance()


#: What every backend's extra config may hold.
COMMON_KEYS = (*PrefetchSettings.__struct_fields__, *StoreSettings.__struct_fields__)


class ChildStore(NamedTuple):
    """A store inside another one, as its extra config names it."""

    backend: str
    config: dict[str, Any]
    #: How errors name it; "": they need not.
    label: str = ""


class BackendSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the record that a backend gets."""

    #: Name of the field that takes every key of an extra config that is no field; "": there is none.
    REST: ClassVar[str] = ""

    def place(self) -> str:
        """Where the store is, in an operator's words; "" where that says nothing.  Never a secret."""
        return ""

    def may_write_late(self) -> bool:
        """May host memory be written after the process died (`Capabilities.late_io`)?  Children answer themselves."""
        return False

    def plug_in(self) -> str:
        """The class that a config names and that is loaded for this store, "module:Class"; "": none is."""
        return ""

    def children(self) -> tuple[ChildStore, ...]:
        """The stores that this one is made of; they reach its backend in this order."""
        return ()


class CapacitySettings(BackendSettings, frozen=True, kw_only=True):
    """How much a backend that stores bytes itself may hold, and what goes when that is too little."""

    #: Most bytes of pages: a number, or a text such as "200GB" or "1.5TiB"; 0: no limit; null: the backend's default.
    max_size: int | str | None = None
    #: Share of the limit above which pages go; null: 0.95.
    high_watermark: float | None = None
    #: Share of the limit at which that ends; null: `eviction_ratio`, else 0.85.
    low_watermark: float | None = None
    #: The name of the low watermark in configurations that clients already have.
    eviction_ratio: float | None = None
    #: Seconds after which a page that nobody used goes, however much room there is; 0: never.
    ttl_s: int = 0

    def __post_init__(self) -> None:
        _check_size(self.max_size)
        for name in ("high_watermark", "low_watermark", "eviction_ratio"):
            share = msgspec.structs.asdict(self)[name]
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}={share} is not allowed; it takes a share of max_size, above 0 and at most 1")
        if self.low_watermark is not None and self.eviction_ratio is not None:
            raise ValueError("low_watermark and eviction_ratio are two names for one thing; give one of them")
        high, low = self.watermarks()
        if high <= low:
            raise ValueError(f"high_watermark={high} is not above low_watermark={low}: pages would go one at a time")
        if not 0 <= self.ttl_s <= _TEN_YEARS_S:
            raise ValueError(f"ttl_s={self.ttl_s} is not allowed; it takes seconds from 0 (never) to {_TEN_YEARS_S}")

    def max_bytes(self) -> int | None:
        """The limit; 0: none; None: the backend's default."""
        return None if self.max_size is None else parse_size(self.max_size)

    def watermarks(self) -> tuple[float, float]:
        """High and low.  A client that knows only `eviction_ratio` gets a high one that is above it."""
        if self.eviction_ratio is not None:
            low = min(self.eviction_ratio, _HIGHEST_LOW)
        else:
            low = DEFAULT_LOW if self.low_watermark is None else self.low_watermark
        if self.high_watermark is not None:
            return self.high_watermark, low
        return (max(DEFAULT_HIGH, (1 + low) / 2) if self.eviction_ratio is not None else DEFAULT_HIGH), low


class MemorySettings(CapacitySettings, frozen=True, kw_only=True):
    """The reference backend: 4 GiB for each rank unless `max_size` says otherwise."""


class FileSettings(CapacitySettings, frozen=True, kw_only=True):
    """Pages as files; 80 % of what is free on the disk, or its own already, unless `max_size` says otherwise."""

    #: Folder of the store; "" means SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR, else a private folder of the user.
    file_storage_path: str = ""
    #: What must have reached the disk before a page counts as written.  "none" is the default: after a power cut a
    #: page may be torn, the checksum makes it a miss, and a cache can afford that.  "data" syncs the page, "full"
    #: its folder as well.
    fsync: Literal["none", "data", "full"] = "none"
    #: What stays free on the disk, in the form of max_size; null: 1 GiB, or 1 % of a disk of less than 100 GiB.
    min_free_space: int | str | None = None
    #: Taken because clients send it; it changes nothing, look-ups ask the file system, which has a cache of its own.
    enable_metadata_cache: bool = False
    #: Taken because clients send it, as above.
    metadata_ttl: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size(self.min_free_space)
        path = self.file_storage_path
        if "\0" in path or path != path.encode(errors="ignore").decode():
            raise ValueError(f"file_storage_path={path!r} holds a character that no path may have")

    def place(self) -> str:
        return self.file_storage_path

    def min_free_bytes(self) -> int | None:
        """What stays free; None: the default for the disk."""
        return None if self.min_free_space is None else parse_size(self.min_free_space)


def _check_size(size: int | str | None) -> None:
    """ValueError unless it is one, or will be known on its rank."""
    if size is not None and not has_placeholder(size):
        parse_size(size)


def split_extra_config(text: str | None) -> tuple[PrefetchSettings, dict[str, Any]]:
    """The controller's four keys, checked, and what is left for the backend."""
    prefetch, _, config = _divide(text)
    return prefetch, config


def store_settings(text: str | None) -> StoreSettings:
    """The keys of the storage process, checked."""
    return _divide(text)[1]


def _divide(text: str | None) -> tuple[PrefetchSettings, StoreSettings, dict[str, Any]]:
    size_bytes = len(text.encode()) if text else 0
    if size_bytes > LARGEST_CONFIG_BYTES:
        raise UserError(f"the extra config is {size_bytes} bytes long; at most {LARGEST_CONFIG_BYTES} are allowed")
    try:
        config = msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"the extra config is not valid JSON ({error}); give one JSON object") from error
    if not isinstance(config, dict):
        raise UserError(f"the extra config is a JSON {type(config).__name__}; give one JSON object like {{}}")
    own = {name: config.pop(name) for name in COMMON_KEYS if name in config}
    for name, value in own.items():
        if name == "encryption":
            _check_encryption(value)
        elif name == "fault_tolerance":
            check_fault_tolerance(value)
        else:
            _check_number(name, value)
    return msgspec.convert(own, PrefetchSettings), msgspec.convert(own, StoreSettings), config


def _check_encryption(value: Any) -> None:
    """Says what is wrong without repeating it: somebody may have given the key where its file belongs."""
    takes = 'it takes {"key_file": "<absolute path>"}'
    try:
        settings = msgspec.convert(value, EncryptionSettings | None)
    except msgspec.ValidationError as error:
        raise UserError(f"extra config encryption: {error}; {takes}") from error
    if not settings or has_placeholder(settings.key_file):
        return
    if not settings.key_file.startswith("/") or "\0" in settings.key_file:
        raise UserError(f"extra config encryption.key_file is no absolute path; {takes}")


def _check_number(name: str, value: Any) -> None:
    """One of the other common keys: type and range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in ("hicache_storage_pass_prefix_keys", "cost_gate"):
        fits, allowed = isinstance(value, bool), "true or false"
    elif name == "prefetch_threshold":
        fits, allowed = number and isinstance(value, int) and 0 <= value < 2**31, "a whole number of tokens >= 0"
    else:
        fits = number and math.isfinite(value) and 0 <= value <= _DAY_S
        allowed = f"seconds, a number from 0 to {_DAY_S:.0f}"
    if not fits:
        raise UserError(f"extra config {name}={msgspec.json.encode(value).decode()} is not allowed; it takes {allowed}")
