"""What differs from node to node in an extra config that is the same for all: `${node.hostname}` and its kin.

Used where a config is judged (launcher, tokenizer, every rank's commands: syntax, and which variables are allowed) and
where it is used (the rank that starts a storage process: values).  What travels, is compared, shown, audited and kept
is the text with its placeholders; a value is known on its own rank only.  Pure: what is asked of the machine is handed
in.

    ${node.hostname}  ${node.ip}  ${rank}  ${env.NAME}      $${ stands for ${ itself

A placeholder may stand in any text.  Where the form of a text matters (a size, an absolute path), it is checked on the
rank, when it is known.  What is no text - a number, a choice - takes none: ranks decide by such settings, and must
decide alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_hicache.errors import UserError

_PLACEHOLDER = re.compile(r"\$\$\{|\$\{(?P<name>[^{}]*)\}|\$\{")

_ENV = "env."
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

#: Configs of other stores: each is resolved when it is used, and must not keep this one from being used.
_LATER = "fault_tolerance"


@dataclass(frozen=True, slots=True)
class Node:
    """What a rank knows of the place where it runs."""

    rank: int
    hostname: str
    #: Asked only where somebody wants to know it; UserError: the machine has no address.
    ip: Callable[[], str]
    environment: Mapping[str, str]


def variable_names(text: str) -> tuple[str, ...]:
    """`--hicache-config-env`, taken apart."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise UserError(f"--hicache-config-env: {name!r} is no name of a variable; give names with commas between")
    return names


def has_placeholder(value: object) -> bool:
    """Is this a text whose value is not known before it is resolved?"""
    return isinstance(value, str) and "${" in value


def check_placeholders(extra_config_json: str | None, allowed: Collection[str]) -> None:
    """Raise UserError unless every placeholder is one that a rank can fill in; `allowed`: variables that may be."""
    if has_placeholder(extra_config_json):
        _replaced(json.loads(extra_config_json or "{}"), lambda name: _checked(name, allowed))


def resolved(extra_config_json: str, node: Node, allowed: Collection[str]) -> tuple[str, dict[str, str]]:
    """The config as this rank uses it, and the variables that went into it.  UserError: this rank cannot say."""
    if not has_placeholder(extra_config_json):
        return extra_config_json, {}
    used: dict[str, str] = {}

    def value(name: str) -> str:
        _checked(name, allowed)
        if name == "rank":
            return str(node.rank)
        if name == "node.hostname":
            return node.hostname
        if name == "node.ip":
            return node.ip()
        variable = name.removeprefix(_ENV)
        if variable not in node.environment:
            raise UserError(
                f"${{{name}}}: {variable} is not set in the environment of rank {node.rank} on {node.hostname}; set it "
                "there and start the server again"
            )
        used[variable] = node.environment[variable]
        return used[variable]

    config = json.loads(extra_config_json)
    own = {key: item for key, item in config.items() if key != _LATER}
    return json.dumps(config | _replaced(own, value)), used


def _checked(name: str, allowed: Collection[str]) -> str:
    """Returns nothing of interest; raises for what nobody can fill in."""
    if name in ("rank", "node.hostname", "node.ip"):
        return ""
    takes = "${node.hostname}, ${node.ip}, ${rank}, ${env.NAME}, or $${ for the two characters themselves"
    if not name.startswith(_ENV):
        raise UserError(f"the extra config has ${{{name}}}, which nobody can fill in; it takes {takes}")
    variable = name.removeprefix(_ENV)
    if variable not in allowed:
        listed = f"lists {', '.join(allowed)}" if allowed else "is empty"
        raise UserError(
            f"the extra config has ${{{name}}}, but --hicache-config-env, which {listed}, does not allow {variable}; "
            "start the server with it in that list"
        )
    return ""


def _replaced(value: Any, of: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every placeholder replaced."""
    if isinstance(value, dict):
        return {key: _replaced(item, of) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, of) for item in value]
    return _PLACEHOLDER.sub(lambda found: _one(found, of), value) if isinstance(value, str) else value


def _one(found: re.Match[str], of: Callable[[str], str]) -> str:
    if found[0] == "$${":
        return "${"
    if found["name"] is None:
        # Without the rest of the text, which may be a password.
        raise UserError("a text of the extra config has ${ without a matching }; write $${ for the two characters")
    return of(found["name"])
