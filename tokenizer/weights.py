"""POST /update_weights_from_disk: other weights of the same model, without a restart.

The handler runs on the event loop.  It sees to what can be known without the ranks: that the path is a model, that it
has the shape of the one that runs, and what its weights are (their digest, made on a helper thread).  The rest is the
ranks' (`scheduler/weights_update.py`): they take the weights together or not at all.
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sglang_hicache.errors import UserError
from sglang_hicache.host_memory import host_memory
from sglang_hicache.model_facts import DTYPE_BYTES, ModelFacts, model_directory, read_model_facts, read_object
from sglang_hicache.tokenizer.admin import OPERATION_HEADER, STATUS
from sglang_hicache.tokenizer.api import (
    UNSUPPORTED_UPDATE,
    MalformedBody,
    UpdateWeightsBody,
    decode_body,
    refuse_unsupported,
)
from sglang_hicache.tokenizer.intake import LONGEST_NAME
from sglang_hicache.tokenizer.manager import Unavailable
from sglang_hicache.tokenizer.operations import Operation, State
from sglang_hicache.tokenizer.ranks_desk import new_id
from sglang_hicache.tokenizer.replies import JsonReply, openai_error
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.weights_digest import default_cache_file, weights_digest
from sglang_hicache.wire import UpdateWeights

log = logging.getLogger(__name__)

#: Fields of config.json in which both models must agree, where both have them.  The ranks compare what the model's
#: code makes of the whole file; this list is for a message that names the field, before anything is read.
_SHAPE = (
    "architectures", "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_size", "intermediate_size", "vocab_size", "dtype", "torch_dtype", "tie_word_embeddings",
)  # fmt: skip


class WeightsRoutes:
    """The route that changes the model's weights."""

    def __init__(self, services: Services) -> None:
        self._services = services
        #: Looks at new weights: it may read gigabytes, or fetch them, and cannot be stopped.
        self._looking: asyncio.Future[tuple[str, str]] | None = None

    async def update_from_disk(self, request: Request) -> Response:
        """POST /update_weights_from_disk."""
        try:
            body = decode_body(await request.body(), UpdateWeightsBody)
        except MalformedBody as error:
            self._refused(request, str(error), 400)
            return openai_error(str(error), 400, kind="Bad Request")
        except ClientDisconnect:
            return Response(status_code=400)
        try:
            self._services.lifecycle.check()
            self._check(body)
            directory, digest = await self._look(body.model_path)
            operation = await self._update(request, body, directory, digest)
        except (UserError, OSError) as error:
            return self._refused(request, f"The weights were not updated: {error}", 400)
        except Unavailable as error:
            return self._refused(request, str(error), 503)
        log.info("%s", operation.message, extra={"command": operation.id})
        paused = max((answer.paused_requests for answer in operation.answers.values()), default=0)
        reply = _reply(operation.state is State.SUCCEEDED, operation.message, STATUS[operation.state], paused)
        reply.headers[OPERATION_HEADER] = operation.id
        return reply

    def _refused(self, request: Request, why: str, status_code: int) -> Response:
        trail = self._services.control.trail
        trail.refused(trail.caller(request.scope), "update_weights", why)
        return _reply(False, why, status_code)

    @staticmethod
    def _check(body: UpdateWeightsBody) -> None:
        if not body.flush_cache:
            raise UserError(
                "flush_cache=false is refused: what is cached was computed with the old weights, and would be served "
                "as if the new ones had said it; leave it out or send true"
            )
        refuse_unsupported(body, UNSUPPORTED_UPDATE)
        if body.weight_version is not None and not 0 < len(body.weight_version) <= LONGEST_NAME:
            raise UserError(
                f"weight_version has {len(body.weight_version)} characters; 1 to {LONGEST_NAME} are allowed"
            )

    async def _look(self, path: str) -> tuple[str, str]:
        """One at a time: more would read as many models at once, and take the helper threads from everybody else."""
        if self._looking is not None and not self._looking.done():
            raise UserError("another update of the weights is under way; try again when it has ended")
        self._looking = asyncio.ensure_future(asyncio.to_thread(self._look_blocking, path))
        # The thread goes on when the client leaves, and the next one must know.
        return await asyncio.shield(self._looking)

    def _look_blocking(self, path: str) -> tuple[str, str]:
        """Directory and digest of the new weights, if they fit the model that runs.  On a helper thread."""
        directory = model_directory(path, "model_path")
        facts = read_model_facts(directory)
        here, model = self._services.codec.model_config, self._services.config.model
        there = read_object(Path(directory, "config.json"))
        wrong = [_difference(name, there[name], here[name]) for name in _SHAPE if _differs(name, there, here)]
        if facts.eos_token_ids != model.eos_token_ids:
            wrong.append(_difference("eos_token_id", list(facts.eos_token_ids), list(model.eos_token_ids)))
        if wrong:
            raise UserError(
                f"{directory} does not fit the model that runs: {'; '.join(wrong)}; start a server of its own for it"
            )
        self._check_memory(facts)
        return directory, weights_digest(directory, default_cache_file())

    def _check_memory(self, facts: ModelFacts) -> None:
        """Better a refusal than a rank that the kernel kills in the middle of reading."""
        wider = DTYPE_BYTES[self._services.config.model.dtype] / DTYPE_BYTES.get(facts.dtype, 4)
        needed_bytes, found = int(facts.weights_bytes * wider), host_memory()
        if needed_bytes > found.available_bytes:
            needed_gib, free_gib = needed_bytes / 2**30, found.available_bytes / 2**30
            raise UserError(
                f"new weights are read into main memory beside those in use, which takes some {needed_gib:.1f} GiB, "
                f"and {free_gib:.1f} GiB are free ({found.bound}); free some, or restart the server with the new model"
            )

    async def _update(self, request: Request, body: UpdateWeightsBody, directory: str, digest: str) -> Operation:
        control = self._services.control
        order = UpdateWeights(
            id=new_id(),
            deadline_s=self._services.config.scheduler.weights_update_timeout_s,
            model_path=directory,
            weights_digest=digest,
            weight_version=body.weight_version,
            aborts_requests=body.abort_all_requests,
        )
        return await control.run(order, control.trail.caller(request.scope))


def _differs(name: str, there: dict[str, Any], here: dict[str, Any]) -> bool:
    return None not in (there.get(name), here.get(name)) and there[name] != here[name]


def _difference(name: str, there: Any, here: Any) -> str:
    return f"{name} is {json.dumps(there):.80}, not {json.dumps(here)}"


def _reply(success: bool, message: str, status: int, paused: int = 0) -> Response:
    return JsonReply({"success": success, "message": message, "num_paused_requests": paused}, status)
