"""GET /metrics: one status question to the ranks per scrape, and the answers as Prometheus wants them.

Runs on the event loop.  Needs no key, like the health routes, and shows nothing that could be one.  A rank that hangs
cannot hold a scrape for longer than the desk waits.  Writing the text takes this process tens of milliseconds, in which
it does nothing else: scrapes that come together share one text, and the next one is not written before the loop has
had time for others, however many strangers ask.
"""

from __future__ import annotations

import asyncio
import time
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

#: How many times as long as it takes to write one text nobody else's is written: a fifth of the loop is for scrapes.
REST = 4

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
        self._writing: asyncio.Task[bytes] | None = None
        #: The loop has had time for others since the latest text was written.
        self._has_rested = asyncio.Event()
        self._has_rested.set()

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(await self._text(), headers={"content-type": CONTENT_TYPE})

    async def _text(self) -> bytes:
        """What a scrape shows; it belongs to nobody's request, or its client could end it for all."""
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await asyncio.shield(self._writing)

    async def _write(self) -> bytes:
        await self._has_rested.wait()
        is_up, began_s = await self._status(), time.thread_time()
        text = generate_latest(_Families(families(self._table, self._services.config, self._latest, is_up)))
        self._has_rested.clear()
        asyncio.get_running_loop().call_later(REST * (time.thread_time() - began_s), self._has_rested.set)
        return text

    async def _status(self) -> list[bool]:
        answers = await self._services.desk.status()
        self._latest = [answer or latest for answer, latest in zip(answers, self._latest)]
        return [answer is not None for answer in answers]
