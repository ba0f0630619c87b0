"""What the Mooncake backend is told: where the master is, what this process gives to the store, how long it may wait.

The names of the keys are those that SGLang's clients send.  Used by `registry.py` in every process that checks a
command; the backend gets its record ready made.  Pure.  A text with a placeholder is checked on its rank, when it is
known.
"""

from __future__ import annotations

import re

from sglang_hicache.storage.capacity import parse_size
from sglang_hicache.storage.object_name import DEFAULT_PREFIX
from sglang_hicache.storage.placeholders import has_placeholder
from sglang_hicache.storage.settings import BackendSettings

#: What the library gives away in one piece is counted in these; a segment of another size is refused, or lies idle.
SEGMENT_UNIT_BYTES = 16 << 20

#: The library's word for clients that find each other without a metadata server.
NO_METADATA_SERVER = "P2PHANDSHAKE"

_LONGEST_PREFIX = 200
_LONGEST_CONNECT_S = 60.0
#: A call waits for a process that hangs four times at most, and the library does not wait longer than a minute.
_LONGEST_WAIT_S = 10.0
_PROTOCOL = re.compile(r"[a-z][a-z_]{0,31}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
#: Two of them are taken at once, on each rank; more than this is a slip of the pen.
_LARGEST_BUFFER = 16 << 30
_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")


class MooncakeSettings(BackendSettings, frozen=True, kw_only=True):
    """One master, and the processes that lend it memory."""

    #: The master, as host:port; one of several masters is found through "etcd://host:port".
    master_server_address: str
    #: How clients find each other: "P2PHANDSHAKE", which needs no server, or the URL of a metadata server.
    metadata_server: str = NO_METADATA_SERVER
    #: "tcp", or a transport that the installed build of the library knows, such as "rdma".
    protocol: str = "tcp"
    #: Network devices for the transport, with commas between them; "": the library looks for them.
    device_name: str = ""
    #: Name or address under which others reach this machine; "": the address from which it reaches the master.
    local_hostname: str = ""
    #: Memory of each storage process that becomes part of the store, in the form of max_size, and takes the pages in it
    #: along when the process ends; 0: none, the pages are with other processes.
    global_segment_size: int | str = 0
    #: Memory of each lane for pages that are not sent from where they lie: small ones, encrypted ones.
    local_buffer_size: int | str = 16 << 20
    #: In front of every name, and behind it what SGLang appends to its own names.
    prefix: str = DEFAULT_PREFIX
    extra_backend_tag: str = ""
    #: The library keeps tenants apart, where its master was started with them.
    tenant_id: str = "default"
    #: Seconds until a connection to the master is there, and until the master, or whoever holds a page, has said more.
    connect_timeout_s: float = 1.0
    timeout_s: float = 2.0
    #: Taken because clients send them; they change nothing.  The master is asked at every open, group or none.
    master_metrics_port: int = 0
    check_server: bool = False
    enable_group_semantics: bool = False
    client_server_address: str = ""
    ssd_offload_path: str = ""
    #: Only false: the one needs a host pool that the library allocates, the other is for who holds the pages.
    standalone_storage: bool = False
    enable_ssd_offload: bool = False

    def __post_init__(self) -> None:
        self._check_places()
        self._check_names()
        self._check_sizes()
        for name, seconds, most_s in (
            ("connect_timeout_s", self.connect_timeout_s, _LONGEST_CONNECT_S),
            ("timeout_s", self.timeout_s, _LONGEST_WAIT_S),
        ):
            if not 0.1 <= seconds <= most_s:
                raise ValueError(f"{name}={seconds} is not allowed; it takes seconds, 0.1 to {most_s:.0f}")
        if self.standalone_storage:
            raise ValueError(
                "standalone_storage=true is not possible: the host pool is not the library's; start mooncake_client "
                "beside the server and leave global_segment_size at 0, then it holds the pages just the same"
            )
        if self.enable_ssd_offload:
            raise ValueError(
                "enable_ssd_offload=true is not possible here: it is for the process that holds the pages; start "
                "mooncake_client with --enable_offload"
            )

    def _check_places(self) -> None:
        address = self.master_server_address
        if not has_placeholder(address) and "://" not in address and split_address(address) is None:
            raise ValueError(
                f"master_server_address={address!r} is not allowed; it takes host:port, or etcd://host:port"
            )
        server = self.metadata_server
        if not has_placeholder(server) and server != NO_METADATA_SERVER and "://" not in server:
            raise ValueError(f"metadata_server is not allowed; it takes {NO_METADATA_SERVER!r} or a URL")
        for name, text in (("master_server_address", address), ("metadata_server", server)):
            if "@" in text and "://" in text and not text.startswith(("http://", "https://")):
                # The library takes it for a part of the host's name, and writes it to the log when nobody has that.
                raise ValueError(f"{name} holds a user or a password, which the library cannot use there; leave it out")
        host = self.local_hostname
        if not has_placeholder(host) and (len(host) > 255 or re.search(r"[\s/]", host)):
            raise ValueError(f"local_hostname={host!r} is not allowed; it takes a name or an address, or ''")

    def _check_names(self) -> None:
        if not _PROTOCOL.fullmatch(self.protocol):
            raise ValueError(f"protocol={self.protocol!r} is not allowed; it takes a word such as 'tcp' or 'rdma'")
        for name, word in (("extra_backend_tag", self.extra_backend_tag), ("tenant_id", self.tenant_id)):
            if word and not has_placeholder(word) and not _WORD.fullmatch(word):
                raise ValueError(f"{name}={word!r} is not allowed; it takes up to 64 of letters, digits and ._-")
        prefix = self.prefix
        if not has_placeholder(prefix) and (
            not 0 < len(prefix.encode(errors="replace")) <= _LONGEST_PREFIX or not prefix.isprintable()
        ):
            raise ValueError(
                f"prefix={prefix!r} is not allowed; it takes 1 to {_LONGEST_PREFIX} bytes that can be printed"
            )

    def _check_sizes(self) -> None:
        for name, size in (
            ("global_segment_size", self.global_segment_size),
            ("local_buffer_size", self.local_buffer_size),
        ):
            if has_placeholder(size):
                continue
            try:
                parse_size(size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if not has_placeholder(self.local_buffer_size) and parse_size(self.local_buffer_size) > _LARGEST_BUFFER:
            raise ValueError(f"local_buffer_size={self.local_buffer_size!r} is not allowed; it takes 16GiB at most")

    def place(self) -> str:
        return "" if has_placeholder(self.master_server_address) else self.master_server_address

    def may_write_late(self) -> bool:
        """Over TCP whatever arrives is put into memory by this process, and ends with it.  A network card that writes
        by itself may finish what it was told to, into memory of the rank that has another use by then."""
        return self.protocol != "tcp"

    def name_prefix(self) -> str:
        """What the name of every page begins with."""
        return f"{self.prefix}{self.extra_backend_tag}/" if self.extra_backend_tag else self.prefix

    def segment_bytes(self) -> int:
        """What this process gives to the store, in whole units."""
        return -(-parse_size(self.global_segment_size) // SEGMENT_UNIT_BYTES) * SEGMENT_UNIT_BYTES


def split_address(text: str) -> tuple[str, int] | None:
    """Host and port; None: it is no address of that form."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65536:
        return None
    return found[1].strip("[]"), int(found[2])
