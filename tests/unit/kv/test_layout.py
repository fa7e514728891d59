"""Blocks, bytes and prompt hashes of KV."""

from dataclasses import replace
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.worker import KvFormat, KvMode
from splitserve.kv.layout import (
    block_bytes,
    blocks_for,
    format_difference,
    full_blocks,
    prompt_hash,
    prompt_kv_bytes,
    span,
)

KV = KvFormat("abc", "float32", 16, 4, 2, 8, 2048, KvMode.PUSH, "shm")
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=50)


@given(st.integers(0, 10_000), st.integers(1, 512))
def test_blocks_hold_all_tokens_and_not_one_block_more(count: int, size: int) -> None:
    blocks = blocks_for(count, size)
    assert blocks * size >= count > (blocks - 1) * size or count == blocks == 0
    assert blocks - full_blocks(count, size) == (count % size != 0)


def test_a_block_holds_keys_and_values_of_all_heads() -> None:
    assert block_bytes(block_size=128, kv_heads=8, head_dim=64, dtype_bytes=2) == 2 * 128 * 8 * 64 * 2


def test_a_prompts_kv_is_whole_blocks_in_every_layer() -> None:
    assert prompt_kv_bytes(17, KV) == 2 * 2048 * 4
    assert prompt_kv_bytes(16, KV) == 1 * 2048 * 4


@given(tokens, tokens)
def test_prompt_hashes_agree_exactly_when_the_prompts_do(one: list[int], other: list[int]) -> None:
    assert (prompt_hash(one) == prompt_hash(other)) == (one == other)
    assert prompt_hash(tuple(one)) == prompt_hash(one)
    assert len(prompt_hash(one)) == 16


def test_the_prompt_hash_is_blake2b_over_little_endian_int32() -> None:
    assert prompt_hash([1, 258]) == blake2b(b"\x01\x00\x00\x00\x02\x01\x00\x00", digest_size=16).digest()


@given(st.data(), st.integers(0, 20), st.integers(1, 20))
def test_a_span_maps_each_prompt_block_from_its_place_to_its_claim(data: st.DataObject, first: int, count: int) -> None:
    table = [100 + i for i in range(first + count)]
    claimed = [500 + i for i in range(count)]
    begin = data.draw(st.integers(first, first + count))
    end = data.draw(st.integers(begin, first + count))
    copies = span(table, claimed, first, begin, end)
    assert [
        (source - 100, destination - 500 + first)
        for source, destination in zip(copies.source, copies.destination, strict=True)
    ] == [(block, block) for block in range(begin, end)]
    assert len(copies) == end - begin


def test_a_span_beyond_what_was_claimed_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        span([1, 2, 3], [7], 0, 0, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "other"),
        ("dtype", "bfloat16"),
        ("block_size", 32),
        ("layers", 5),
        ("kv_heads", 4),
        ("head_dim", 16),
        ("block_bytes", 1),
        ("mode", KvMode.PULL),
        ("transport", "nixl"),
    ],
)
def test_a_format_that_differs_is_refused_with_the_field_named(field: str, value: object) -> None:
    changes: dict[str, Any] = {field: value}
    sentence = format_difference(KV, replace(KV, **changes))
    assert f"kv.{field} is" in sentence
    assert str(value) in sentence
    assert format_difference(KV, replace(KV)) == ""
