"""The command line: flags, their defaults, and what a single flag may hold.

Used by `launch_server` and by tests.  What depends on the model, the machine or on several flags together is decided
in `resolve.py`.  A flag that this server has is refused by name when its value is not supported; a flag that it does
not have is refused as unknown, never ignored.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from sglang_hicache.config import PREFETCH_POLICIES, WRITE_POLICIES
from sglang_hicache.errors import UserError

BUILTIN_MODEL_PATH = str(Path(__file__).parent / "builtin_model")

API_KEY_ENV = "SGLANG_HICACHE_API_KEY"
ADMIN_API_KEY_ENV = "SGLANG_HICACHE_ADMIN_API_KEY"

_DAY_S = 86_400


class _Parser(argparse.ArgumentParser):
    """Refuses by exception, so that a refusal looks alike wherever it is found."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists every flag)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags as given; a mistake in a single flag is a UserError."""
    return _parser().parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sglang_hicache.launch_server",
        description="Serve a language model whose KV cache lives in three tiers: device, host memory, storage. "
        "The storage can be attached and detached while the server runs.",
        usage="%(prog)s [FLAG ...]",
        allow_abbrev=False,
    )
    for add_group in (_model, _pools, _scheduler, _cache, _hicache, _storage, _http, _run):
        add_group(parser)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model-path", "--model", default=BUILTIN_MODEL_PATH, metavar="DIR|HUB_ID|URL",
        help="Hugging Face directory, hub id, or file://, redis:// or s3:// URL of a saved model, which may have "
        "${env.NAME} for a password; default: the small model that comes with this package")  # fmt: skip
    add("--tokenizer-path", metavar="DIR|HUB_ID", help="where tokenizer.json is; default: the model's directory")
    add("--served-model-name", metavar="NAME", help="name in /v1/models; default: the model's directory name")
    add("--dtype", default="auto", choices=("auto", "float32", "float", "bfloat16", "float16", "half"),
        help="of weights, activations and KV; auto: the checkpoint's")  # fmt: skip
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where the model runs (default: cpu)")
    add("--tp-size", "--tensor-parallel-size", "--tp", type=_whole(1, 1024), default=1, metavar="N",
        help="tensor-parallel ranks, one process each (default: 1)")  # fmt: skip
    add("--context-length", type=_whole(1), metavar="TOKENS",
        help="longest prompt plus output; default and limit: the model's positions")  # fmt: skip
    add("--random-seed", type=_whole(0, 2**63 - 1), default=0, metavar="N",
        help="seed of sampling for requests that bring none (default: 0)")  # fmt: skip
    add("--enable-deterministic-inference", action="store_true",
        help="bit-identical results whatever the batch, the chunks and the tier of a prefix (slower)")  # fmt: skip


