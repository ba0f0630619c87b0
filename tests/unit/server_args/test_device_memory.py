"""Free memory of CUDA devices, asked of a played management library: the real one is on machines with a device only."""

import ctypes

import pytest

from sglang_hicache import device_memory
from sglang_hicache.errors import UserError

GIB = 1 << 30


class PlayedNvml:
    """Devices with this much free memory; the functions fill in their arguments as the library does."""

    def __init__(self, *free_bytes: int) -> None:
        self._free = free_bytes

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = len(self._free)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle) -> int:
        handle._obj.value = index + 1
        return 0 if index < len(self._free) else 6

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle) -> int:
        handle._obj.value = 1
        return 0 if name == b"GPU-known" else 6

    def nvmlDeviceGetMemoryInfo(self, handle, info) -> int:
        info._obj.free = self._free[handle.value - 1]
        return 0


@pytest.fixture
def nvml(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: PlayedNvml(30 * GIB, 10 * GIB, 20 * GIB))


@pytest.mark.parametrize(
    ("visible", "ranks", "free_gib"),
    [(None, 1, 30), (None, 2, 10), ("2,0", 1, 20), ("2,0", 2, 20), ("GPU-known", 1, 30)],
)
def test_the_fullest_device_in_use_counts(nvml, monkeypatch, visible, ranks, free_gib):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_memory.free_device_bytes(ranks) == free_gib * GIB


@pytest.mark.parametrize(("visible", "ranks", "word"), [(None, 4, "3 device"), ("", 1, "0 device"), ("7", 1, "'7'")])
def test_devices_that_are_not_there_are_refused(nvml, monkeypatch, visible, ranks, word):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=word):
        device_memory.free_device_bytes(ranks)


def test_a_machine_without_a_driver_says_what_to_do(monkeypatch):
    def missing(name: str):
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(UserError, match="--device cpu"):
        device_memory.free_device_bytes(1)
