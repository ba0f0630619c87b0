"""What an operator has attached over HTTP, kept in a file so that a restart brings it back.

Belongs to the event loop of the tokenizer process; a helper thread writes.  The file says what was wanted, not what
there is: what fault tolerance does by itself, the attach of the command line and the detach of a shutdown are none of
its business.  It holds the extra config as it was given, so it is for nobody else's eyes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path

import msgspec

from sglang_hicache.audit import utc
from sglang_hicache.errors import UserError
from sglang_hicache.private_file import NotPrivate, read_private_blocking, write_private_blocking
from sglang_hicache.wire import AttachStorage, DetachStorage, StorageNews

log = logging.getLogger(__name__)

#: More than any state file has.
_MOST_BYTES = 1 << 20

#: Seconds between two tries to write.
RETRY_S = 5.0

#: Seconds that the answer to a change waits for the file.
SETTLE_S = 0.5


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of the file."""

    #: Of this form.  A server that does not know it sets the file aside.
    version: int = 1
    #: "": detached.
    backend: str
    extra_config_json: str = "{}"
    #: None: what the command line says.
    prefetch_policy: str | None = None
    write_policy: str | None = None
    #: When it was written, for people.
    saved: str = ""


def read_blocking(path: str) -> Kept | None:
    """What was kept; None: nothing yet.  UserError: it cannot be used."""
    if not Path(path).exists():
        return None
    try:
        kept = msgspec.json.decode(read_private_blocking(path, _MOST_BYTES), type=Kept)
    except NotPrivate as error:
        raise UserError(f"it {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Without the reason: it may quote what is inside.
        raise UserError("it is damaged, or no state file of this server") from None
    if kept.version != 1:
        raise UserError(f"it has version {kept.version}, and this server knows version 1")
    return kept


def set_aside_blocking(path: str) -> str:
    """Move a file that cannot be used out of the way; its new name, or why it is where it was."""
    aside = Path(f"{path}.unusable-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        Path(path).rename(aside)
    except OSError as error:
        return f"it cannot be moved away ({error.strerror})"
    return f"it is {aside} now"


class StateFile:
    """Writes the file, the newest state only, whenever it changes."""

    def __init__(self, path: str, wanted: Kept) -> None:
        self._path = Path(path)
        #: What an operator wants: that of the start, until he says something else.
        self._kept = wanted
        self._writing: asyncio.Task[None] | None = None
        #: There is something newer than what is being written.
        self._is_stale = asyncio.Event()
        #: Why the newest state is not in the file; "" when it is.
        self.error = ""

    def __repr__(self) -> str:
        return f"<StateFile {self._path} {self._kept.backend!r} {self.error}>"

    def news(self, news: StorageNews) -> None:
        """A command over HTTP has attached something else than before, or detached it."""
        self._keep(backend=news.after, extra_config_json=news.extra_config_json or "{}")

    def succeeded(self, order: AttachStorage | DetachStorage, *, made_news: bool) -> None:
        """A command over HTTP has succeeded: it may have changed policies only, or have ended what was off already.

        What is attached may be another store meanwhile: a standby, or that of a later command whose news came first.
        """
        if isinstance(order, AttachStorage):
            given = {"prefetch_policy": order.prefetch_policy, "write_policy": order.write_policy}
            self._keep(**{name: policy for name, policy in given.items() if policy is not None})
        elif not made_news:
            self._keep(backend="", extra_config_json="{}")

    async def settled(self) -> None:
        """The file says what was kept, or does not take it."""
        if self._writing is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._writing), SETTLE_S)

    async def close(self) -> None:
        """Whoever stops the server has waited for its changes."""
        await self.settled()
        if self._writing is not None:
            self._writing.cancel()

    def _keep(self, **changes: str) -> None:
        self._kept = msgspec.structs.replace(self._kept, **changes, saved=utc(time.time()))
        self._is_stale.set()
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while self._is_stale.is_set():
            self._is_stale.clear()
            content = msgspec.json.format(msgspec.json.encode(self._kept), indent=2) + b"\n"
            try:
                await asyncio.to_thread(write_private_blocking, self._path, content)
            except OSError as error:
                self._failed(error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._is_stale.wait(), RETRY_S)
                self._is_stale.set()
            else:
                self.error = ""

    def _failed(self, error: OSError) -> None:
        failure = f"cannot be written: {error.strerror or error}"
        if failure != self.error:
            log.error("the state file %s %s; a restart would not bring back what is attached now", self._path, failure)
        self.error = failure
