"""GET /metrics: one status question to the ranks per scrape, and the answers as Prometheus wants them.

Runs on the event loop.  Needs no key, like the health routes, and shows nothing that could be one.  A rank that hangs
cannot hold a scrape for longer than the desk waits, and scrapes that come meanwhile share its question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from sglang_hicache.tokenizer.metrics_series import families
from sglang_hicache.tokenizer.metrics_table import table
from sglang_hicache.tokenizer.replies import text_reply
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.wire import StatusAnswer

#: Whatever the scraper prefers: in the other format the library writes `sglang:x` as `sglang_x`, and no dashboard knows
#: that.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

OFF = "Metrics are off; restart the server with --enable-metrics."


class _Families(Collector):
    """The families of one scrape, in the form that the encoder takes."""

    def __init__(self, found: Iterable[Metric]) -> None:
        self._found = list(found)

    def collect(self) -> Iterable[Metric]:
        return self._found


async def metrics_off(request: Request) -> Response:
    """GET /metrics of a server without them."""
    return text_reply(OFF, 404)


class MetricsRoutes:
    """/metrics."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._table = table(services.config)
        #: Each rank's latest answer: counters of a rank that is silent for a while must not seem to start again.
        self._latest = [StatusAnswer(id="", rank=rank, state="", epoch=0) for rank in range(services.desk.rank_count)]
        self._asking: asyncio.Task[list[bool]] | None = None

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        is_up = await self._ask()
        found = _Families(families(self._table, self._services.config, self._latest, is_up))
        return Response(generate_latest(found), headers={"content-type": CONTENT_TYPE})

    async def _ask(self) -> list[bool]:
        """Which ranks have answered; the question belongs to nobody's request, or its client could end it for all."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._status())
        return await asyncio.shield(self._asking)

    async def _status(self) -> list[bool]:
        answers = await self._services.desk.status()
        self._latest = [answer or latest for answer, latest in zip(answers, self._latest)]
        return [answer is not None for answer in answers]
