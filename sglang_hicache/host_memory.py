"""How much host memory this server may still take: the machine's, bounded by every control group above it.

Used once by the launcher, and by the tokenizer process before new weights are read, each time for all ranks together: N
ranks that each look at the free memory and each take it is how a container is killed.  Reads files only; tests give it
another root.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: cgroup v1 writes "no limit" as a number near 2**63.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What is left, and what sets the bound (for the message)."""

    available_bytes: int
    bound: str


def host_memory(root: str = "/") -> HostMemory:
    """The tightest of the machine's available memory and what each control group of this process leaves."""
    found = HostMemory(_meminfo_available(Path(root)), "the machine's available memory")
    for folder, names in _groups(Path(root)):
        left = _left_in_group(folder, names)
        if left is not None and left < found.available_bytes:
            found = HostMemory(left, f"the memory limit of control group /{folder.relative_to(root)}")
    return found


@dataclass(frozen=True, slots=True)
class _Names:
    """File names of one version of control groups."""

    limit: str
    usage: str
    #: Line of memory.stat with page cache that the kernel gives back on demand: it is used, but not taken.
    reclaimable: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def _meminfo_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _groups(root: Path) -> list[tuple[Path, _Names]]:
    """Folders of this process's memory groups up to the top of what is mounted; a limit may sit on any of them."""
    groups = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        # Inside a container the path may be the host's, and the mount then shows the group itself at its top.
        folder = mount / path.lstrip("/")
        while folder != mount:
            groups.append((folder, names))
            folder = folder.parent
        groups.append((mount, names))
    return groups


def _left_in_group(folder: Path, names: _Names) -> int | None:
    """Limit less use; None where there is no such group or no limit."""
    try:
        limit_text = (folder / names.limit).read_text().strip()
        usage = int((folder / names.usage).read_text())
        stat = (folder / "memory.stat").read_text()
    except OSError:
        return None
    if limit_text == "max" or int(limit_text) >= _NO_LIMIT_BYTES:
        return None
    reclaimable = next(
        (int(line.split()[1]) for line in stat.splitlines() if line.startswith(names.reclaimable + " ")), 0
    )
    return max(0, int(limit_text) - usage + reclaimable)
