"""Slot allocators and the memory of the host pool."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.pools import HostPool, PageAllocator
from sglang_hicache.errors import IntegrityError, UserError


def device(pages: int = 8) -> PageAllocator:
    return PageAllocator("device", pages, StateDigest(), first=1)


def test_a_fresh_pool_hands_out_ascending_pages_from_its_first():
    assert device().alloc(3) == [1, 2, 3]


def test_freed_pages_come_back_first_and_in_the_same_order():
    pool = device()
    pool.alloc(2)
    pages = pool.alloc(3)
    pool.free(pages)
    assert pool.alloc(3) == pages


def test_all_or_nothing():
    pool = device(4)
    assert pool.alloc(5) is None
    assert (pool.free_count, pool.used_count, pool.total) == (4, 0, 4)
    assert pool.alloc(4) == [1, 2, 3, 4]
    assert pool.alloc(1) is None
    assert pool.alloc(0) == []


def test_fm21_double_free_is_a_defect():
    pool = device()
    pages = pool.alloc(2)
    pool.free(pages)
    with pytest.raises(IntegrityError, match="page 1 was freed twice"):
        pool.free(pages)


def test_fm21_a_page_twice_in_one_call_is_a_defect():
    pool = device()
    (page,) = pool.alloc(1)
    with pytest.raises(IntegrityError, match="freed twice"):
        pool.free([page, page])


@pytest.mark.parametrize("page", [0, 9, -1])
def test_a_foreign_page_is_a_defect(page):
    with pytest.raises(IntegrityError, match="device pool"):
        device().free([page])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_free_and_used_always_make_the_total(steps):
    pool = PageAllocator("host", 12, StateDigest())
    held: list[list[int]] = []
    for wants, count in steps:
        if wants:
            pages = pool.alloc(count)
            if pages is not None:
                held.append(pages)
        elif held:
            pool.free(held.pop(count % len(held)))
        flat = sorted(page for pages in held for page in pages)
        assert flat == pool.used_pages()
        assert len(set(flat)) == len(flat) == pool.used_count
        assert pool.free_count + pool.used_count == pool.total


def test_digest_tells_histories_apart():
    one, other = StateDigest(), StateDigest()
    PageAllocator("device", 8, one).alloc(2)
    PageAllocator("device", 8, other).alloc(3)
    assert one.value != other.value


def test_digest_is_the_same_in_every_interpreter():
    script = "from sglang_hicache.cache.digest import StateDigest as D; d = D(); d.mix(1, -1, 2**70); print(d.value)"
    values = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(values) == 1


def open_pools() -> int:
    """Descriptors of anonymous memory: others come and go with the threads of sockets that earlier tests closed."""
    return sum("/memfd:" in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_host_pool_has_the_size_asked_for():
    with HostPool(3, 5000) as pool:
        assert len(pool.buffer) == 15000 <= os.fstat(pool.fd).st_size
        pool.page(2)[:] = b"x" * 5000
        assert bytes(pool.buffer[9999:10001]) == b"\0x"


@pytest.mark.parametrize("index", [-1, 3])
def test_host_pool_refuses_foreign_pages(index):
    with HostPool(3, 64) as pool, pytest.raises(IntegrityError):
        pool.page(index)


@pytest.mark.parametrize(("pages", "page_bytes"), [(0, 64), (4, 0)])
def test_an_empty_host_pool_is_refused(pages, page_bytes):
    with pytest.raises(UserError):
        HostPool(pages, page_bytes)


def test_attached_pool_sees_the_same_bytes():
    with HostPool(4, 64) as mine, HostPool.attach(os.dup(mine.fd), 4, 64) as theirs:
        theirs.page(3)[:] = b"y" * 64
        assert bytes(mine.page(3)) == b"y" * 64


def test_attach_refuses_a_file_that_is_too_small():
    before = open_pools()
    fd = os.memfd_create("small")
    os.ftruncate(fd, 64)
    with pytest.raises(IntegrityError, match="has 64"):
        HostPool.attach(fd, 2, 64)
    assert open_pools() == before


def test_prefault_touches_everything_and_tells_progress():
    steps: list[tuple[int, int]] = []
    with HostPool(8, 1 << 20) as pool:
        pool.prefault(lambda done, total: steps.append((done, total)))
        assert steps[-1][0] == steps[-1][1] >= 8 << 20
        assert os.fstat(pool.fd).st_blocks * 512 >= 8 << 20


def test_descriptor_is_closed_on_exec():
    with HostPool(1, 64) as pool:
        assert not os.get_inheritable(pool.fd)


def test_closing_with_a_live_view_is_a_defect_and_can_be_repeated():
    pool = HostPool(2, 64)
    view = pool.page(0)
    with pytest.raises(IntegrityError, match="views"):
        pool.close()
    view.release()
    pool.close()
    pool.close()


def test_pools_leak_no_descriptors():
    before = open_pools()
    for _ in range(50):
        HostPool(2, 4096).close()
    assert open_pools() == before


def test_fm22_ten_thousand_cycles_leave_memory_flat():
    """Views of freed pages once kept old storage alive, and the process grew with every cycle."""
    with HostPool(64, 4096) as pool:
        allocator = PageAllocator("host", 64, StateDigest())

        def cycles(count: int) -> None:
            for step in range(count):
                pages = allocator.alloc(1 + step % 64)
                for page in pages:
                    pool.page(page)[:8] = b"12345678"
                allocator.free(pages)

        cycles(500)
        before = resident_bytes()
        cycles(10_000)
        assert resident_bytes() - before < 1 << 20
