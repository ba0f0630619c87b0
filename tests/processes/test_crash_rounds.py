"""kill -9 at random points, again and again on one folder: what is left is readable, right, and all there is.

After every round: every file of the store is a whole page under its own name, what a dead writer left is swept, no
process lives on, the texts are those of a run without cache, and the fixed prompts come from storage again.
"""

from __future__ import annotations

import concurrent.futures
import os
import random
import select
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes.server import Server, cached
from tests.processes.store_scan import Scan
from tests.processes.synthetic_server import PATIENCE_S, SyntheticServer

#: Who dies; in the short form each of them once or twice on one folder.
VICTIMS = ("storage", "storage", "rank", "server")
#: Rounds of the long form on one folder: the scan of each must not read thousands of files.
ROUNDS_PER_STORE = 25
#: A stored page of the synthetic model, header included.
SYNTHETIC_PAGE_BYTES = 512
#: Seeds of the two stores that are not as they come: one is encrypted, one so small that it evicts all the time.
ENCRYPTED, SMALL = 6, 7
SMALL_PAGES = 96


class SyntheticRounds:
    """One folder, and the servers that die over it."""

    def __init__(self, folder: Path, seed: int, config: dict[str, Any]) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._starts = 0
        self._config = {"file_storage_path": str(folder / "store"), "prefetch_threshold": 4} | config
        if config.get("encryption"):
            (folder / "key").touch(mode=0o600)
            (folder / "key").write_bytes(self._random.randbytes(32))
        self._scan = Scan(folder / "store")
        self._fixed = [self._tokens(length) for length in (30, 61, 90)]
        self._server = self._started()
        self._server.ask(self._fixed)
        self._server.quiesce()
        #: Requests that were under way when somebody died, over all rounds.
        self.caught = 0

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(1000) for _ in range(count)]

    def _started(self) -> SyntheticServer:
        self._starts += 1
        server = SyntheticServer(self._folder / f"server{self._starts}", self._config)
        server.attach()
        return server

    def round(self, victim: str) -> None:
        """Load, a death in the middle of it, and life afterwards."""
        chance, server = self._random, self._server
        # Some prompts are known to the store, so that it is read as well as written when the blow falls.
        prompts = [*self._fixed, *(self._tokens(chance.randrange(20, 120)) for _ in range(4))]
        chance.shuffle(prompts)
        rids = [server.submit(prompt) for prompt in prompts]
        storage = server.storage_pids()
        assert len(storage) == 1
        watched = os.pidfd_open(storage[0])
        victims = {"storage": storage, "rank": [server.process.pid], "server": [*storage, server.process.pid]}
        # A quick server is done with everything within the delay: half of the blows fall without one.
        delay_s = chance.choice((0.0, chance.random() * 0.02))
        server.kill_after(chance.randrange(4 * len(prompts)), delay_s, victims[victim])
        self.caught += len(set(rids) - server.ended)
        assert select.select([watched], [], [], PATIENCE_S)[0], "a storage process outlives its rank"
        os.close(watched)
        if victim == "storage":
            self._survives(rids, prompts)
        else:
            server.__exit__(None, None, None)
            self._scan.pages()
            self._server = self._started()
        self._is_well()

    def _survives(self, rids: list[str], prompts: list[list[int]]) -> None:
        """No request fails, no text changes, the status says what happened, and storage can be attached again."""
        server = self._server
        server.finish(rids)
        for rid, prompt in zip(rids, prompts):
            assert server.tokens[rid] == server.model.reference(prompt, 4)
        status = server.wait_for_status(lambda status: status.state == "detached", "detached after the loss")
        assert "ended by itself (killed by signal 9)" in status.last_error, status.last_error
        assert not server.storage_pids(), "nothing respawns by itself"
        self._scan.pages()
        server.flush()
        server.attach()

    def _is_well(self) -> None:
        server = self._server
        assert self._scan.temporary_folders() == 1, "what dead writers left is not swept"
        found = server.ask(self._fixed)
        # A store that evicts may have chosen these.
        assert found > 0 or "max_size" in self._config, "nothing comes from storage any more"
        server.quiesce()
        assert self._scan.pages() > 0
        assert self._scan.set_aside() == 0, "a page was wrong"
        assert "storage_corrupt_pages" not in server.status().counters

    def wait_until_it_fits(self, max_pages: int) -> None:
        """Who lives for a moment makes room, whatever those before had written in their short lives."""
        self._server.wait_until(lambda: self._scan.names() <= max_pages, f"at most {max_pages} pages")
        assert self._scan.pages() > 0

    def close(self) -> None:
        """Kill the last server, and see that its storage process goes with it."""
        (storage,) = self._server.storage_pids()
        watched = os.pidfd_open(storage)
        self._server.__exit__(None, None, None)
        assert select.select([watched], [], [], PATIENCE_S)[0]
        os.close(watched)


