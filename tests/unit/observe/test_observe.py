"""The log: prefix, ids as fields, no secret in any line; stories on errors; counters."""

import json
import logging
import sys
import threading
import time

import pytest

from sglang_hicache.config import LogConfig
from sglang_hicache.observe import (
    Counters,
    Redaction,
    SharedCounters,
    learn_secrets,
    learn_variables,
    redacted,
    report_uncaught,
    secrets_in,
    start_logging,
    without_logins,
    without_secrets,
)
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:zz/hunter2@store:6379/0", "redis://***@store:6379/0"),
        ("redis://joe:zz/hunter2@store", "redis://***@store"),
        ('"nodes": ["joe:hunter2@store:6379"]', '"nodes": ["***@store:6379"]'),
        ("joe:hunter2@[::1]:6379", "***@[::1]:6379"),
        ("http://store:8080/a@b", "http://store:8080/a@b"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("12:30:01 done@once", "12:30:01 done@once"),
    ],
)
def test_logins_are_hidden_where_they_make_no_url(text: str, shown: str) -> None:
    """A config that was refused is repeated to whoever sent it, and stands in the audit log."""
    assert without_logins(text) == shown


def test_looking_for_logins_takes_no_longer_than_a_text_is_long() -> None:
    for text in ("x://a:b" * 10_000, "://" + "a:" * 30_000, "a:b," * 30_000):
        started = time.process_time()
        assert without_logins(text) == text
        assert time.process_time() - started < 3.0, text[:20]


@pytest.mark.parametrize("name", ["pasword", "passwort", "db_pasword", "Pasword"])
def test_a_password_whose_name_is_misspelt_is_hidden(name: str) -> None:
    """Only a refusal tells of the mistake, and repeats the config."""
    assert redacted({name: "hunter2", "passing": "shown"}) == {name: "***", "passing": "shown"}


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


def test_a_number_and_everything_below_a_secret_name_is_a_secret():
    config = {
        "password": 12345,
        "token": 777777,
        "api_token": 888888,
        "prefetch_timeout_per_ki_token": 0.25,
        "max_tokens": 4096,
        "credentials": {"user": "joe", "pin": 4711, "more": [{"x": "deep"}], "on": True, "none": None},
        "AWS_SECRET_ACCESS_KEY": "aws",
        "secretaccesskey": "run together",
        "passphrase": "open sesame",
        "Authorization": "Bearer x",
    }
    shown = redacted(config)
    assert shown["password"] == shown["token"] == shown["api_token"] == "***"
    assert (shown["prefetch_timeout_per_ki_token"], shown["max_tokens"]) == (0.25, 4096)
    assert shown["credentials"] == {"user": "***", "pin": "***", "more": [{"x": "***"}], "on": True, "none": None}
    assert {shown[name] for name in ("AWS_SECRET_ACCESS_KEY", "secretaccesskey", "passphrase", "Authorization")} == {
        "***"
    }
    assert {"12345", "777777", "888888", "joe", "4711", "deep", "aws"} <= set(secrets_in(config))
    assert "4096" not in secrets_in(config)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://joe:p@ss@store/0", "redis://***@store/0"),
        ("https://store/x?user=a&password=b&c=d", "https://store/x?user=a&password=***&c=d"),
        ("https://store/x?X-Amz-Signature=abc", "https://store/x?X-Amz-Signature=***"),
        ("Endpoint=x;AccountKey=abc==;y=1", "Endpoint=x;AccountKey=***;y=1"),
        ("what is the key=value form?", "what is the key=value form?"),
    ],
)
def test_secrets_that_show_by_their_form(text, shown):
    assert Redaction()(text) == redacted({"url": text})["url"] == shown


def test_a_secret_is_found_as_repr_json_and_url():
    secret = "q\"u\\o't\u00e9/ x"
    redact = Redaction([secret])
    for text in (
        secret,
        repr(secret),
        json.dumps(secret),
        json.dumps(secret, ensure_ascii=False),
        "q%22u%5Co%27t%C3%A9%2F%20x",
    ):
        assert "***" in redact(f"<{text}>"), text
        assert "u" not in redact(f"<{text}>"), text


def test_a_number_is_hidden_where_it_stands_alone():
    assert Redaction(["12345"])("pin 12345, time 123456") == "pin ***, time 123456"


