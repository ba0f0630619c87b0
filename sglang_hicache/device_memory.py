"""Free memory of the CUDA devices, asked of the driver's management library: the launcher holds no torch.

Used once, at start, when the device pool's size is not given.
"""

from __future__ import annotations

import ctypes
import os

from sglang_hicache.errors import UserError


class _MemoryInfo(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def free_device_bytes(ranks: int) -> int:
    """Free memory of the fullest of the devices that `ranks` ranks use."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise UserError(f"--device cuda: no NVIDIA driver here ({error}); use --device cpu") from error
    if nvml.nvmlInit_v2() != 0:
        raise UserError("--device cuda: the NVIDIA driver does not answer; use --device cpu")
    try:
        devices = _visible(nvml)
        if len(devices) < ranks:
            raise UserError(f"--device cuda --tp-size {ranks}: only {len(devices)} device(s) can be seen")
        return min(_free_bytes(nvml, handle) for handle in devices[:ranks])
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: ctypes.CDLL) -> list[ctypes.c_void_p]:
    """Handles of the devices in the order in which CUDA will number them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        names = [str(index) for index in range(count.value)]
    else:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
    handles = []
    for name in names:
        handle = ctypes.c_void_p()
        if name.isdigit():
            code = nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
        else:
            code = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        if code != 0:
            raise UserError(f"CUDA_VISIBLE_DEVICES={chosen!r}: the driver knows no device {name!r}")
        handles.append(handle)
    return handles


def _free_bytes(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> int:
    info = _MemoryInfo()
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info)) != 0:
        raise UserError("--device cuda: the driver does not tell the free memory; give --max-total-tokens")
    return info.free
