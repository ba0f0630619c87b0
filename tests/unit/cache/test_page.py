"""Page keys, seeds and namespaces against the vectors that other engines' stores were filled with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.cache import page
from sglang_hicache.cache.page import (
    bigram_page_keys,
    chain,
    encode_tokens,
    event_id,
    flat_page_keys,
    namespace,
    namespace_seed,
    page_keys,
)
from sglang_hicache.errors import UserError
from sglang_hicache.storage.page_format import FORMAT_VERSION

ONE_TO_EIGHT = list(range(1, 9))
FIRST = "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72"
SECOND = "4ebfa8a1f3c341517621838c6e1b9aa350307e3f00b3cbd1a07ef740f54396d6"


def hexes(keys: list[bytes]) -> list[str]:
    return [key.hex() for key in keys]


def test_pages_of_four():
    assert hexes(page_keys(ONE_TO_EIGHT, 4)) == [FIRST, SECOND]


def test_without_page_size_there_is_one_key():
    whole = "8b4b2444e57aed8c2d05a1293255da1b048c63224317d4666230760935fa4a18"
    assert hexes(page_keys(ONE_TO_EIGHT, None)) == [whole]


@pytest.mark.parametrize(
    ("extra_key", "cache_salt", "seed"),
    [
        ("k", None, "50c6fb5300236b4d3fc439d424a8ad7f95d671c8e5eaa02bc1af79455a4bcc0f"),
        (None, "s", "c825a7fb5423c8a6cc5990d09f8ca69181b05fdffd804c10db403e9e52699f6b"),
        ("k", "s", "91d20eff3992f863829f7468d530cd1b20ceab0a75fc2443124f35710b1032e7"),
        ("", None, "fd649dd130277fa0773e23e84ddfa4ec779d9df77087968a60d7cefb9050ab1d"),
        (None, None, ""),
        (None, "", ""),
    ],
)
def test_seeds(extra_key, cache_salt, seed):
    assert namespace_seed(extra_key, cache_salt).hex() == seed


def test_first_page_below_a_seed():
    keys = page_keys([1, 2, 3, 4], 4, namespace_seed("k", None))
    assert hexes(keys) == ["9f49a448f60887edbebf2b02c2a21ae2f7632708638cb3b80bb9aa21db7e10fc"]


def test_bigram_page():
    first = "f721fe42aac11dcbfd1a17f24cc5765a0d5b6bc264d1c0b6581d775a7344c11f"
    assert bigram_page_keys(ONE_TO_EIGHT, 4)[0].hex() == first


def test_bigram_page_needs_one_token_more_than_positions():
    assert len(bigram_page_keys(ONE_TO_EIGHT + [9], 4)) == 2
    assert bigram_page_keys([1], 4) == []


def test_wide_page():
    wide = "a2ad9fe92a425d06aaaf12e074281aa24f51ecd05ff669e37f20e537b82238a1"
    assert hexes(page_keys([1, 2, 3, 2**33], 4)) == [wide]


def test_a_wide_page_changes_only_its_own_body():
    keys = page_keys([1, 2, 3, 4, 1, 2, 3, 2**33], 4)
    assert keys[0].hex() == FIRST
    assert keys[1] == chain(keys[0], b"\xff" + b"".join(t.to_bytes(8, "little") for t in (1, 2, 3, 2**33)))


def test_event_id():
    assert event_id(bytes.fromhex(FIRST)) == -3488128144981237669


def test_partial_last_page_is_hashed_as_it_is():
    keys = page_keys([1, 2, 3, 4, 5], 4)
    assert keys[0].hex() == FIRST
    assert keys[1] == chain(keys[0], encode_tokens([5]))


@pytest.mark.parametrize("tokens", [[1, 2, -1, 4], [1, 2, 2**33, -4], [2**64, 0, 0, 0]])
def test_tokens_out_of_range_are_refused(tokens):
    with pytest.raises(UserError, match="token id"):
        page_keys(tokens, 4)


def test_flat_keys_are_narrow_only():
    with pytest.raises(UserError, match=str(2**32)):
        encode_tokens([1, 2**32])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 9), st.binary(max_size=32))
def test_flat_keys_equal_keys_of_tokens(tokens, page_size, seed):
    assert flat_page_keys(encode_tokens(tokens), 4 * page_size, seed) == page_keys(tokens, page_size, seed)


def test_no_tokens_have_no_keys():
    assert page_keys([], 4) == page_keys([], None) == flat_page_keys(b"", 4, b"") == []


def test_tenants_with_equal_concatenation_have_different_seeds():
    assert namespace_seed("a", "bc") != namespace_seed("ab", "c")


@given(*(st.none() | st.text(max_size=6) for _ in range(4)))
def test_seeds_are_equal_only_for_equal_tenants(extra_a, salt_a, extra_b, salt_b):
    same = (extra_a, salt_a or None) == (extra_b, salt_b or None)
    assert (namespace_seed(extra_a, salt_a) == namespace_seed(extra_b, salt_b)) == same


FIELDS = {
    "weights_digest": "0" * 64,
    "architecture": '{"model_type":"llama"}',
    "layers": 4,
    "kv_heads_total": 2,
    "head_dim": 16,
    "kv_dtype": "bfloat16",
    "page_size": 64,
    "numerics_class": "fast",
}


def test_namespace_is_64_hex_digits_and_stable():
    assert len(namespace(**FIELDS)) == 64
    assert namespace(**FIELDS) == namespace(**FIELDS)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("weights_digest", "1" * 64),
        ("architecture", '{"model_type":"qwen2"}'),
        ("layers", 5),
        ("kv_heads_total", 4),
        ("head_dim", 32),
        ("kv_dtype", "float32"),
        ("page_size", 16),
        ("numerics_class", "exact:1:cpu:2.13:avx512"),
    ],
)
def test_every_field_separates_namespaces(field, other):
    assert namespace(**{**FIELDS, field: other}) != namespace(**FIELDS)


def test_the_format_of_stored_pages_separates_namespaces(monkeypatch):
    """A server that meets pages of another version misses them; it does not find them, and find them damaged."""
    before = namespace(**FIELDS)
    monkeypatch.setattr(page, "FORMAT_VERSION", FORMAT_VERSION + 1)
    assert namespace(**FIELDS) != before