def test_very_many_secrets_and_very_long_texts_cost_little():
    redact = Redaction(f"secret-{number:06}" for number in range(3000))
    assert redact("secret-002999 secret-000000") == "*** secret-000000"
    started = time.process_time()  # what a neighbour takes does not count
    for text in (
        "://" * 100_000,
        "a@" * 100_000,
        "://" + "a" * 300_000,
        "?key=" * 60_000,
        "?" + "_a" * 150_000,
        "k" * 300_000,
    ):
        Redaction()(text)
        redacted({"a" + text: "x"})
    assert time.process_time() - started < 5


def test_no_config_crowds_out_the_secrets_of_the_start():
    redaction = Redaction()
    redaction.learn(["the-admin-key"], for_ever=True)
    redaction.learn(f"secret-{number}-" for number in range(3000))
    assert redaction("the-admin-key secret-2999- secret-0-") == "*** *** secret-0-"


@pytest.mark.parametrize("form", ["text", "json"])
def test_secrets_of_a_config_that_comes_later_stay_out_of_log_and_answers(stderr, form):
    start_logging("scheduler rank 0", LogConfig(format=form))
    learn_secrets('{"nested": [{"password": 31415926, "db-secret": "over-http-1"}]}')
    learn_secrets("{")
    learn_secrets(None)
    try:
        raise OSError("31415926 refused").with_traceback(None) from ValueError("over-http-1")
    except OSError as error:
        error.add_note("story: over-http-1")
        logging.getLogger("x").exception("%r", ["over-http-1"], extra={"rid": "over-http-1"})
    text = stderr()
    assert "31415926" not in text and "over-http-1" not in text
    assert "***" in text
    assert without_secrets("over-http-1 failed") == "*** failed"


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("PGPASSWORD", True), ("REDISCLI_AUTH", True), ("DBPASS", True), ("AZURE_STORAGE_CONNECTION_STRING", True),
        ("AWS_SECRET_ACCESS_KEY", True), ("HF_TOKEN", True), ("SITE", False), ("SCRATCH", False),
    ],
)  # fmt: skip
def test_variables_whose_names_say_that_they_are_secret(name: str, is_secret: bool) -> None:
    learn_variables({name: f"value-of-{name}"})
    assert without_secrets(f"/data/value-of-{name}/0") == ("/data/***/0" if is_secret else f"/data/value-of-{name}/0")


def test_no_message_id_or_traceback_can_forge_a_line(stderr):
    forged = "\n2026-01-01 00:00:00.000 ERROR [launcher] forged\r\x1b[31m\u2028"
    start_logging("tokenizer", LogConfig())
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("x").exception("path %s", forged, extra={"rid": forged})
    text = stderr()
    assert "\r" not in text and "\x1b" not in text and "\u2028" not in text
    lines = text.splitlines()
    assert [line[:2] for line in lines if not line.startswith("  ")] == [lines[0][:2]]
    assert "rid=\\n2026" in lines[0]


def test_json_lines_are_ascii_and_one_each(stderr):
    start_logging("tokenizer", LogConfig(format="json"))
    logging.getLogger("x").info("\ud800 \x9b \n %s", "\u2028", extra={"rid": "a\nb"})
    text = stderr()
    assert text.isascii() and text.count("\n") == 1
    assert json.loads(text)["rid"] == "a\nb"


def test_what_nobody_catches_is_redacted_too(stderr, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    start_logging("storage rank 0 x", LogConfig(), ["uncaught-secret"])
    report_uncaught()
    error = RuntimeError("uncaught-secret")
    sys.excepthook(RuntimeError, error, None)
    threading.excepthook(threading.ExceptHookArgs((RuntimeError, error, None, threading.current_thread())))
    text = stderr()
    assert text.count("RuntimeError: ***") == 2
    assert "uncaught-secret" not in text


def test_a_story_is_told_with_the_error_and_forgets_its_beginning():
    story = Story("op 3", limit=2)
    for event in ("admitted", "sent", "settled"):
        story.note(event, pages=1)
    error = story.attach_to(RuntimeError("double close"))
    assert error.__notes__ == ["story of op 3 (1 earlier events forgotten)\n  #2 sent pages=1\n  #3 settled pages=1"]


def test_counters():
    counters = Counters()
    counters.add("written")
    counters.add("written", 4)
    counters.set("corrupt", 2)
    assert counters.snapshot() == {"corrupt": 2, "written": 5}
    assert counters.get("never") == 0


def test_counters_of_several_threads_lose_nothing():
    counters = SharedCounters()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [counters.add("pages") for _ in range(5000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert counters.snapshot() == {"pages": 20_000}
