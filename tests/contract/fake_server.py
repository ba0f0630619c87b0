"""The whole HTTP application in this process, on fake ranks that answer as a test says.

`FakeServer` wires the real routes, manager and desk; only the sockets are replaced: what goes to a rank is kept in
`sent`, and what the rank says comes back through the event loop, later, like a message.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sglang_hicache import wire
from sglang_hicache.config import (
    CacheConfig,
    HttpConfig,
    ModelConfig,
    PoolConfig,
    SchedulerConfig,
    ServerConfig,
    StorageConfig,
)
from sglang_hicache.heartbeat import ServerState
from sglang_hicache.tokenizer.http import build_app
from sglang_hicache.tokenizer.intake import Intake
from sglang_hicache.tokenizer.manager import RequestManager
from sglang_hicache.tokenizer.process import open_control
from sglang_hicache.tokenizer.ranks_desk import RanksDesk
from sglang_hicache.tokenizer.services import Lifecycle, Phase, Services
from sglang_hicache.tokenizer.text import TextCodec

ADMIN_KEY, API_KEY = "the-admin-key", "the-api-key"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path) -> Path:
    """A model folder without weights: every byte is a token, 256 is the end of text."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "bos_token": None, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    facts = {"vocab_size": 257, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def make_config(model: Path, *, tp_size: int = 2, **http: Any) -> ServerConfig:
    """A server of two ranks with hierarchical cache and an admin key."""
    return ServerConfig(
        model=ModelConfig(
            path=str(model),
            tokenizer_path=str(model),
            served_name="org/tiny",
            dtype="float32",
            context_length=512,
        ),
        pool=PoolConfig(device_tokens=4096, host_tokens=8192),
        cache=CacheConfig(hierarchical=True),
        storage=StorageConfig(attach_timeout_s=0.3, drain_timeout_s=0.3),
        scheduler=SchedulerConfig(),
        http=HttpConfig(**{"admin_api_key": ADMIN_KEY} | http),
        tp_size=tp_size,
        run_dir="",
    )


class FakePort:
    """Sending end towards one fake rank."""

    def __init__(self, rank: int, receive: Callable[[int, Any], None]) -> None:
        self._rank = rank
        self._receive = receive
        self.is_full = False

    def send(self, message: Any) -> bool:
        """Like a socket: full, or delivered as the bytes it would be on the wire."""
        if self.is_full:
            return False
        self._receive(self._rank, msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)))
        return True


class FakeServer:
    """Routes, manager and desk over ranks that a test scripts."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.sent: list[tuple[int, Any]] = []
        self.ports = [FakePort(rank, self._received) for rank in range(config.tp_size)]
        #: What a rank answers to a command; None: it stays silent.
        self.answer_command: Callable[[int, Any], tuple[bool, str] | None] = lambda rank, command: (True, "done")
        #: What a rank finds out in a dry run.
        self.answer_report: Callable[[int], wire.DryRunReport] = lambda rank: wire.DryRunReport()
        self.answer_status: Callable[[int], dict[str, Any] | None] = lambda rank: {"state": "detached", "epoch": 0}
        #: Outputs of a request; None: the scheduler hangs.
        self.generate: Callable[[wire.NewRequest], list[wire.RequestOutput] | None] = echo
        self.codec = codec = TextCodec(config.model)
        self.requests = RequestManager(self.ports[0], codec.tokenizer_path)
        self.desk = RanksDesk(self.ports, grace_s=0.3, status_timeout_s=0.5)
        self.state = ServerState.READY
        self.lifecycle = Lifecycle(lambda: self.state)
        self.lifecycle.phase = Phase.SERVING
        self.control, self.startup = open_control(config, self.desk)
        intake = Intake(config, codec)
        self.app = build_app(
            Services(config, codec, intake, self.requests, self.desk, self.control, self.startup, self.lifecycle)
        )
        self._runner = asyncio.Runner()
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def close(self) -> None:
        """Close the client and the event loop."""
        self._runner.run(self._client.aclose())
        self._runner.run(self.control.close())
        self._runner.close()

    def run(self, work: Any) -> Any:
        """Run a coroutine on the server's event loop."""
        return self._runner.run(work)

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text."""
        return tuple(self.run(self.codec.encode(text)))

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, from start to end."""
        return self._runner.run(self._client.request(method, path, **options))

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The same for tests that do two things at once."""
        return await self._client.request(method, path, **options)

    def commands(self, kind: type) -> list[Any]:
        """Messages of one kind that were sent, of all ranks."""
        return [message for _, message in self.sent if isinstance(message, kind)]

    def _received(self, rank: int, message: Any) -> None:
        self.sent.append((rank, message))
        loop = asyncio.get_running_loop()
        match message:
            case wire.NewRequest():
                for output in self.generate(message) or []:
                    loop.call_soon(self.output, output)
            case wire.AbortRequest():
                pass
            case wire.QueryStatus():
                if (fields := self.answer_status(rank)) is not None:
                    loop.call_soon(self.desk.deliver, wire.StatusAnswer(id=message.id, rank=rank, **fields))
            case _:
                if (answer := self.answer_command(rank, message)) is not None:
                    success, text = answer
                    report = self.answer_report(rank) if isinstance(message, wire.DryRunStorage) else None
                    said = wire.CommandAnswer(id=message.id, rank=rank, success=success, message=text, report=report)
                    loop.call_soon(self.desk.deliver, said)

    def output(self, *outputs: wire.RequestOutput) -> None:
        """Let the leader say something."""
        self.requests.heard()
        self.requests.deliver(wire.OutputBatch(outputs=list(outputs)))


def echo(request: wire.NewRequest) -> list[wire.RequestOutput]:
    """Repeats the prompt, one token a tick, until max_new_tokens or the prompt's end."""
    said = request.token_ids[: request.sampling.max_new_tokens]
    kind = "length" if len(said) == request.sampling.max_new_tokens else "stop"
    return [
        wire.RequestOutput(
            rid=request.rid,
            token_ids=(token_id,),
            finish=wire.FinishReason(type=kind) if place == len(said) - 1 else None,
            prompt_tokens=len(request.token_ids),
        )
        for place, token_id in enumerate(said)
    ]
