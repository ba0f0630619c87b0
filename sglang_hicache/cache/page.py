"""Page keys, the hash chain behind them, and the namespace of a model.  Pure functions.

A page key is SHA-256 over the key of the page before it and the tokens of the page, so one key stands for
the whole prefix that ends there and equal keys mean equal prefixes:

    tokens    t0 ... t63 | t64 ... t127 | ...
    keys      k0         | k1           |        k0 = H(seed || t0..t63)    k1 = H(k0 || t64..t127)

The seed separates tenants (`extra_key`, `cache_salt`) and is empty without them.  What else the bytes of a
page depend on - weights, architecture, dtype - is said by the namespace and never by the key, so a key is a
pure function of tokens and tenant and can be computed at any time, whether a store is attached or not.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from itertools import chain as flatten
from itertools import pairwise

from sglang_hicache.errors import UserError
from sglang_hicache.storage.page_format import FORMAT_VERSION

#: Bytes of a page key and of a seed.
KEY_BYTES = 32
#: Bytes of one token in a flat key.
TOKEN_BYTES = 4

_WIDEST_NARROW_TOKEN = 2**32 - 1
_WIDEST_TOKEN = 2**64 - 1
#: First byte of a page that holds a token above 2^32-1; part of the established key format.
_WIDE_MARK = b"\xff"
_SEED_DOMAIN = b"sglang-cache-namespace-v1"


def encode_tokens(tokens: Sequence[int]) -> bytes:
    """Tokens as little-endian uint32: the flat key of the tree, and the body of a page that is hashed."""
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error:
        wrong = next(token for token in tokens if not 0 <= token <= _WIDEST_NARROW_TOKEN)
        raise UserError(f"token id {wrong} is not allowed: a token id is between 0 and 2^32-1") from None


def _page_body(tokens: Sequence[int]) -> bytes:
    """What is hashed of one page: uint32 words, or marked uint64 words if one token does not fit."""
    if max(tokens) <= _WIDEST_NARROW_TOKEN:
        return encode_tokens(tokens)
    if min(tokens) < 0 or max(tokens) > _WIDEST_TOKEN:
        raise UserError(f"token ids {min(tokens)} to {max(tokens)}: a token id is between 0 and 2^64-1")
    return _WIDE_MARK + struct.pack(f"<{len(tokens)}Q", *tokens)


def chain(previous: bytes, page_body: bytes) -> bytes:
    """Key of the page with this body that follows `previous` (a key, a seed, or b"" for neither)."""
    return hashlib.sha256(previous + page_body).digest()


def page_keys(tokens: Sequence[int], page_size: int | None, seed: bytes = b"") -> list[bytes]:
    """Keys of all pages of `tokens`.

    A shorter last page is hashed as it is: callers align first where they want whole pages only.  Without a
    page size there is one key over everything.
    """
    step = page_size or max(len(tokens), 1)
    keys: list[bytes] = []
    previous = seed
    for start in range(0, len(tokens), step):
        previous = chain(previous, _page_body(tokens[start : start + step]))
        keys.append(previous)
    return keys


def flat_page_keys(flat: bytes, page_bytes: int, previous: bytes) -> list[bytes]:
    """`page_keys` of tokens that are already encoded, in pages of `page_bytes`, following `previous`."""
    keys: list[bytes] = []
    for start in range(0, len(flat), page_bytes):
        previous = chain(previous, flat[start : start + page_bytes])
        keys.append(previous)
    return keys


def bigram_page_keys(tokens: Sequence[int], page_size: int, seed: bytes = b"") -> list[bytes]:
    """Keys where position j stands for the pair (token j, token j+1), as a draft model's cache needs it.

    A page of P positions reads P+1 tokens; the last token only completes the pair before it.
    """
    pairs = list(pairwise(tokens))
    keys: list[bytes] = []
    previous = seed
    for start in range(0, len(pairs), page_size):
        previous = chain(previous, _page_body(list(flatten.from_iterable(pairs[start : start + page_size]))))
        keys.append(previous)
    return keys


def namespace_seed(extra_key: str | None, cache_salt: str | None) -> bytes:
    """The seed of a tenant, or b"" where neither is given; an empty salt counts as none.

    Each part carries its length: ("a", "bc") and ("ab", "c") must never share a cache.
    """
    salt = cache_salt or None
    if extra_key is None and salt is None:
        return b""
    return hashlib.sha256(_SEED_DOMAIN + _seed_part(extra_key) + _seed_part(salt)).digest()


def _seed_part(text: str | None) -> bytes:
    if text is None:
        return b"\x00"
    encoded = text.encode()
    return b"\x01" + len(encoded).to_bytes(8, "little") + encoded


def event_id(key: bytes) -> int:
    """The signed 64-bit id under which KV events speak of a page."""
    return int.from_bytes(key[:8], "big", signed=True)


def namespace(
    *,
    weights_digest: str,
    architecture: str,
    layers: int,
    kv_heads_total: int,
    head_dim: int,
    kv_dtype: str,
    page_size: int,
    numerics_class: str,
) -> str:
    """64 hex digits that say everything the bytes of a page depend on besides its key.

    Model level: no tenant (that is the seed) and no rank (head ranges are part of an object's name), so
    servers of another tensor-parallel size find each other's pages.  `architecture` is the canonical JSON of
    the config fields that shape K and V.
    """
    fields = {
        # A store that was filled by another version is never read, and no page of it is taken for a damaged one.
        "format_version": FORMAT_VERSION,
        "weights_digest": weights_digest,
        "architecture": architecture,
        "layers": layers,
        "kv_heads_total": kv_heads_total,
        "head_dim": head_dim,
        "kv_dtype": kv_dtype,
        "page_size": page_size,
        "numerics_class": numerics_class,
    }
    # JSON quotes and escapes, so no two sets of fields have the same text.
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
