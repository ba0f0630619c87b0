"""Redis servers that tests start by themselves: one, a cluster, a master with its replica and sentinel; with TLS."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers.program import Program, free_port

#: Slots of a cluster.
SLOTS = 16384

_PATIENCE_S = 60.0


def needs_redis(program: str = "redis-server") -> str:
    """The program; a test without it is skipped and says why."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed here; scripts/install-servers installs it")
    return found


def client(port: int = 0, *, path: str = "", password: str = "", username: str = "", db: int = 0) -> redis.Redis:
    """What a test asks a server itself with."""
    return redis.Redis(
        host="127.0.0.1", port=port, unix_socket_path=path or None, db=db, username=username or None,
        password=password or None, protocol=2, socket_timeout=_PATIENCE_S, retry=Retry(NoBackoff(), 0),
    )  # fmt: skip


def answers(ask: Callable[[], object]) -> bool:
    """Does a server answer at all?"""
    with contextlib.suppress(redis.RedisError, OSError):
        ask()
        return True
    return False


def holds(ask: Callable[[], bool]) -> Callable[[], bool]:
    """Is something so, as far as anybody answers?  A server that changes its role sends its clients away."""

    def is_so() -> bool:
        with contextlib.suppress(redis.RedisError, OSError):
            return ask()
        return False

    return is_so


class RedisServer(Program):
    """One server on a loopback port, which it keeps when it is started again; nothing on disk unless asked for."""

    def __init__(self, folder: Path, *options: str, password: str = "", program: str = "redis-server") -> None:
        self.port = free_port()
        self.path = str(folder / "redis.sock")
        self._password = password
        secret = ["--requirepass", password] if password else []
        folder.mkdir(exist_ok=True)
        command = [
            needs_redis(program), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder),
            "--unixsocket", self.path, "--daemonize", "no", *secret, *options,
        ]  # fmt: skip
        super().__init__(command, folder, self._pongs)

    @property
    def url(self) -> str:
        """Of the server, without its password."""
        return f"redis://127.0.0.1:{self.port}"

    def client(self, db: int = 0) -> redis.Redis:
        """Close it after use."""
        return client(self.port, password=self._password, db=db)

    def run(self, *command: str | int | bytes, db: int = 0) -> Any:
        """One command, as the administrator of the server."""
        with self.client(db) as asked:
            return asked.execute_command(*command)

    def _pongs(self) -> bool:
        if not answers(lambda: socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()):
            return False
        with client(path=self.path, password=self._password) as asked:
            return answers(asked.ping)


@contextlib.contextmanager
def redis_server(folder: Path, *options: str, password: str = "") -> Iterator[RedisServer]:
    """A server that runs."""
    with RedisServer(folder, *options, password=password) as server:
        assert isinstance(server, RedisServer)
        yield server


class Cluster:
    """Nodes that have shared the slots among themselves."""

    def __init__(self, nodes: Sequence[RedisServer]) -> None:
        self.nodes = nodes

    @property
    def url(self) -> str:
        """Of one node."""
        return self.nodes[0].url


def bus_port() -> tuple[str, str]:
    """What gives a node a port to talk to other nodes: the one that it would take is 10000 above its own, where there
    may be none."""
    return "--cluster-port", str(free_port())


