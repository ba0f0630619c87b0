"""What one server was told to do: one frozen record per room, resolved once at start.

Every field has a line saying what it means (`tests/house` reads them).  The records are msgspec
structs because the launcher hands them to its children through a pipe as msgpack: argv and the
environment are visible to other users, and two of the fields are keys.
"""

from __future__ import annotations

import msgspec

#: When pages are copied from the device to the host.
WRITE_POLICIES = ("write_back", "write_through", "write_through_selective")
#: How long a waiting request waits for its prefetch.
PREFETCH_POLICIES = ("best_effort", "wait_complete", "timeout")

class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen configuration record."""


class ModelConfig(_Record, kw_only=True):
    """Which model a rank runs, and how its arithmetic is done."""

    #: Directory that holds config.json, the tokenizer and, unless there is a weights_url, the safetensors files.
    path: str
    #: Store that the weights are streamed from, as a URL with its credentials; "": they are files in `path`.
    weights_url: str = ""
    #: The same for operators, without credentials.
    public_url: str = ""
    #: Directory that holds tokenizer.json; normally the model's.
    tokenizer_path: str
    #: Name that clients see in /v1/models.
    served_name: str
    #: "float32" or "bfloat16" ("float16" on CUDA only): dtype of weights, activations and KV.
    dtype: str
    #: "cpu" or "cuda".
    device: str = "cpu"
    #: Longest sequence (prompt + output) in tokens.
    context_length: int
    #: Bit-identical results whatever the batch, chunking and tier (model-path rules of EXACT mode).
    deterministic: bool = False
    #: Content digest of the weight files, 64 hex digits: the part of the namespace that names never replace.
    weights_digest: str = ""
    #: Seed of sampling for requests that bring none.
    random_seed: int = 0
    #: Tokens that end a text (generation_config.json, else config.json).
    eos_token_ids: tuple[int, ...] = ()
    #: Token ids are 0 .. vocab_size - 1.
    vocab_size: int = 0

    @property
    def place(self) -> str:
        """Where an operator finds the model: a folder of this run would say nothing."""
        return self.public_url or self.path

    @property
    def tokenizer_place(self) -> str:
        """The same for the tokenizer."""
        return self.place if self.tokenizer_path == self.path else self.tokenizer_path


class PoolConfig(_Record, kw_only=True):
    """Sizes of the device pool (L1) and of the host pool (L2) of one rank."""

    #: Tokens per page, in all three tiers.
    page_size: int = 64
    #: Device pool in tokens, a multiple of page_size (page 0 comes on top: it is the dummy page).
    device_tokens: int
    #: Host pool in tokens, a multiple of page_size; 0 without hierarchical cache.
    host_tokens: int = 0
    #: Bytes of keys and values of one token on one rank (the same number for all); 0: not known.
    token_bytes: int = 0


class CacheConfig(_Record, kw_only=True):
    """What the tree and the controller do with pages."""

    #: Host memory (L2) and storage (L3) are in use.
    hierarchical: bool = False
    #: False: no prefix is ever reused (--disable-radix-cache).
    reuse_prefixes: bool = True
    #: write_through, write_through_selective or write_back.
    write_policy: str = "write_through"
    #: best_effort, wait_complete or timeout.
    prefetch_policy: str = "timeout"
    #: lru, lfu, slru, priority, fifo, mru, filo.
    eviction_policy: str = "lru"
    #: slru: a node hit this often is protected.
    protected_threshold: int = 2
    #: A host hit shorter than this many tokens is recomputed rather than loaded back.
    load_back_threshold: int = 10


class StorageConfig(_Record, kw_only=True):
    """The storage to attach at start, and what attaching over HTTP may read."""

    #: Backend name, or "" for none.
    backend: str = ""
    #: Its extra config, already parsed to a JSON object and re-serialised.
    extra_config_json: str = "{}"
    #: `@path` in an extra config that arrives over HTTP is read only below this folder; "" refuses it.
    config_dir: str = ""
    #: Environment variables that an extra config may name as `${env.NAME}`.
    config_env: tuple[str, ...] = ()
    #: Plug-ins that may be loaded, each as "module:Class": those of the command line.
    plug_ins: tuple[str, ...] = ()
    #: Seconds for an attach: spawn, open and self-test on every rank.
    attach_timeout_s: float = 30.0
    #: Seconds a drain may take before the storage processes are killed.
    drain_timeout_s: float = 30.0
    #: Seconds that work under way may take to end when a change of the storage is forced.
    force_timeout_s: float = 1.0
    #: The server is ready without the storage of its start, which is tried again until it opens.
    is_optional: bool = False
    #: File that keeps what was attached over HTTP, and brings it back at the next start; "" for none.
    state_file: str = ""
    #: Seconds after which a look-up counts as a miss.
    lookup_timeout_s: float = 0.05
    #: Seconds after which a read or write that has not closed makes its storage process LOST.
    op_timeout_s: float = 30.0
    #: MiB per second and rank at which an attach uploads what device and host hold already; 0: it uploads nothing.
    upload_rate_mib: float = 64.0


class SchedulerConfig(_Record, kw_only=True):
    """Limits of one rank's scheduler."""

    #: Most requests that decode at the same time.
    max_running_requests: int = 64
    #: Most prompt tokens computed in one tick; a longer prompt is chunked.
    chunked_prefill_size: int = 2048
    #: Most requests that may wait; one more is refused with 503.
    max_queued_requests: int = 4096
    #: "fcfs" or "priority": order of the waiting queue.
    schedule_policy: str = "fcfs"
    #: Seconds without a tick while work is pending before the server is stopped.
    watchdog_timeout_s: float = 300.0
    #: Seconds in which new weights must have been read on all ranks, and the server come to rest to take them.
    weights_update_timeout_s: float = 600.0
    #: Ranks exchange state digests after every tick and the server stops at the first difference.
    check_digests: bool = False


class HttpConfig(_Record, kw_only=True):
    """Where and how the tokenizer process listens."""

    #: Address to listen on.
    host: str = "127.0.0.1"
    #: TCP port; 0 lets the system choose.
    port: int = 30000
    #: Key of ordinary routes, or "" for none.
    api_key: str = ""
    #: Key of admin routes, or "" for none.
    admin_api_key: str = ""
    #: PEM certificate chain, or "".
    ssl_certfile: str = ""
    #: PEM private key, or "".
    ssl_keyfile: str = ""
    #: A larger request body is refused with 413.
    max_body_bytes: int = 32 * 1024 * 1024
    #: File that every change of the server is written to, with who made it; "" for none.
    audit_log: str = ""
    #: cached_tokens appear in the usage of the OpenAI routes.
    cache_report: bool = False
    #: /metrics answers; without it the route says that metrics are off.
    enable_metrics: bool = False
    #: Seconds that requests in flight get to finish after SIGTERM.
    drain_timeout_s: float = 30.0


class LogConfig(_Record, kw_only=True):
    """Form and detail of the log."""

    #: "text" or "json".
    format: str = "text"
    #: debug, info, warning or error.
    level: str = "info"


class ServerConfig(_Record, kw_only=True):
    """Everything, as every process of the server gets it."""

    model: ModelConfig
    pool: PoolConfig
    cache: CacheConfig
    storage: StorageConfig
    scheduler: SchedulerConfig
    http: HttpConfig
    log: LogConfig = LogConfig()
    #: Tensor-parallel size: number of ranks.
    tp_size: int = 1
    #: Private folder (0700) of this run: sockets and the process group's rendezvous file.
    run_dir: str
