"""How many tokens were to be stored, are, and are not, by reason: exact at any moment.

    offered == stored + lost - recovered + waiting

A node that is given up remembers why (`Node.lost`), so it is counted once; it may be offered again, still counts as
lost while it waits, and is taken back as recovered when the store has it after all.  Kept by `BackupQueue`; replicated.
"""

from __future__ import annotations

from collections import Counter

from sglang_hicache.cache.loss import Loss
from sglang_hicache.cache.node import Node


class Books:
    """Tokens, since the server started."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        #: offered; backuped (written) and found (a read showed that the store had them), together what is stored;
        #: recovered; failed: what attempts did not write, tried again or not.
        self.counters: Counter[str] = Counter()
        self.lost: Counter[Loss] = Counter()
        self._lost_at_attach: Counter[Loss] = Counter()
        self._stored_at_attach = 0

    @property
    def stored(self) -> int:
        return self.counters["backuped"] + self.counters["found"]

    def offered(self, node: Node) -> None:
        """The node waits from now on.  What was lost before has been counted then."""
        if node.lost is None:
            self.counters["offered"] += self._tokens(node)

    def written(self, node: Node) -> None:
        self._store(node, "backuped")

    def found(self, node: Node) -> None:
        self._store(node, "found")

    def given_up(self, node: Node, reason: Loss) -> None:
        """The node, offered before, waits no more."""
        if node.lost is None:
            node.lost = reason
            self.lost[reason] += self._tokens(node)

    def failed(self, pages: int) -> None:
        self.counters["failed"] += pages * self._page_size

    def balance(self, waiting: list[Node]) -> str:
        """What does not add up, "" if all does."""
        tokens = sum(self._tokens(node) for node in waiting if node.lost is None)
        accounted = self.stored + self.lost.total() - self.counters["recovered"] + tokens
        if self.counters["offered"] == accounted:
            return ""
        return f"{self.counters['offered']} tokens were offered, {accounted} are accounted for: {self!r}, {tokens} wait"

    # ------------------------------------------------------------------------------- of one attachment, for the log

    def attached(self) -> None:
        self._lost_at_attach, self._stored_at_attach = Counter(self.lost), self.stored

    def since_attach(self) -> str:
        """What the store took and did not take since it was attached, for people."""
        lost = self.lost - self._lost_at_attach
        reasons = ", ".join(f"{reason} {lost[reason]}" for reason in Loss if lost[reason])
        text = f"{self.stored - self._stored_at_attach} tokens were stored, {lost.total()} were not"
        return f"{text} ({reasons})" if reasons else text

    def _store(self, node: Node, how: str) -> None:
        self.counters[how] += self._tokens(node)
        if node.lost is not None:
            node.lost = None
            self.counters["recovered"] += self._tokens(node)

    def _tokens(self, node: Node) -> int:
        return node.page_count * self._page_size

    def __repr__(self) -> str:
        return f"<Books {dict(self.counters)} lost {({str(reason): n for reason, n in self.lost.items()})}>"