def run_synthetic(folder: Path, seed: int, victims: list[str]) -> None:
    configs = {
        ENCRYPTED: {"encryption": {"key_file": str(folder / "key")}},
        SMALL: {"max_size": SMALL_PAGES * SYNTHETIC_PAGE_BYTES},
    }
    rounds = SyntheticRounds(folder, seed, configs.get(seed, {}))
    for victim in victims:
        rounds.round(victim)
    if seed == SMALL:
        rounds.wait_until_it_fits(SMALL_PAGES)
    rounds.close()
    assert rounds.caught > 0, "nobody died in the middle of anything"


@pytest.mark.parametrize("seed", (0, ENCRYPTED, SMALL))
def test_fm38_fm55_rounds_with_the_synthetic_model(tmp_path: Path, seed: int) -> None:
    run_synthetic(tmp_path, seed, random.Random(seed).sample(VICTIMS, len(VICTIMS)))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_two_hundred_rounds_with_the_synthetic_model(tmp_path: Path, seed: int) -> None:
    """Six stores as they come, and the two others."""
    run_synthetic(tmp_path, seed, random.Random(seed).choices(VICTIMS, k=ROUNDS_PER_STORE))


# ------------------------------------------------------------------------------------------- the real model

EXACT = ("--enable-deterministic-inference", "--page-size", "16", "--chunked-prefill-size", "256")
TEXT = "Each function returns a list of the names that are defined in the given namespace, sorted by name. "
FIXED = tuple(f"{start} {8 * TEXT}" for start in ("First.", "Another one.", "At last."))
NEW_TOKENS = 16
#: Who dies in the rounds of the short form.  A storage process dies first: what its server wrote before is found again
#: by the same server, later by others.
SHORT = ("storage", "rank", "server")
#: Rounds of the long form on one folder.
ROUNDS_PER_REAL_STORE = 10


def fresh_prompts(seed: int, number: int) -> list[str]:
    """Prompts of one round: nobody has asked them before, and none begins like another."""
    chance = random.Random(f"{seed} {number}")
    words = ("module", "returns", "value", "if", "the", "file", "is", "not", "open", "list", "of", "names")
    return [" ".join(chance.choices(words, k=chance.randrange(60, 200))) for _ in range(3)]