def _pools(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("device pool").add_argument
    add("--page-size", type=_whole(1, 4096), default=64, metavar="TOKENS",
        help="tokens per page, the unit of all three tiers (default: 64)")  # fmt: skip
    add("--max-total-tokens", type=_whole(1), metavar="TOKENS",
        help="tokens in the device pool; default on CPU: 65536, or what half of the free memory holds; "
        "on CUDA: see --mem-fraction-static")  # fmt: skip
    add("--mem-fraction-static", type=_share, default=0.85, metavar="SHARE",
        help="CUDA: share of the free device memory that weights and device pool may take (default: 0.85)")  # fmt: skip


def _scheduler(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scheduler").add_argument
    add("--max-running-requests", type=_whole(1, 65536), default=64, metavar="N",
        help="requests that decode at the same time (default: 64)")  # fmt: skip
    add("--max-queued-requests", type=_whole(1), default=4096, metavar="N",
        help="requests that may wait; one more is refused (default: 4096)")  # fmt: skip
    add("--chunked-prefill-size", type=_whole(-1), default=2048, metavar="TOKENS",
        help="prompt tokens computed in one tick; -1: prompts are not chunked (default: 2048)")  # fmt: skip
    add("--schedule-policy", default="fcfs", choices=("fcfs", "priority"),
        help="order of the waiting requests (default: fcfs)")  # fmt: skip
    add("--watchdog-timeout", type=_seconds, default=300.0, metavar="SECONDS",
        help="work without any progress for this long: log all stacks and exit (default: 300)")  # fmt: skip
    add("--weights-update-timeout", type=_seconds, default=600.0, metavar="SECONDS",
        help="to read new weights on every rank and let running requests finish (default: 600)")  # fmt: skip
    add("--check-rank-digests", action="store_true",
        help="debug: ranks compare their state after every tick; the first difference stops the server")  # fmt: skip


def _cache(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prefix cache").add_argument
    add("--disable-radix-cache", action="store_true", help="never reuse a prefix")
    add("--radix-eviction-policy", default="lru",
        choices=("lru", "lfu", "slru", "priority", "fifo", "mru", "filo"),
        help="who leaves a full pool first (default: lru)")  # fmt: skip
    add("--radix-eviction-policy-config", type=_json_object, default={}, metavar="JSON",
        help='slru: {"protected_threshold": N}, hits that protect a node (default: 2)')  # fmt: skip
    add("--enable-cache-report", action="store_true", help="cached tokens in the usage of the OpenAI routes")


def _hicache(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("host tier").add_argument
    add("--enable-hierarchical-cache", "--enable-hicache", action="store_true",
        help="keep evicted pages in host memory; needed for storage")  # fmt: skip
    add("--hicache-ratio", type=_positive, metavar="RATIO",
        help="host pool as a multiple of the device pool; default: 2.0, less if memory is short")  # fmt: skip
    add("--hicache-size", type=_whole(0), default=0, metavar="GB",
        help="host pool of one rank in GB (1e9 bytes); overrides the ratio (default: 0, use the ratio)")  # fmt: skip
    add("--hicache-host-memory-fraction", type=_share, default=0.8, metavar="SHARE",
        help="share of the available host memory that the default ratio may take (default: 0.8)")  # fmt: skip
    add("--hicache-write-policy", default="write_through",
        choices=WRITE_POLICIES,
        help="when a page is copied to the host (default: write_through)")  # fmt: skip
    add("--hicache-io-backend", default="kernel", choices=("kernel", "direct"),
        help="accepted for compatibility; both mean the one way in which pages are copied here")  # fmt: skip
    add("--hicache-mem-layout", type=_mem_layout, default="page_first", metavar="page_first",
        help="order of bytes in a host page; page_first is the only one here")  # fmt: skip


def _storage(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "storage tier", "Attached at start; over HTTP it can be attached and detached at any time."
    )
    add = group.add_argument
    add("--hicache-storage-backend", default="", metavar="NAME",
        help="file, redis, s3, mooncake, tiered, mirror, dynamic, memory; an unknown name is refused with "
        "all that there are")  # fmt: skip
    add("--hicache-storage-prefetch-policy", default="timeout",
        choices=PREFETCH_POLICIES,
        help="how long a request waits for its prefix from storage (default: timeout)")  # fmt: skip
    add("--hicache-storage-backend-extra-config", metavar="JSON|@FILE",
        help="settings of the backend: one JSON object, or @file.json, .toml, .yaml")  # fmt: skip
    add("--file-storage-path", metavar="DIR", help="folder of the file backend (its setting file_storage_path)")
    add("--hicache-config-dir", default="", metavar="DIR",
        help="over HTTP, @file is read only below this folder; default: not at all")  # fmt: skip
    add("--hicache-config-env", default="", metavar="NAME,NAME",
        help="variables that an extra config may use as ${env.NAME} (default: none)")  # fmt: skip
    add("--hicache-allow-dynamic-backend", action="append", default=[], metavar="MODULE:CLASS",
        help="a plug-in that may be attached over HTTP, or a name that SGLang has for one; may be given repeatedly "
        "(default: only what is attached at start)")  # fmt: skip
    add("--hicache-storage-optional", action="store_true",
        help="serve without the storage of the start if it does not open, and go on trying")  # fmt: skip
    add("--hicache-state-file", default="", metavar="FILE",
        help="keeps what was attached over HTTP; at the next start it wins over --hicache-storage-backend")  # fmt: skip
    add("--hicache-storage-attach-timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="to start, open and test the storage on every rank (default: 30)")  # fmt: skip
    add("--hicache-storage-drain-timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="for running storage operations when detaching (default: 30)")  # fmt: skip
    add("--hicache-force-timeout", type=_seconds, default=1.0, metavar="SECONDS",
        help="the same for a forced change (default: 1)")  # fmt: skip
    add("--hicache-storage-lookup-timeout", type=_seconds, default=0.05, metavar="SECONDS",
        help="a look-up that takes longer counts as a miss (default: 0.05)")  # fmt: skip
    add("--hicache-storage-op-timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="a read or write that takes longer means that the storage is lost (default: 30)")  # fmt: skip
    add("--hicache-upload-rate", type=_rate, default=64.0, metavar="MIB_PER_S",
        help="at which an attach uploads, on each rank and in the background, what device and host hold already; "
        "0: it uploads nothing (default: 64)")  # fmt: skip


def _http(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "HTTP", "A key on the command line is visible to every user of the machine; prefer a file or the environment."
    )
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=_whole(0, 65535), default=30000, metavar="N", help="0: any free port (default: 30000)")
    for name, env, use in (("api", API_KEY_ENV, "ordinary"), ("admin-api", ADMIN_API_KEY_ENV, "admin")):
        add(f"--{name}-key", metavar="KEY", help=f"key of the {use} routes; or the environment's {env}")
        add(f"--{name}-key-file", metavar="FILE", help=f"file that holds the key of the {use} routes")
    add("--ssl-certfile", default="", metavar="PEM", help="certificate chain; with --ssl-keyfile: HTTPS")
    add("--ssl-keyfile", default="", metavar="PEM", help="private key of the certificate")
    add("--enable-metrics", action="store_true",
        help="GET /metrics, for Prometheus: it needs no key and shows no secret")  # fmt: skip
    add("--hicache-audit-log", default="", metavar="FILE",
        help="who changed what and when, in lines that nobody changes unnoticed; its key: FILE.key")  # fmt: skip
    add("--max-body-bytes", type=_whole(1), default=32 * 1024 * 1024, metavar="N",
        help="a larger request body is refused with 413 (default: 33554432, 32 MiB)")  # fmt: skip
    add("--shutdown-drain-timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="for running requests after SIGTERM (default: 30)")  # fmt: skip


def _run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("log").add_argument
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"),
        help="least severe messages to log (default: info)")  # fmt: skip
    add("--log-format", default="text", choices=("text", "json"), help="(default: text)")


# ---- what one flag may hold


def _whole(least: int, most: int = 2**40) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return value

    return parse


def _number(text: str, least: float, most: float, allowed: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least < value <= most:  # false for nan as well
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return value


def _seconds(text: str) -> float:
    return _number(text, 0, _DAY_S, f"a number of seconds above 0, at most {_DAY_S}")


def _rate(text: str) -> float:
    return 0.0 if text == "0" else _number(text, 0, 1e6, "a number of MiB per second up to 1000000, or 0")


def _share(text: str) -> float:
    return _number(text, 0, 1, "a share above 0, at most 1")


def _positive(text: str) -> float:
    return _number(text, 0, 1e6, "a number above 0, at most 1000000")


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object like {{}}")
    return value


def _mem_layout(text: str) -> str:
    if text != "page_first":
        raise argparse.ArgumentTypeError(
            f"{text!r} is not supported: host pages are always 'page_first' here; leave the flag out"
        )
    return text
