"""How attachments end, in words: each text begins with a code that has a page, and names store and ranks."""

from __future__ import annotations

import pytest

from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.scheduler import endings
from sglang_hicache.storage.attachment import StorageAttachment
from sglang_hicache.storage.attachment_events import State
from sglang_hicache.storage.diagnosis import CODES


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        ({1: "refused: nobody listens", 0: "refused: nobody listens"},
         "refused: rank 0: nobody listens; rank 1: nobody listens"),
        ({0: "tls: too old", 2: "wrong_host: no such host"}, "tls: rank 0: too old; rank 2: wrong_host: no such host"),
        ({3: "segfault", 4: "killed: by signal 9"}, "killed: rank 3: segfault; rank 4: by signal 9"),
        ({0: "no code: at all"}, "rank 0: no code: at all"),
    ],
)  # fmt: skip
def test_the_code_of_the_first_rank_that_has_one_comes_first(reasons: dict[int, str], told: str) -> None:
    assert endings.reported(reasons) == told


def test_every_end_begins_with_a_code() -> None:
    attachment = StorageAttachment(3, "file", "{}", late_io=False, command_id="", in_flight=2)
    read, late = Op(1, OpKind.READ, 3, 6), endings.named([0, 2])
    texts = [endings.unreaped({0: "pid 7"}), endings.hung(attachment, read, 30.0, late)]
    for state in (State.ATTACHING, State.DRAINING, State.DETACHING):
        attachment.state = state
        texts.append(endings.overdue(attachment, "rank 1"))
    assert [text.partition(":")[0] for text in texts] == [
        "unreaped", "hung", "timeout", "drain_timeout", "drain_timeout",
    ]  # fmt: skip
    assert {text.partition(":")[0] for text in texts} <= set(CODES)
    assert "a read of 6 pages did not end within 30 s on rank 0, 2 (op 1)" in texts[1]
    attachment.state = State.ATTACHED
    assert "attach it again" in endings.hung(attachment, read, 30.0, late) and "attach it again" not in texts[1]
    assert all("(file, epoch 3)" in text for text in texts[3:])
