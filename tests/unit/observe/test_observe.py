"""The log: prefix, ids as fields, no secret in any line; stories on errors; counters."""

import json
import logging

import pytest

from sglang_hicache.config import LogConfig
from sglang_hicache.observe import Counters, redacted, secrets_in, start_logging
from sglang_hicache.story import Story


@pytest.fixture
def stderr(capsys):
    """A function that gives what the process wrote; the root logger is put back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield lambda: capsys.readouterr().err
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def test_text_lines_say_who_speaks_and_carry_ids(stderr):
    start_logging("scheduler rank 1", LogConfig())
    logging.getLogger("x").info("page %d is back", 7, extra={"op": 12, "rid": "abc"})
    logging.getLogger("x").debug("not at this level")
    text = stderr()
    assert text.endswith(" INFO [scheduler rank 1] page 7 is back rid=abc op=12\n")
    assert text.count("\n") == 1


def test_json_lines_carry_ids_as_fields(stderr):
    start_logging("tokenizer", LogConfig(format="json", level="debug"))
    logging.getLogger("x").debug("attached", extra={"command": "c-1", "epoch": 3})
    entry = json.loads(stderr())
    assert entry["process"] == "tokenizer"
    assert entry["level"] == "debug"
    assert (entry["message"], entry["command"], entry["epoch"]) == ("attached", "c-1", 3)


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_in_any_line(stderr, form):
    """Wherever it comes from: an argument, an exception's text, a URL with a login that nobody declared."""
    start_logging("tokenizer", LogConfig(format=form), ["s3cr3t-key", ""])
    try:
        raise ValueError("refused s3cr3t-key at redis://joe:hunter2@store:6379/0")
    except ValueError:
        logging.getLogger("x").exception("cannot open with %s", "s3cr3t-key")
    text = stderr()
    assert "s3cr3t-key" not in text
    assert "hunter2" not in text
    assert "***" in text
    assert "store:6379" in text


def test_redaction_of_settings_goes_by_name_and_keeps_numbers():
    config = {
        "access_key": "AK",
        "nested": [{"db-password": "pw", "host": "h"}],
        "prefetch_timeout_per_ki_token": 0.25,
        "hicache_storage_pass_prefix_keys": True,
        "tokens": ["a", "b"],
        "monkey": "banana",
        "url": "redis://joe:hunter2@store/0",
    }
    assert redacted(config) == {
        "access_key": "***",
        "nested": [{"db-password": "***", "host": "h"}],
        "prefetch_timeout_per_ki_token": 0.25,
        "hicache_storage_pass_prefix_keys": True,
        "tokens": ["***", "***"],
        "monkey": "banana",
        "url": "redis://***@store/0",
    }
    assert sorted(secrets_in(config)) == ["AK", "a", "b", "pw"]


def test_a_story_is_told_with_the_error_and_forgets_its_beginning():
    story = Story("op 3", limit=2)
    for event in ("admitted", "sent", "settled"):
        story.note(event, pages=1)
    error = story.attach_to(RuntimeError("double close"))
    assert error.__notes__ == [
        "story of op 3 (1 earlier events forgotten)\n  #2 sent pages=1\n  #3 settled pages=1"
    ]


def test_counters():
    counters = Counters()
    counters.add("written")
    counters.add("written", 4)
    counters.set("corrupt", 2)
    assert counters.snapshot() == {"corrupt": 2, "written": 5}
    assert counters.get("never") == 0
