"""What the server may do by itself about a store that is sick: the extra config's key `fault_tolerance`.

Read by `scheduler/failover.py` on every rank, from the extra config of the store that a command has attached; what the
entries of `standby` say of themselves is checked where configs of backends are (`registry.py`).  Pure.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from sglang_hicache.errors import UserError

#: off: it stays as it is.  auto_detach: a sick store is taken out.  auto_reconnect: and comes back when it is well.
#: failover: and until then another one serves.
Level = Literal["off", "auto_detach", "auto_reconnect", "failover"]

_HOUR_S, _DAY_S = 3_600.0, 86_400.0
#: Standbys that anybody could keep well.
_MOST_STANDBYS = 8

#: Name to (smallest, largest) of every setting that is a number.
_RANGES: dict[str, tuple[float, float]] = {
    "backoff_initial_s": (0.001, _HOUR_S),
    "backoff_max_s": (0.001, _DAY_S),
    "consecutive_errors": (1, 1_000_000),
    "error_ratio": (0.001, 1),
    "window_s": (0.01, _DAY_S),
    "min_ops": (1, 1_000_000),
    "slow_factor": (1.1, 1_000_000),
    "slow_min_s": (0, _HOUR_S),
    "healthy_s": (0.001, _DAY_S),
    "canary_timeout_s": (0.01, _HOUR_S),
}


class Standby(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A store that takes over while the one in front of it is sick."""

    #: Name of its backend, of any kind.
    backend: str
    #: Its extra config, an object; without `fault_tolerance`, that of the primary goes for all.
    extra_config: dict[str, Any] = {}

    def extra_config_json(self) -> str:
        """The form in which configs travel."""
        return msgspec.json.encode(self.extra_config).decode()


class FaultTolerance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a store counts as sick, and what happens then."""

    #: What the server may do by itself.
    level: Level = "off"
    #: Seconds after which a store that was taken out is tried for the first time; doubled with every failure.
    backoff_initial_s: float = 1.0
    #: Most seconds between two tries.
    backoff_max_s: float = 60.0
    #: So many failures of one kind of operation in a row, or so many that are slow, and the store is taken out.
    consecutive_errors: int = 5
    #: The same for this share of all operations within `window_s`, if there were `min_ops`.
    error_ratio: float = 0.5
    #: Seconds that are looked back.
    window_s: float = 30.0
    #: Fewer operations within the window prove nothing.
    min_ops: int = 20
    #: An operation is slow that takes so many times as long for a page as this store did before.
    slow_factor: float = 10.0
    #: No operation is slow that takes fewer seconds for a page.
    slow_min_s: float = 0.05
    #: Seconds of health after which what was is forgotten, and after which the primary is taken back.
    healthy_s: float = 30.0
    #: Seconds that a canary may take, opening included.
    canary_timeout_s: float = 5.0
    #: Level failover: who takes over, in this order.
    standby: tuple[Standby, ...] = ()

    def __post_init__(self) -> None:
        for name, (lowest, highest) in _RANGES.items():
            value = msgspec.structs.asdict(self)[name]
            if not (math.isfinite(value) and lowest <= value <= highest):
                raise ValueError(f"{name}={value} is not allowed; it takes a number from {lowest} to {highest:g}")
        if self.backoff_max_s < self.backoff_initial_s:
            raise ValueError(f"backoff_max_s={self.backoff_max_s:g} is less than backoff_initial_s")
        if len(self.standby) > _MOST_STANDBYS:
            raise ValueError(f"standby has {len(self.standby)} entries; at most {_MOST_STANDBYS} are allowed")
        if self.level == "failover" and not self.standby:
            raise ValueError("level 'failover' needs at least one standby; without one it is 'auto_reconnect'")
        if any("fault_tolerance" in standby.extra_config for standby in self.standby):
            raise ValueError("a standby has no fault_tolerance of its own: that of the primary goes for all")


def check_fault_tolerance(value: Any) -> None:
    """Raise UserError with what is allowed.  Says nothing of what the standbys are told: that may be secret."""
    try:
        msgspec.convert(value, FaultTolerance)
    except msgspec.ValidationError as error:
        takes = ", ".join(FaultTolerance.__struct_fields__)
        raise UserError(f"extra config fault_tolerance: {error}; it takes {takes}") from error
