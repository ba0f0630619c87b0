"""What the launcher puts into the environment of CPU ranks."""

from __future__ import annotations

import pytest

from sglang_hicache.cpu_environment import cpu_environment


@pytest.mark.parametrize(
    ("tp_size", "cores", "threads"), [(1, 2, "2"), (2, 2, "1"), (4, 2, "1"), (2, 16, "8"), (4, 6, "1")]
)
def test_ranks_share_the_cores(tp_size, cores, threads):
    environment = cpu_environment(tp_size, cores)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == threads
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert all(isinstance(value, str) for value in environment.values())


def test_strict_products_only_where_they_are_promised():
    assert cpu_environment(2, 4, deterministic=True)["MKL_CBWR"] == "AUTO,STRICT"
    assert "MKL_CBWR" not in cpu_environment(2, 4)
