"""Reads an extra config as people give it: a JSON object, or `@path` of a JSON, TOML or YAML file.

Used by the launcher for the command line (any path) and by the tokenizer for HTTP (only below the folder that
`--hicache-config-dir` opened).  Returns the one form that travels further: a JSON object as text.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from sglang_hicache.errors import UserError

SUFFIXES = (".json", ".toml", ".yaml", ".yml")

#: Whoever looks for secrets or checks types walks through the config, one call for each level.
_DEEPEST = 50

#: More than any extra config may have.
LARGEST_FILE_BYTES = 256 * 1024


def extra_config_json(text: str | None, *, below: str | None = None) -> str | None:
    """The extra config as one line of JSON; None stays None.

    `below` is the only folder from which `@path` may read ("": no folder at all); None reads from anywhere.
    """
    if text is None:
        return None
    if text.lstrip().startswith("@"):
        path = _permitted(Path(text.strip()[1:]), below)
        value = _read(path, below)
        source = str(path)
    else:
        value = _parsed("the extra config", lambda: json.loads(text or "{}"))
        source = "the extra config"
    if not isinstance(value, dict):
        raise UserError(f"{source} holds a {type(value).__name__}; an extra config is one object of names and values")
    if _is_deep(value):
        raise UserError(f"{source} is nested more than {_DEEPEST} deep, which is not supported here")
    return _parsed(source, lambda: json.dumps(value, allow_nan=False))


def _is_deep(value: Any) -> bool:
    """Level by level, so that no depth is too deep for this."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for holder in level
            if isinstance(holder, (dict, list))
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return any(isinstance(item, (dict, list)) for item in level)


def _permitted(path: Path, below: str | None) -> Path:
    if below is None:
        return path
    if not below:
        raise UserError(
            f"extra config @{path} is not read over HTTP: this server was started without --hicache-config-dir; "
            "send the JSON itself"
        )
    folder = Path(os.path.realpath(below))
    try:
        real = Path(os.path.realpath(folder / path))  # links are followed first: a link out of the folder is outside
    except ValueError as error:  # a zero byte
        raise UserError(f"extra config @{str(path)!r} is not a path") from error
    if folder not in real.parents:
        raise UserError(f"extra config @{path} is not below the folder that --hicache-config-dir allows")
    return real


def _text_of(path: Path, below: str | None) -> str:
    """The text of a plain file of bounded size, which is still where it was when its path was checked."""
    # Without O_NONBLOCK a named pipe would hold the caller, and with it every client, until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{str(path)!r} is not a plain file")
        opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if below and Path(os.path.realpath(below)) not in opened.parents:
            raise UserError(f"extra config @{path} is not below the folder that --hicache-config-dir allows")
        content = os.read(descriptor, LARGEST_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > LARGEST_FILE_BYTES:
        raise OSError(f"{str(path)!r} is larger than {LARGEST_FILE_BYTES} bytes")
    return content.decode()


def _read(path: Path, below: str | None) -> Any:
    if path.suffix not in SUFFIXES:
        raise UserError(f"extra config file {str(path)!r} must end in one of: {', '.join(SUFFIXES)}")
    try:
        text = _text_of(path, below)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read extra config file {str(path)!r}: {error}") from error
    if path.suffix == ".json":
        return _parsed(str(path), lambda: json.loads(text))
    if path.suffix == ".toml":
        return _parsed(str(path), lambda: tomllib.loads(text))
    import yaml  # lazy door: few use it, and every process that reads a config would load it

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            # Ten lines of aliases of aliases are a billion entries as soon as they are written out.
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path} uses YAML aliases, which are not supported here")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # Its time grows with the square of the depth: a file of brackets would hold the server for minutes.
            if depth > _DEEPEST:
                raise UserError(f"{path} is nested more than {_DEEPEST} deep, which is not supported here")
        return yaml.safe_load(text)
    except (RecursionError, ValueError):
        raise UserError(
            f"{path} is not YAML that can be used here (nested too deep, or a value out of range)"
        ) from None
    except yaml.YAMLError as error:
        # Its own text quotes the line that it stumbled over, and that line may be the one with the password.
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}") from None


def _parsed(source: str, parse: Any) -> Any:
    """Run `parse`; what it refuses is the user's mistake (TypeError: a TOML date has no JSON form)."""
    try:
        return parse()
    except RecursionError:
        raise UserError(f"{source} is nested more than {_DEEPEST} deep, which is not supported here") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{source} cannot be used: {error}; give one JSON object, or @file") from error
