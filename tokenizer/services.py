"""What every route may use, handed to the route classes once, when the app is built.

Everything in it belongs to the event loop of the tokenizer process.  `Lifecycle` is the only answer to "may
requests come in?"; nobody else keeps a flag.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from sglang_hicache.config import ServerConfig
from sglang_hicache.heartbeat import ServerState
from sglang_hicache.tokenizer.control import Control
from sglang_hicache.tokenizer.intake import Intake
from sglang_hicache.tokenizer.manager import RequestManager, Unavailable
from sglang_hicache.tokenizer.ranks_desk import RanksDesk
from sglang_hicache.tokenizer.startup import Startup
from sglang_hicache.tokenizer.text import TextCodec


class Phase(enum.Enum):
    """What this process is doing."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "shutting down"


class Lifecycle:
    """The phase of this process, and what the launcher says of the server as a whole."""

    def __init__(self, server_state: Callable[[], ServerState]) -> None:
        self.phase = Phase.STARTING
        self._server_state = server_state

    def __repr__(self) -> str:
        return f"<Lifecycle {self.phase.name}>"

    @property
    def is_failing(self) -> bool:
        """The launcher has given the server up."""
        return self._server_state() is ServerState.FAILING

    def obstacle(self) -> str:
        """Why no request is taken; "" when all is well."""
        state = self._server_state()
        if self.is_failing:
            return "the server is failing; see its log"
        if self.phase is Phase.DRAINING or state is ServerState.DRAINING:
            return "the server is shutting down"
        return "the server is starting" if self.phase is Phase.STARTING else ""

    def check(self) -> None:
        """Raise `Unavailable` unless requests are taken."""
        if obstacle := self.obstacle():
            raise Unavailable(obstacle)


@dataclass(frozen=True, slots=True)
class Services:
    """The neighbours of the routes."""

    config: ServerConfig
    codec: TextCodec
    intake: Intake
    requests: RequestManager
    desk: RanksDesk
    control: Control
    startup: Startup
    lifecycle: Lifecycle