@contextlib.contextmanager
def redis_cluster(folder: Path, masters: int = 3, *options: str) -> Iterator[Cluster]:
    """A cluster of masters alone, ready for every slot."""
    with contextlib.ExitStack() as stack:
        nodes = []
        buses = [bus_port() for _ in range(masters)]
        for number, bus in enumerate(buses):
            extra = ("--cluster-enabled", "yes", *bus, *options)
            nodes.append(stack.enter_context(redis_server(folder / f"node{number}", *extra)))
        share = -(-SLOTS // masters)
        for number, node in enumerate(nodes):
            node.run("CONFIG", "SET", "cluster-require-full-coverage", "no")
            node.run("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            first = number * share
            node.run("CLUSTER", "ADDSLOTSRANGE", first, min(first + share, SLOTS) - 1)
            if number:
                node.run("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, buses[0][1])
        _wait(lambda: all(_is_whole(node, masters) for node in nodes), "the cluster does not come together")
        yield Cluster(nodes)


def _is_whole(node: RedisServer, masters: int) -> bool:
    """Does this node know of all the others, and of every slot?"""
    told = node.run("CLUSTER", "INFO")
    assert isinstance(told, bytes), told
    wanted = {b"cluster_state:ok", b"cluster_size:%d" % masters, b"cluster_slots_ok:%d" % SLOTS}
    return wanted <= set(told.split())


@contextlib.contextmanager
def cluster_replica(folder: Path, cluster: Cluster) -> Iterator[RedisServer]:
    """A replica of the first node, which has caught up and whom all nodes know."""
    master = cluster.nodes[0]
    hasty = ("--cluster-node-timeout", "1000")
    with redis_server(folder / "replica", "--cluster-enabled", "yes", *hasty, *bus_port()) as replica:
        bus = int(master.run("CONFIG", "GET", "cluster-port")[1])
        replica.run("CLUSTER", "MEET", "127.0.0.1", master.port, bus)
        of = master.run("CLUSTER", "MYID").decode()
        _wait(holds(lambda: replica.run("CLUSTER", "REPLICATE", of) == b"OK"), "the replica does not know its master")
        _wait(holds(lambda: b"connected" in replica.run("ROLE")), "the replica does not find its master")
        # In a list of slots a replica stands behind its master.
        known = holds(lambda: all(len(slots) > 3 for slots in master.run("CLUSTER", "SLOTS")))
        _wait(known, "the master does not name its replica")
        yield replica


class Watched:
    """A master, its replica, and a sentinel that makes the replica the master when the master is gone."""

    SERVICE = "pages"

    def __init__(self, master: RedisServer, replica: RedisServer, sentinel_port: int, password: str) -> None:
        self.master = master
        self.replica = replica
        self.sentinel_port = sentinel_port
        self._password = password

    @property
    def url(self) -> str:
        """Of the sentinel."""
        return f"redis://127.0.0.1:{self.sentinel_port}"

    def wait_for_failover_blocking(self) -> None:
        """Until the replica is the master, and the sentinel says so to whoever asks."""
        _wait(holds(lambda: b"master" in self.replica.run("ROLE")), "the replica does not become master")
        _wait(holds(lambda: self._master_port() == self.replica.port), "the sentinel names the old master")

    def _master_port(self) -> int:
        with client(self.sentinel_port, password=self._password) as asked:
            return int(asked.sentinel_masters()[self.SERVICE]["port"])


@contextlib.contextmanager
def redis_with_sentinel(folder: Path, sentinel_password: str = "") -> Iterator[Watched]:
    """All three run, and the replica has caught up."""
    needs_redis("redis-sentinel")
    with contextlib.ExitStack() as stack:
        fast = ("--repl-diskless-sync-delay", "0")
        master = stack.enter_context(redis_server(folder / "master", *fast))
        follows = ("--replicaof", f"127.0.0.1 {master.port}", *fast)
        replica = stack.enter_context(redis_server(folder / "replica", *follows))
        port = free_port()
        home = folder / "sentinel"
        home.mkdir()
        secret = f"requirepass {sentinel_password}\n" if sentinel_password else ""
        name = Watched.SERVICE
        (home / "sentinel.conf").write_text(
            f"port {port}\nbind 127.0.0.1\ndir {home}\n{secret}sentinel monitor {name} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {name} 500\nsentinel failover-timeout {name} 5000\n"
        )
        _wait(lambda: "connected" in str(replica.run("ROLE")), "the replica does not find its master")

        def knows_both() -> bool:
            with client(port, password=sentinel_password) as asked:
                return answers(asked.ping) and len(asked.execute_command("SENTINEL", "REPLICAS", name)) == 1

        command = [needs_redis("redis-sentinel"), str(home / "sentinel.conf")]
        stack.enter_context(Program(command, home, knows_both))
        yield Watched(master, replica, port, sentinel_password)


class Certificates:
    """An authority and what it has signed, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
        ca = self._signed(self._name, self._key, [], is_authority=True)
        self.ca_file = self._write("ca.pem", ca.public_bytes(serialization.Encoding.PEM))

    def make(self, name: str, hosts: Sequence[str]) -> tuple[str, str]:
        """Files of a certificate for these hosts, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._signed(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, hosts)
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(encoding, form, serialization.NoEncryption())
        return self._write(f"{name}.pem", signed.public_bytes(encoding)), self._write(f"{name}.key", secret)

    def _signed(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, hosts: Sequence[str], *, is_authority: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_alternative, hosts))), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name: str, content: bytes) -> str:
        path = self._folder / name
        path.write_bytes(content)
        return str(path)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


class TlsServer(RedisServer):
    """A server that speaks TLS on a port of its own, beside its plain one."""

    def __init__(self, folder: Path, certificates: Certificates, hosts: Sequence[str], *options: str) -> None:
        self.tls_port = free_port()
        cert, key = certificates.make(folder.name, hosts)
        super().__init__(
            folder, "--tls-port", str(self.tls_port), "--tls-cert-file", cert, "--tls-key-file", key,
            "--tls-ca-cert-file", certificates.ca_file, "--tls-auth-clients", "no", *options,
        )  # fmt: skip

    @property
    def tls_url(self) -> str:
        """Of the port that speaks TLS."""
        return f"rediss://127.0.0.1:{self.tls_port}"


@contextlib.contextmanager
def tls_sentinel(folder: Path, certificates: Certificates, master_port: int) -> Iterator[int]:
    """A sentinel that speaks TLS alone, with its clients and with the master; its port."""
    folder.mkdir()
    port = free_port()
    cert, key = certificates.make("sentinel", ["127.0.0.1"])
    (folder / "sentinel.conf").write_text(
        f"port 0\ntls-port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor {Watched.SERVICE} 127.0.0.1 "
        f"{master_port} 1\ntls-cert-file {cert}\ntls-key-file {key}\ntls-ca-cert-file {certificates.ca_file}\n"
        "tls-auth-clients no\ntls-replication yes\n"
    )

    def answers_over_tls() -> bool:
        asked = redis.Redis(
            host="127.0.0.1", port=port, ssl=True, ssl_ca_certs=certificates.ca_file, protocol=2,
            retry=Retry(NoBackoff(), 0),
        )  # fmt: skip
        with asked:
            return answers(lambda: asked.execute_command("SENTINEL", "CKQUORUM", Watched.SERVICE))

    with Program([needs_redis("redis-sentinel"), str(folder / "sentinel.conf")], folder, answers_over_tls):
        yield port


def _wait(holds: Callable[[], bool], what: str) -> None:
    """Servers settle among themselves; nobody can be asked to call back."""
    deadline, never = time.monotonic() + _PATIENCE_S, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, what
        never.wait(0.02)