class RealRounds:
    """One folder, and real servers that die over it."""

    def __init__(self, folder: Path, seed: int, rounds: int, tp_size: int) -> None:
        self._folder = folder
        self._seed = seed
        self._tp_size = tp_size
        self._random = random.Random(seed)
        self._scan = Scan(folder / "store")
        #: What every prompt gives without any cache.
        self._wanted = self._without_cache(rounds)
        #: Requests that were under way when somebody died, over all rounds.
        self.caught = 0
        self._server = self._started()
        self._check_texts(list(FIXED))
        self._server.quiesce()

    def _without_cache(self, rounds: int) -> dict[str, list[int]]:
        prompts = [*FIXED, *(prompt for number in range(rounds) for prompt in fresh_prompts(self._seed, number))]
        with Server(self._folder / "run", *EXACT, "--disable-radix-cache", tp_size=self._tp_size) as server:
            replies = [server.generate(prompt, NEW_TOKENS) for prompt in prompts]
        return {prompt: reply["output_ids"] for prompt, reply in zip(prompts, replies)}

    def _started(self) -> Server:
        server = Server(
            self._folder / "run", *EXACT, "--enable-hierarchical-cache", "--max-total-tokens", "2048",
            "--hicache-ratio", "4", "--hicache-storage-backend", "file", "--file-storage-path",
            str(self._folder / "store"), "--hicache-storage-prefetch-policy", "wait_complete",
            "--hicache-storage-backend-extra-config", '{"prefetch_threshold": 16}', tp_size=self._tp_size,
        )  # fmt: skip
        return server.__enter__()

    def round(self, number: int, victim: str) -> None:
        """Load, a death in the middle of it, and life afterwards."""
        server, fresh = self._server, fresh_prompts(self._seed, number)
        _drain_log(server)
        prompts = [*FIXED, *fresh]
        self._random.shuffle(prompts)
        everybody = [server.process.pid, *server.pids(".")]
        watched = {pid: os.pidfd_open(pid) for pid in everybody}
        storage, ranks = server.pids("storage_process"), server.pids("scheduler")
        assert len(storage) == len(ranks) == self._tp_size
        victims = {"storage": [self._random.choice(storage)], "rank": [self._random.choice(ranks)], "server": everybody}
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as clients:
            asked = {prompt: clients.submit(_ask, server, prompt) for prompt in prompts}
            self._wait_for_the_moment(list(watched.values()))
            self.caught += sum(not answer.done() for answer in asked.values())
            for pid in victims[victim]:
                signal.pidfd_send_signal(watched[pid], signal.SIGKILL)
            # One storage process or rank that dies takes those of the other ranks along.
            for pid in storage if victim == "storage" else everybody:
                assert select.select([watched[pid]], [], [], PATIENCE_S)[0], "a process lives on"
        for fd in watched.values():
            os.close(fd)
        self._check_answers({prompt: answer.result() for prompt, answer in asked.items()}, victim)
        self._scan.pages()
        self._recover(victim)
        # What the round before was writing may be stored in part: it must not be wrong for that.
        self._check_texts([*FIXED, *fresh])
        self._is_well()

    def _wait_for_the_moment(self, watched: list[int]) -> None:
        """Either so many pages after the start of the load, or a while after it; nobody ends meanwhile."""
        if self._random.random() < 0.5:
            wanted = self._scan.names() + self._random.randrange(1, 25)
            for _ in range(200):
                if self._scan.names() >= wanted or select.select(watched, [], [], 0.005)[0]:
                    break
        else:
            select.select(watched, [], [], self._random.random() * 0.3)

    def _check_answers(self, answers: dict[str, list[int] | None], victim: str) -> None:
        for prompt, answer in answers.items():
            assert answer == self._wanted[prompt] or (answer is None and victim != "storage"), (victim, prompt, answer)

    def _recover(self, victim: str) -> None:
        server = self._server
        if victim != "storage":
            assert server.finish() == (1 if victim == "rank" else -signal.SIGKILL), server.log
            self._server = self._started()
            return
        status = server.wait_until(
            lambda ranks: all(rank["state"] == "detached" for rank in ranks), "detached after the loss"
        )
        assert "signal 9" in status["ranks"][0]["last_error"], status
        server.quiesce()
        server.flush()
        assert server.attach(self._folder / "store").status_code == 200
        assert cached(server.generate(FIXED[0], NEW_TOKENS))["storage"] > 0, "nothing comes from storage any more"
        server.quiesce()
        server.flush()

    def _check_texts(self, prompts: list[str]) -> None:
        replies = self._server.generate_all(prompts, NEW_TOKENS)
        for prompt, reply in zip(prompts, replies):
            assert reply["output_ids"] == self._wanted[prompt], prompt
        self._from_storage = sum(cached(reply).get("storage", 0) for reply in replies)

    def _is_well(self) -> None:
        assert self._from_storage > 0, "nothing comes from storage any more"
        status = self._server.quiesce()
        assert not any(rank["counters"].get("storage_corrupt_pages") for rank in status["ranks"]), status
        assert self._scan.pages() > 0
        assert self._scan.set_aside() == 0, "a page was wrong"
        assert self._scan.temporary_folders() == self._tp_size, "what dead writers left is not swept"
        assert len(list((self._folder / "run").glob("hicache-*"))) == 1, "run folders of the dead are left"

    def close(self) -> None:
        """Stop the last server in order; nothing of it is left."""
        self._server.__exit__(None, None, None)
        assert not list((self._folder / "run").glob("hicache-*"))
        assert self._scan.temporary_folders() == 0

    def abandon(self) -> None:
        """After a failure: kill the server, and show what it said."""
        self._server.process.kill()
        self._server.finish()
        print(self._server.log)


def _ask(server: Server, prompt: str) -> list[int] | None:
    """The answer, or None from a server that died over it."""
    try:
        return server.generate(prompt, NEW_TOKENS)["output_ids"]
    except (httpx.HTTPError, AssertionError, ValueError):
        return None


def _drain_log(server: Server) -> None:
    """Take what has been logged: a server whose log nobody reads stops when the pipe is full."""
    assert server.process.stderr is not None
    while select.select([server.process.stderr], [], [], 0)[0]:
        if not (data := os.read(server.process.stderr.fileno(), 65536)):
            return
        server.log += data.decode()


def run_real(folder: Path, seed: int, victims: list[str], tp_size: int = 1) -> None:
    rounds = RealRounds(folder, seed, len(victims), tp_size)
    with ExitStack() as undo:
        undo.callback(rounds.abandon)
        for number, victim in enumerate(victims):
            rounds.round(number, victim)
        rounds.close()
        undo.pop_all()
    assert rounds.caught > 0, "nobody died in the middle of anything"


def test_fm38_fm55_rounds_with_the_real_model(tmp_path: Path) -> None:
    run_real(tmp_path, 0, list(SHORT))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 21))
def test_two_hundred_rounds_with_the_real_model(tmp_path: Path, seed: int) -> None:
    """Half of them on two ranks, of which one dies."""
    victims = random.Random(seed).choices(VICTIMS, k=ROUNDS_PER_REAL_STORE)
    run_real(tmp_path, seed, victims, tp_size=1 + seed % 2)
