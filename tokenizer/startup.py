"""What a server attaches when it starts: what its state file kept, else what its command line says.

`Startup` is made once, before the server serves.  A state file that cannot be used is set aside and told: whoever
restarts a server in the middle of the night wants it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

from sglang_hicache.config import PREFETCH_POLICIES, WRITE_POLICIES, ServerConfig, StorageConfig
from sglang_hicache.errors import HiCacheError, UserError
from sglang_hicache.extra_config import extra_config_json
from sglang_hicache.observe import learn_secrets
from sglang_hicache.storage import registry
from sglang_hicache.storage.allowed_plugins import check_plug_ins
from sglang_hicache.storage.placeholders import check_placeholders
from sglang_hicache.tokenizer.control import Control
from sglang_hicache.tokenizer.operations import Operation, State
from sglang_hicache.tokenizer.ranks_desk import new_id
from sglang_hicache.tokenizer.shown import shown_config
from sglang_hicache.tokenizer.state_file import Kept, read_blocking, set_aside_blocking
from sglang_hicache.wire import AttachStorage

log = logging.getLogger(__name__)

#: Seconds that the start waits for a storage that it can do without: most that come at all come at once.
OPTIONAL_PATIENCE_S = 5.0


class CannotStart(HiCacheError):
    """The server cannot serve what it was configured to serve."""


@dataclass(eq=False)
class Startup:
    """The storage of a start, and how its attach went."""

    #: "state file" or "command line".
    source: str
    wanted: Kept
    config: ServerConfig
    #: What was wrong with the state file.
    warning: str = ""
    attach: Operation | None = None

    @property
    def told(self) -> dict[str, Any]:
        """As GET /hicache/storage-backend shows it, beside what is live."""
        cache, wanted = self.config.cache, self.wanted
        return {
            "source": self.source,
            "backend": wanted.backend or None,
            "extra_config": shown_config(wanted.extra_config_json) if wanted.backend else None,
            "prefetch_policy": wanted.prefetch_policy or cache.prefetch_policy,
            "write_policy": wanted.write_policy or cache.write_policy,
            "optional": self.config.storage.is_optional,
            "outcome": self.attach.state.value if self.attach else None,
            "message": self.attach.message if self.attach else None,
            "warning": self.warning or None,
        }


def startup_blocking(config: ServerConfig) -> Startup:
    """What to attach."""
    storage = config.storage
    ours = Kept(backend=storage.backend, extra_config_json=storage.extra_config_json)
    kept, warning = _kept_blocking(storage)
    if kept is None:
        return Startup("command line", ours, config, warning)
    learn_secrets(kept.extra_config_json)
    log.info(
        "the state file %s of %s restores: %s", storage.state_file, kept.saved,
        f"{kept.backend} {shown_config(kept.extra_config_json)}" if kept.backend else "no storage",
    )  # fmt: skip
    if (kept.backend, kept.extra_config_json) != (ours.backend, ours.extra_config_json):
        log.warning(
            "this is not what the command line says (%s); delete the state file to go by the command line",
            ours.backend or "no storage",
        )
    return Startup("state file", kept, config)


def _kept_blocking(storage: StorageConfig) -> tuple[Kept | None, str]:
    """What the state file holds, if it can be used; and why not."""
    if not storage.state_file:
        return None, ""
    try:
        kept = read_blocking(storage.state_file)
        if kept is not None:
            _check(kept, storage)
    except UserError as error:
        warning = f"the state file {storage.state_file} is not used: {error}; {set_aside_blocking(storage.state_file)}"
        log.error("%s; the server goes by its command line", warning)
        return None, warning
    return kept, ""


def _check(kept: Kept, storage: StorageConfig) -> None:
    """It may come from another version of this server, or from somebody's editor."""
    if kept.backend:
        extra_config_json(kept.extra_config_json, below="")  # what could not have come over HTTP: too deep, a file
        learn_secrets(kept.extra_config_json)
        registry.validate_extra_config(kept.backend, kept.extra_config_json)
        check_plug_ins(kept.backend, kept.extra_config_json, storage.plug_ins)
        check_placeholders(kept.extra_config_json, storage.config_env)
    for policy, allowed in ((kept.prefetch_policy, PREFETCH_POLICIES), (kept.write_policy, WRITE_POLICIES)):
        if policy is not None and policy not in allowed:
            raise UserError(f"it has the policy {policy!r}; this server knows {', '.join(allowed)}")


async def attach_at_start(control: Control, startup: Startup) -> None:
    """Attach it the way an operator would do it later."""
    wanted, storage = startup.wanted, startup.config.storage
    if not wanted.backend:
        return
    attach = startup.attach = control.begin(
        AttachStorage(
            id=new_id(),
            deadline_s=storage.attach_timeout_s,
            backend=wanted.backend,
            extra_config_json=wanted.extra_config_json,
            prefetch_policy=wanted.prefetch_policy,
            write_policy=wanted.write_policy,
            keeps_trying=storage.is_optional,
        )
    )
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(attach.ended.wait(), OPTIONAL_PATIENCE_S if storage.is_optional else None)
    if attach.state is State.SUCCEEDED:
        log.info("storage backend %s attached: %s", wanted.backend, attach.message)
    elif storage.is_optional:
        why = attach.message or f"it has not opened within {OPTIONAL_PATIENCE_S:g} s"
        log.warning("serving without storage backend %s, which is tried again: %s", wanted.backend, why)
    else:
        raise CannotStart(
            f"storage backend {wanted.backend!r} of the {startup.source} could not be attached: {attach.message}; "
            "--hicache-storage-optional starts without it and goes on trying"
        )
