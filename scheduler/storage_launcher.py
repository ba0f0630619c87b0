"""Starts the storage processes of one rank, and knows what the pages of its present weights are called.

Called by the storage driver and the probes, on the scheduler thread.  Here an extra config gets the values of this node
(`storage/placeholders.py`): everywhere above it is the same text on all ranks.
"""

from __future__ import annotations

import os
import socket

import msgspec

from sglang_hicache import wire
from sglang_hicache.cache.page import namespace
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.config import ServerConfig
from sglang_hicache.errors import UserError
from sglang_hicache.observe import learn_secrets, learn_variables
from sglang_hicache.storage.allowed_plugins import check_plug_ins
from sglang_hicache.storage.attachment_events import Spawn
from sglang_hicache.storage.placeholders import Node, resolved
from sglang_hicache.workers.batch import KVLayout
from sglang_hicache.workers.storage_client import StorageClient


class StorageLauncher:
    """`launcher(spawn)` is the process of one epoch."""

    def __init__(
        self, config: ServerConfig, rank: int, layout: KVLayout, host: HostPool | None, node: Node | None = None
    ) -> None:
        self._config = config
        self._rank = rank
        self._node = node or this_node(rank)
        self._layout = layout
        self._host = host
        self._namespace = self.name_pages(layout, config.model.weights_digest)

    def name_pages(self, layout: KVLayout, weights_digest: str) -> str:
        """The namespace of pages that these weights compute; that of every process started from now on."""
        self._layout = layout
        self._namespace = namespace(
            weights_digest=weights_digest,
            architecture=layout.architecture,
            layers=layout.layers,
            kv_heads_total=layout.kv_heads_total,
            head_dim=layout.head_dim,
            kv_dtype=layout.dtype,
            page_size=layout.page_size,
            numerics_class=layout.numerics_class,
        )
        return self._namespace

    def __call__(self, spawn: Spawn) -> StorageClient:
        """Start this rank's storage process of one epoch."""
        host = self._host
        assert host is not None, "the core refuses an attach without hierarchical cache"
        opened = self._open(spawn.epoch, spawn.backend, spawn.extra_config_json)
        return StorageClient(msgspec.structs.replace(opened, host_pages=host.pages), host.fd, self._config.run_dir)

    def dry_run(self, number: int, backend: str, extra_config_json: str) -> StorageClient:
        """Start a process that tries a backend out, by a number of its own, and says what it has found."""
        opened = self._open(number, backend, extra_config_json)
        return StorageClient(msgspec.structs.replace(opened, is_dry_run=True), None, self._config.run_dir)

    def _open(self, epoch: int, backend: str, extra_config_json: str) -> wire.OpenBackend:
        config, layout = self._config, self._layout
        # Judged where the command came in.  Here is the one door to a process that loads it, whoever sent it.
        check_plug_ins(backend, extra_config_json, config.storage.plug_ins)
        extra_config_json, used = resolved(extra_config_json, self._node, config.storage.config_env)
        learn_secrets(extra_config_json)
        learn_variables(used)
        return wire.OpenBackend(
            rank=self._rank,
            epoch=epoch,
            backend=backend,
            extra_config_json=extra_config_json,
            environment=used,
            namespace=self._namespace,
            head_start=layout.head_start,
            head_end=layout.head_end,
            writes=layout.writes,
            page_bytes=layout.page_bytes,
            host_pages=0,
            tp_size=config.tp_size,
            model_name=config.model.served_name,
            log_format=config.log.format,
            log_level=config.log.level,
        )


def this_node(rank: int) -> Node:
    """Where this process runs."""
    return Node(rank, socket.gethostname(), _address, os.environ)


def _address() -> str:
    """This machine's own, as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: the kernel only chooses the way out.  The address belongs to nobody (RFC 5737).
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError as error:
            raise UserError(
                f"${{node.ip}}: this machine has no way out, so no address ({error}); use ${{node.hostname}} instead"
            ) from error
