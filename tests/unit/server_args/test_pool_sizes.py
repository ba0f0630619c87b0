"""Sizes of the pools against the memory of the machine and of its control groups."""

import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.host_memory import host_memory
from sglang_hicache.pool_sizes import DEFAULT_CPU_TOKENS, Memory
from tests.unit.server_args.conftest import GIB, TOKEN_BYTES


def memory(size_bytes: int, bound: str = "the memory limit of control group /g") -> Memory:
    return Memory(size_bytes, bound)


def test_defaults_on_a_large_machine(resolved):
    found = resolved("--enable-hicache")
    assert found.config.pool.device_tokens == DEFAULT_CPU_TOKENS
    # size // page + 1 pages, as clients of the reference expect
    assert found.config.pool.host_tokens == 2 * DEFAULT_CPU_TOKENS + 64
    assert not any("--hicache-ratio" in rewrite for rewrite in found.rewrites)


def test_no_host_pool_without_hierarchical_cache(resolved):
    assert resolved().config.pool.host_tokens == 0


def test_fm28_host_pool_shrinks_to_the_limit_of_the_control_group_and_says_why(resolved):
    limit = 160 * 1024 * 1024
    found = resolved("--enable-hicache", memory=memory(limit))
    pool = found.config.pool
    assert pool.device_tokens == DEFAULT_CPU_TOKENS
    used = (pool.device_tokens + pool.host_tokens) * TOKEN_BYTES
    assert 0 < pool.host_tokens < 2 * DEFAULT_CPU_TOKENS
    assert used < limit
    assert pool.host_tokens % 64 == 0
    told = [rewrite for rewrite in found.rewrites if "--hicache-ratio" in rewrite]
    assert len(told) == 1
    assert "the memory limit of control group /g" in told[0]
    assert str(pool.host_tokens) in told[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_fm28_all_ranks_together_fit(resolved, ranks):
    """Every rank sees the same limit: they share it, instead of each taking all of it."""
    limit = 100 * 1024 * 1024
    pool = resolved("--enable-hicache", "--tp", str(ranks), memory=memory(limit)).config.pool
    rank_token_bytes = TOKEN_BYTES // ranks
    assert (pool.device_tokens + pool.host_tokens) * rank_token_bytes * ranks < limit


@pytest.mark.parametrize("flag", [["--hicache-ratio", "4"], ["--hicache-size", "1"]])
def test_fm28_an_explicit_size_that_does_not_fit_is_an_error(resolved, flag):
    with pytest.raises(UserError) as caught:
        resolved("--enable-hicache", *flag, memory=memory(200 * 1024 * 1024))
    assert flag[0] in str(caught.value)
    assert "control group /g" in str(caught.value)


def test_explicit_sizes(resolved):
    assert (
        resolved("--enable-hicache", "--hicache-ratio", "0.5").config.pool.host_tokens == DEFAULT_CPU_TOKENS // 2 + 64
    )
    tokens = resolved("--enable-hicache", "--hicache-size", "1", "--hicache-ratio", "3").config.pool.host_tokens
    assert tokens == (1_000_000_000 // TOKEN_BYTES // 64 + 1) * 64


def test_the_device_pool_is_whole_pages(resolved):
    found = resolved("--max-total-tokens", "1000")
    assert found.config.pool.device_tokens == 960
    assert any("--max-total-tokens 1000: 960" in rewrite for rewrite in found.rewrites)
    assert resolved("--max-total-tokens", "10").config.pool.device_tokens == 256


def test_the_device_pool_shrinks_with_the_memory_and_has_an_end(resolved):
    found = resolved(memory=memory(32 * 1024 * 1024))
    assert found.config.pool.device_tokens * TOKEN_BYTES <= 16 * 1024 * 1024
    assert any("half of the memory limit" in rewrite for rewrite in found.rewrites)
    with pytest.raises(UserError, match="no room for a device pool"):
        resolved(memory=memory(100 * 1024))
    with pytest.raises(UserError, match="--max-total-tokens 1000000 needs"):
        resolved("--max-total-tokens", "1000000", memory=memory(GIB // 2))


def test_cuda_sizes_come_from_the_device(resolved):
    found = resolved("--device", "cuda", "--enable-hicache", memory=Memory(64 * GIB, "m", device_bytes=4 * GIB))
    tokens = found.config.pool.device_tokens
    assert tokens == int((4 * GIB * 0.85 - GIB - 7) // TOKEN_BYTES) // 64 * 64
    assert found.config.pool.host_tokens == 2 * tokens + 64


# ---- the reader of control groups, over a fake root


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    return tmp_path


def v2(root, folder, limit, usage, inactive=0):
    write(root, f"sys/fs/cgroup{folder}/memory.max", f"{limit}\n")
    write(root, f"sys/fs/cgroup{folder}/memory.current", f"{usage}\n")
    write(root, f"sys/fs/cgroup{folder}/memory.stat", f"anon 5\ninactive_file {inactive}\n")


def test_without_a_limit_the_machine_bounds(root):
    write(root, "proc/self/cgroup", "0::/user.slice/me\n")
    v2(root, "/user.slice/me", "max", 5)
    found = host_memory(str(root))
    assert (found.available_bytes, found.bound) == (8 * GIB, "the machine's available memory")


def test_a_limit_less_what_is_used_and_plus_what_can_be_reclaimed(root):
    write(root, "proc/self/cgroup", "0::/pod/app\n")
    v2(root, "/pod/app", 2 * GIB, GIB, inactive=GIB // 4)
    found = host_memory(str(root))
    assert found.available_bytes == GIB + GIB // 4
    assert "sys/fs/cgroup/pod/app" in found.bound


def test_the_tightest_group_on_the_way_up_counts(root):
    write(root, "proc/self/cgroup", "0::/pod/app\n")
    v2(root, "/pod/app", 6 * GIB, 0)
    v2(root, "/pod", GIB, GIB // 2)
    assert host_memory(str(root)).available_bytes == GIB // 2


def test_inside_a_container_the_group_is_the_top_of_the_mount(root):
    """/proc/self/cgroup may name the host's path, which does not exist in here."""
    write(root, "proc/self/cgroup", "0::/host/path/of/pod\n")
    v2(root, "", GIB, 0)
    assert host_memory(str(root)).available_bytes == GIB


def test_version_one(root):
    write(root, "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/box\n0::/\n")
    for name, value in (("limit_in_bytes", 3 * GIB), ("usage_in_bytes", GIB)):
        write(root, f"sys/fs/cgroup/memory/box/memory.{name}", f"{value}\n")
    write(root, "sys/fs/cgroup/memory/box/memory.stat", "inactive_file 1\ntotal_inactive_file 4096\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    write(root, "sys/fs/cgroup/memory/memory.stat", "total_inactive_file 0\n")
    assert host_memory(str(root)).available_bytes == 2 * GIB + 4096
