"""Whose requests they are: the usual places for keys and a region that nobody gave as an argument.

    arguments, AWS_ACCESS_KEY_ID and its kin, a web identity, the files of profiles, a container's role, the machine's

The library knows all of them but the files `~/.aws/credentials` and `~/.aws/config`, which are read here: keys of a
profile, its session token and its region.  What a profile makes out of other things (roles, single sign-on, programs)
needs the tool that makes it: `aws configure export-credentials` puts the result into the environment.
"""

from __future__ import annotations

import configparser
import datetime
import os
from collections.abc import Mapping
from pathlib import Path

from sglang_hicache.remote.s3_address import check_key

#: Where the files say nothing either.
DEFAULT_REGION = "us-east-1"

#: Keys in a file are read again after this time: whoever rotates them writes the new ones there.
_REREAD = datetime.timedelta(minutes=5)

#: Whoever has set one of these has chosen a source that comes before the files.
_BEFORE_FILES = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
_BEFORE_MACHINE = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")


class NoCredentials(Exception):
    """Nobody said whose requests they are."""


class GivenKeys:
    """Keys that somebody gave as arguments, and nothing else: the library would add a token that it finds in the
    environment, which belongs to other keys, or sign nothing at all because that is asked for there."""

    def __init__(self, access_key: str, secret_key: str, session_token: str) -> None:
        self._keys = (access_key, secret_key, session_token or None)

    def __call__(self) -> dict[str, object]:
        access_key, secret_key, token = self._keys
        return {"access_key_id": access_key, "secret_access_key": secret_key, "token": token, "expires_at": None}


class ProfileKeys:
    """Keys of a profile in the files; the library calls it when it needs them, on a thread of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def __call__(self) -> dict[str, object]:
        found = _profile(self._environment)
        for name in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token"):
            check_key(name, found.get(name, ""))
        return {
            "access_key_id": found["aws_access_key_id"],
            "secret_access_key": found["aws_secret_access_key"],
            "token": found.get("aws_session_token"),
            "expires_at": datetime.datetime.now(datetime.UTC) + _REREAD,
        }


def profile_keys(environment: Mapping[str, str] = os.environ) -> ProfileKeys | None:
    """The keys of the files, where nothing comes before them; None: the library knows, or NoCredentials.
    ValueError: the environment has some that nobody could use."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        check_key(name, environment.get(name, ""))
    if any(environment.get(name) for name in _BEFORE_FILES):
        return None
    if {"aws_access_key_id", "aws_secret_access_key"} <= set(_profile(environment)):
        return ProfileKeys(environment)
    if any(environment.get(name) for name in _BEFORE_MACHINE):
        return None
    if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise NoCredentials(
            "no access key: neither in the options, nor in AWS_ACCESS_KEY_ID, nor in a profile of ~/.aws/credentials, "
            "and AWS_EC2_METADATA_DISABLED forbids to ask the machine"
        )
    return None


def region_of(environment: Mapping[str, str] = os.environ) -> str:
    """The region where none was given."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        if environment.get(name):
            return environment[name]
    return _profile(environment).get("region") or DEFAULT_REGION


def endpoint_of(environment: Mapping[str, str] = os.environ) -> str:
    """The server where none was given; "": Amazon's own for the region."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((environment[name] for name in names if environment.get(name)), "")


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """What both files say of the profile; the credentials file is right where they differ."""
    name = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE") or "default"
    folder = Path(environment.get("HOME") or "/") / ".aws"
    config = Path(environment.get("AWS_CONFIG_FILE") or folder / "config")
    credentials = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or folder / "credentials")
    return _section(config, f"profile {name}") | _section(config, name) | _section(credentials, name)


def _section(path: Path, name: str) -> dict[str, str]:
    """One section of a file of profiles; a file that is not there, or is none, has none."""
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error):
        return {}
    return dict(parser[name]) if parser.has_section(name) else {}
