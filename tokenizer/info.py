"""What the server tells about itself: /server_info and /model_info.

Handlers run on the event loop and change nothing.  Start-up values stand at the top level of /server_info, live
ones in `internal_states`, asked from the ranks each time.  Keys and passwords are replaced before anything
leaves.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sglang_hicache import __version__
from sglang_hicache.config import ServerConfig
from sglang_hicache.observe import redacted
from sglang_hicache.tokenizer.admin_status import StorageStatusRoutes
from sglang_hicache.tokenizer.replies import JsonReply
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.wire import FIRST_WEIGHT_VERSION

log = logging.getLogger(__name__)


class InfoRoutes:
    """/server_info and /model_info."""

    def __init__(self, services: Services, storage: StorageStatusRoutes) -> None:
        self._services = services
        self._storage = storage
        self._started_s = time.time()
        #: Path and version of the weights as the ranks last told, for when they are too busy to answer.
        self._weights = services.config.model.place, FIRST_WEIGHT_VERSION

    async def server_info(self, request: Request) -> Response:
        """GET /server_info, and /get_server_info for older clients."""
        if request.scope["path"].startswith("/get_"):
            log.warning("/get_server_info is deprecated; use /server_info")
        config = self._services.config
        live = await self._storage.live_status()
        for rank in live["ranks"]:
            self._learn(rank.get("model_path"), rank.get("weight_version"))
        model_path, weight_version = self._weights
        phase = self._services.lifecycle.phase.value
        state = {
            "world_size": config.tp_size, "phase": phase, "model_path": model_path, "weight_version": weight_version
        }  # fmt: skip
        info = server_args(config) | {
            "max_total_num_tokens": config.pool.device_tokens,
            "max_req_input_len": self._services.intake.max_request_tokens - 1,
            "hicache_object_layout": None,
            "kv_events": None,
            "startup_time": self._started_s,
            "internal_states": [live | state],
            "version": __version__,
            "frontend": "python",
        }
        return JsonReply(info)

    def _learn(self, model_path: str | None, weight_version: str | None) -> None:
        if model_path and weight_version:
            self._weights = model_path, weight_version

    async def model_info(self, request: Request) -> Response:
        """GET /model_info, and /get_model_info for older clients."""
        model = self._services.config.model
        for answer in await self._services.desk.status():
            if answer is not None:
                self._learn(answer.model_path, answer.weight_version)
        model_path, weight_version = self._weights
        facts = self._services.codec.model_config
        return JsonReply(
            {
                "model_path": model_path,
                "served_model_name": model.served_name,
                "tokenizer_path": model.tokenizer_place,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": weight_version,
                "load_format": "auto",
                "reasoning_parser": None,
                "tool_call_parser": None,
                "disaggregation_mode": "null",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": facts.get("model_type"),
                "architectures": facts.get("architectures"),
            }
        )


def server_args(config: ServerConfig) -> dict[str, Any]:
    """The resolved configuration under the names of the command line, without secrets."""
    return {
        "model_path": config.model.place,
        "tokenizer_path": config.model.tokenizer_place,
        "served_model_name": config.model.served_name,
        "dtype": config.model.dtype,
        "device": config.model.device,
        "context_length": config.model.context_length,
        "enable_deterministic_inference": config.model.deterministic,
        "weights_digest": config.model.weights_digest,
        "weights_update_timeout": config.scheduler.weights_update_timeout_s,
        "random_seed": config.model.random_seed,
        "tp_size": config.tp_size,
        "page_size": config.pool.page_size,
        "max_total_tokens": config.pool.device_tokens,
        "hicache_host_tokens": config.pool.host_tokens,
        "enable_hierarchical_cache": config.cache.hierarchical,
        "disable_radix_cache": not config.cache.reuse_prefixes,
        "hicache_write_policy": config.cache.write_policy,
        "hicache_storage_prefetch_policy": config.cache.prefetch_policy,
        "radix_eviction_policy": config.cache.eviction_policy,
        "hicache_storage_backend": config.storage.backend or None,
        "hicache_storage_backend_extra_config": redacted(json.loads(config.storage.extra_config_json)),
        "max_running_requests": config.scheduler.max_running_requests,
        "chunked_prefill_size": config.scheduler.chunked_prefill_size,
        "max_queued_requests": config.scheduler.max_queued_requests,
        "schedule_policy": config.scheduler.schedule_policy,
        "watchdog_timeout": config.scheduler.watchdog_timeout_s,
        "host": config.http.host,
        "port": config.http.port,
        "api_key": redacted(config.http.api_key, "api_key") or None,
        "admin_api_key": redacted(config.http.admin_api_key, "admin_api_key") or None,
        "ssl_certfile": config.http.ssl_certfile or None,
        "enable_cache_report": config.http.cache_report,
        "enable_metrics": config.http.enable_metrics,
        "log_format": config.log.format,
        "log_level": config.log.level,
    }
