"""Copies of whole pages between the device pool (L1) and the host pool (L2) of a rank.

Called by the model worker on its one thread.  Who owns what: the caller of a copy owns both sides' pages until
`finished` names the copy.  Order is what the worker promises: copies out, then copies in, then the forward, each
seeing those before it.  On a CPU a copy is done when the call returns.  On CUDA all copies run on one stream of
their own, behind the computing stream as it was when the copy was issued, and the next forward waits for them:
so a forward never reads a page that is still being filled, nor overwrites one that is still being read.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import HiCacheError, IntegrityError
from sglang_hicache.workers.attention.pool import DevicePool
from sglang_hicache.workers.batch import KVLayout

#: cudaHostRegister: the memory counts as pinned in every context.
_CUDA_HOST_REGISTER_PORTABLE = 1
#: Pages that one step of a CUDA copy packs on the device: bounds the memory that packing takes.
_CUDA_STEP_PAGES = 256


class CopyEngine(Protocol):
    """Moves pages, in the order of the calls."""

    def copy_out(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Device pages to host pages, pairwise."""
        ...

    def copy_in(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Host pages to device pages, pairwise."""
        ...

    def fence(self) -> None:
        """What is computed from now on comes after every copy issued so far."""
        ...

    def finished(self) -> list[int]:
        """Copies that have finished since the last call, in the order in which they were issued."""
        ...

    def close(self) -> None:
        """Let go of the host pool."""
        ...


def host_pages_of(host: HostPool, layout: KVLayout, dtype: torch.dtype) -> Tensor:
    """The host pool as [pages, key or value, layers, slots, heads, channels], without a copy."""
    if host.page_bytes != layout.page_bytes:
        raise IntegrityError(f"host pages have {host.page_bytes} bytes, device pages {layout.page_bytes}")
    shape = (host.pages, 2, layout.layers, layout.page_size, layout.kv_heads_local, layout.head_dim)
    return torch.frombuffer(host.buffer, dtype=dtype).view(shape)


def page_runs(device_pages: Sequence[int], host_pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The pairs as (device page, host page, count), each run as long as both sides ascend together.

    Pages are mostly handed out in order, and with pages of one token a call per page costs more than the bytes.
    """
    if len(device_pages) != len(host_pages):
        raise IntegrityError(f"{len(device_pages)} device pages against {len(host_pages)} host pages")
    start = 0
    for index in range(1, len(device_pages) + 1):
        length = index - start
        goes_on = (
            index < len(device_pages)
            and device_pages[index] == device_pages[start] + length
            and host_pages[index] == host_pages[start] + length
        )
        if not goes_on:
            yield device_pages[start], host_pages[start], length
            start = index


class CpuCopyEngine:
    """Plain copies, slice by slice: indexing with lists of pages would be twenty times slower."""

    def __init__(self, pool: DevicePool, host: Tensor) -> None:
        #: [pages, key or value, layers, slots, heads, channels], like the host pool.
        self._device = pool.kv.permute(2, 0, 1, 3, 4, 5)
        self._host = host
        self._finished: list[int] = []

    def copy_out(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        for device, host, count in page_runs(device_pages, host_pages):
            self._host[host : host + count].copy_(self._device[device : device + count])
        self._finished.append(op_id)

    def copy_in(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        for device, host, count in page_runs(device_pages, host_pages):
            self._device[device : device + count].copy_(self._host[host : host + count])
        self._finished.append(op_id)

    def fence(self) -> None:
        """Every copy is done already."""

    def finished(self) -> list[int]:
        done, self._finished = self._finished, []
        return done

    def close(self) -> None:
        # The pool cannot unmap its memory while a tensor is a view of it.
        del self._host


class CudaCopyEngine:
    """Copies on a stream of their own, between device memory and a pinned host pool."""

    def __init__(self, pool: DevicePool, host: Tensor) -> None:
        self._kv = pool.kv
        self._host = host
        self.stream = torch.cuda.Stream(pool.device)
        #: Issued and not yet reported, oldest first: one stream finishes them in this order.
        self._pending: deque[tuple[int, torch.cuda.Event]] = deque()
        # Without pinning a copy would go through a bounce buffer and block this thread.  The memfd's pages are
        # pinned where they are, so storage process and device share them.
        _check_cuda(
            torch.cuda.cudart().cudaHostRegister(
                host.data_ptr(), host.numel() * host.element_size(), _CUDA_HOST_REGISTER_PORTABLE
            ),
            "cudaHostRegister of the host pool",
        )

    def copy_out(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        with self._issuing(op_id):
            for devices, hosts in _steps(device_pages, host_pages):
                index = self._index(devices)
                packed = self._kv.index_select(2, index).permute(2, 0, 1, 3, 4, 5).contiguous()
                for row, host in enumerate(hosts):
                    self._host[host].copy_(packed[row], non_blocking=True)

    def copy_in(self, op_id: int, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        with self._issuing(op_id):
            for devices, hosts in _steps(device_pages, host_pages):
                index = self._index(devices)
                packed = self._kv.new_empty((len(hosts), *self._host.shape[1:]))
                for row, host in enumerate(hosts):
                    packed[row].copy_(self._host[host], non_blocking=True)
                self._kv.index_copy_(2, index, packed.permute(1, 2, 0, 3, 4, 5))

    def fence(self) -> None:
        torch.cuda.current_stream(self._kv.device).wait_stream(self.stream)

    def finished(self) -> list[int]:
        done = []
        while self._pending and self._pending[0][1].query():
            done.append(self._pending.popleft()[0])
        return done

    def close(self) -> None:
        self.stream.synchronize()
        _check_cuda(torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr()), "cudaHostUnregister")
        del self._host

    def _index(self, pages: list[int]) -> Tensor:
        """Page numbers on the device, by way of pinned memory: any other way waits for the stream."""
        return torch.tensor(pages).pin_memory().to(self._kv.device, non_blocking=True)

    @contextlib.contextmanager
    def _issuing(self, op_id: int) -> Iterator[None]:
        """Make the copy stream current, behind everything computed so far, and mark the copy's end on it."""
        self.stream.wait_stream(torch.cuda.current_stream(self._kv.device))
        with torch.cuda.stream(self.stream):
            yield
        self._pending.append((op_id, self.stream.record_event()))


def _steps(device_pages: Sequence[int], host_pages: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    if len(device_pages) != len(host_pages):
        raise IntegrityError(f"{len(device_pages)} device pages against {len(host_pages)} host pages")
    for start in range(0, len(device_pages), _CUDA_STEP_PAGES):
        yield list(device_pages[start : start + _CUDA_STEP_PAGES]), list(host_pages[start : start + _CUDA_STEP_PAGES])


def _check_cuda(code: object, what: str) -> None:
    # Some versions of torch give the enum, some the number.
    if int(code) != 0:
        raise HiCacheError(f"{what} failed with CUDA error {int(code)}; is `ulimit -l` large enough for the host pool?")
