"""From the body of an admin route to the command that the ranks get.

Pure, but for files that an extra config names.  Whatever can be judged without the ranks is refused here, in words that
say what to send instead: a command that reaches them is one that makes sense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

from sglang_hicache.config import PREFETCH_POLICIES, WRITE_POLICIES, StorageConfig
from sglang_hicache.errors import UserError
from sglang_hicache.extra_config import LARGEST_FILE_BYTES, extra_config_json
from sglang_hicache.observe import learn_secrets
from sglang_hicache.storage import registry
from sglang_hicache.storage.allowed_plugins import check_plug_ins
from sglang_hicache.storage.placeholders import check_placeholders
from sglang_hicache.tokenizer.api import AttachBody, DetachBody, MalformedBody, decode_body
from sglang_hicache.tokenizer.ranks_desk import new_id
from sglang_hicache.tokenizer.shown import shown_config
from sglang_hicache.wire import AttachStorage, DetachStorage, DryRunStorage, Mode

MODES: tuple[Mode, ...] = get_args(Mode)

#: Longest time that a caller may ask for.
LONGEST_TIMEOUT_S = 3600.0


def attach_order(body: AttachBody, storage: StorageConfig) -> AttachStorage | DryRunStorage:
    """PUT /hicache/storage-backend."""
    check_choice("hicache_storage_prefetch_policy", body.hicache_storage_prefetch_policy, PREFETCH_POLICIES)
    check_choice("hicache_write_policy", body.hicache_write_policy, WRITE_POLICIES)
    mode = _mode(body.mode, body.force)
    _check_timeout(body.timeout_s)
    if not body.dry_run:
        _check_waits(body.timeout_s, mode)
    config = _extra_config(body, storage)
    if body.dry_run:
        return DryRunStorage(
            id=new_id(),
            deadline_s=body.timeout_s or storage.attach_timeout_s,
            backend=body.hicache_storage_backend,
            extra_config_json=config or "{}",
        )
    return AttachStorage(
        id=new_id(),
        deadline_s=storage.attach_timeout_s,
        backend=body.hicache_storage_backend,
        extra_config_json=config,
        prefetch_policy=body.hicache_storage_prefetch_policy,
        write_policy=body.hicache_write_policy,
        mode=mode,
        switch=body.switch,
        drain_s=_drain_s(body.timeout_s, mode, storage),
    )


def detach_order(body: DetachBody, storage: StorageConfig) -> DetachStorage:
    """DELETE /hicache/storage-backend."""
    mode = _mode(body.mode, body.force)
    _check_timeout(body.timeout_s)
    _check_waits(body.timeout_s, mode)
    return DetachStorage(id=new_id(), deadline_s=_drain_s(body.timeout_s, mode, storage), mode=mode)


def detach_body(query: Mapping[str, str], data: bytes) -> DetachBody:
    """What a DELETE says in its query, or, as many clients can only do the one or the other, in a JSON body."""
    given = {name: query[name] for name in DetachBody.__struct_encode_fields__ if name in query}
    if not given:
        return decode_body(data, DetachBody)
    if data.strip():
        raise MalformedBody(f"{', '.join(given)} in the query, and a body as well; send one of the two")
    seconds = number("timeout_s", given["timeout_s"]) if "timeout_s" in given else None
    return DetachBody(
        mode=given.get("mode"),
        timeout_s=seconds,
        force=flag("force", given.get("force", "false")),
        is_async=flag("async", given.get("async", "false")),
    )


def check_choice(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is none of those."""
    if value is not None and value not in allowed:
        raise UserError(f"Invalid {name} {value!r}; it must be one of: {', '.join(allowed)}")


def flag(name: str, text: str) -> bool:
    """A query parameter that is on or off."""
    if text not in ("true", "false"):
        raise UserError(f"{name} is {text!r}; it must be true or false")
    return text == "true"


def number(name: str, text: str) -> float:
    """A query parameter that is a number."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}; it must be a number of seconds") from None


def _mode(mode: str | None, force: bool) -> Mode:
    check_choice("mode", mode, MODES)
    if force and mode not in (None, "force"):
        raise UserError(f'"force": true means "mode": "force" and contradicts "mode": "{mode}"; leave one of them out')
    found: Mapping[str | None, Mode] = {name: name for name in MODES}
    return "force" if force else found.get(mode, "idle")


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None and not 0 < timeout_s <= LONGEST_TIMEOUT_S:  # false for nan as well
        raise UserError(f"timeout_s is {timeout_s:g}; it must be above 0 and at most {LONGEST_TIMEOUT_S:g} seconds")


def _check_waits(timeout_s: float | None, mode: Mode) -> None:
    if timeout_s is not None and mode == "idle":
        raise UserError(
            f'timeout_s ({timeout_s:g}) is how long work under way may take to end, and "mode": "idle" waits for none; '
            'add "mode": "drain" or "mode": "force", or leave timeout_s out'
        )


def _drain_s(timeout_s: float | None, mode: Mode, storage: StorageConfig) -> float:
    """Seconds until what is under way is cut off: the only difference between drain and force."""
    return timeout_s or (storage.force_timeout_s if mode == "force" else storage.drain_timeout_s)


def _extra_config(body: AttachBody, storage: StorageConfig) -> str | None:
    """Resolved and checked.  None stays None: a re-attach of the same backend then keeps what it has."""
    registry.spec(body.hicache_storage_backend)
    given = _given_config(body)
    try:
        config = extra_config_json(given, below=storage.config_dir)
        learn_secrets(config)
        registry.validate_extra_config(body.hicache_storage_backend, config)
        check_plug_ins(body.hicache_storage_backend, config, storage.plug_ins)
        check_placeholders(config, storage.config_env)
    except UserError as error:
        if not given or given.startswith("@"):
            raise
        raise UserError(f"{error}; the extra config was: {shown_config(given)}") from error
    return config


def _given_config(body: AttachBody) -> str | None:
    """The extra config under either of its names.  Text is JSON or "@path"; an object is what it would be as text."""
    old, new = body.hicache_storage_backend_extra_config_json, body.hicache_storage_backend_extra_config
    if old is not None and new is not None:
        raise UserError(
            "hicache_storage_backend_extra_config is another name of hicache_storage_backend_extra_config_json; "
            "send one of them"
        )
    given = _as_text(new) if old is None else old
    if given is not None and len(given) > LARGEST_FILE_BYTES:
        raise UserError(
            f"the extra config has {len(given)} characters, and no extra config needs more than {LARGEST_FILE_BYTES}; "
            "every rank would have to keep it"
        )
    return given


def _as_text(config: str | dict[str, Any] | None) -> str | None:
    return json.dumps(config) if isinstance(config, dict) else config
