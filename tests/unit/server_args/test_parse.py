"""Single flags: names, aliases, defaults, and refusals that say what is allowed."""

import pytest

from sglang_hicache import server_args
from sglang_hicache.errors import UserError
from sglang_hicache.server_args import parse


def test_defaults_are_the_documented_ones():
    args = parse([])
    assert args.model_path == server_args.BUILTIN_MODEL_PATH
    assert (args.host, args.port, args.tp_size, args.device, args.dtype) == ("127.0.0.1", 30000, 1, "cpu", "auto")
    assert args.hicache_ratio is None
    assert args.hicache_write_policy == "write_through"
    assert args.hicache_storage_prefetch_policy == "timeout"
    assert args.hicache_storage_backend == ""
    assert args.hicache_host_memory_fraction == 0.8
    assert args.radix_eviction_policy == "lru"
    assert args.watchdog_timeout == 300


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--tp", "2"], "tp_size", 2),
        (["--tensor-parallel-size", "4"], "tp_size", 4),
        (["--enable-hicache"], "enable_hierarchical_cache", True),
        (["--model", "x"], "model_path", "x"),
        (["--chunked-prefill-size", "-1"], "chunked_prefill_size", -1),
        (["--radix-eviction-policy-config", '{"protected_threshold": 3}'],
         "radix_eviction_policy_config", {"protected_threshold": 3}),
    ],
)  # fmt: skip
def test_aliases_and_values(argv, name, value):
    assert vars(parse(argv))[name] == value


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--hicache-write-policy", "write_sometimes"], ["write_sometimes", "write_through_selective"]),
        (["--hicache-mem-layout", "layer_first"], ["layer_first", "page_first", "leave the flag out"]),
        (["--hicache-io-backend", "kernel_ascend"], ["kernel_ascend", "direct"]),
        (["--radix-eviction-policy", "tlru"], ["tlru", "slru"]),
        (["--schedule-policy", "lpm"], ["lpm", "fcfs", "priority"]),
        (["--device", "npu"], ["npu", "cuda"]),
        (["--tp", "0"], ["'0'", "from 1"]),
        (["--page-size", "big"], ["'big'", "whole number"]),
        (["--hicache-ratio", "nan"], ["'nan'", "above 0"]),
        (["--hicache-ratio", "-2"], ["'-2'", "above 0"]),
        (["--hicache-host-memory-fraction", "1.5"], ["'1.5'", "at most 1"]),
        (["--watchdog-timeout", "0"], ["'0'", "seconds"]),
        (["--radix-eviction-policy-config", "[1]"], ["[1]", "JSON object"]),
        (["--port", "70000"], ["'70000'", "65535"]),
        (["--enable-lmcache"], ["--enable-lmcache", "--help"]),
        (["--hicache-rat", "2"], ["--hicache-rat", "--help"]),
    ],
)
def test_a_refusal_names_the_value_and_what_is_allowed(argv, names):
    with pytest.raises(UserError) as caught:
        parse(argv)
    for name in names:
        assert name in str(caught.value)


def test_help_is_grouped_and_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for group in ("model:", "device pool:", "scheduler:", "prefix cache:", "host tier:", "storage tier:", "HTTP:"):
        assert f"\n{group}\n" in text
    for action in server_args._parser()._actions:
        assert action.help, f"{action.option_strings} has no help"
