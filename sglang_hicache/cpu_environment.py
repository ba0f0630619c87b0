"""The environment that the ranks of a CPU server need: read by their libraries as they load, too late to set then.

Called by the launcher before it starts the ranks; pure.
"""

from __future__ import annotations


def cpu_environment(tp_size: int, cores: int, *, deterministic: bool = False) -> dict[str, str]:
    """Variables for the environment of `tp_size` ranks on `cores` cores; the operator's own settings win."""
    threads = str(max(1, cores // tp_size))
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # A waiting OpenMP thread spins by default.  With more busy processes than cores it then takes the core
        # from the thread it waits for: a step of 250 ms became one of 1,000 ms.
        "OMP_WAIT_POLICY": "PASSIVE",
        # glibc gives large temporaries back to the kernel when they are freed, and every step takes the page
        # faults again (a decode step of 5 ms became one of 13-25 ms).  Keep them: 4 GiB and 16 GiB are "never".
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        # gloo listens on the address of the host name, without any authentication, and fails where that name
        # does not resolve.  All ranks are on this machine.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if deterministic:
        # MKL picks its kernel, and how threads cut a product, by the number of rows: a row's last bits depend on
        # how many others there are, with two threads whatever the padding.  Its strict reproducible mode keeps
        # the order of additions fixed; on Intel's CPUs it costs next to nothing.
        environment["MKL_CBWR"] = "AUTO,STRICT"
    return environment
