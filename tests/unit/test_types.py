from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.types import (
    BLOCK_TOKENS,
    GROUP_TOKENS,
    SINK_TOKENS,
    ModelShape,
    RecipeSpec,
    footprint,
    index_blocks,
)

SMOLLM2 = ModelShape(
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
    max_positions=8192,
)
MB = 1_000_000
TIERED = [EXACT, RECALL]
tokens = st.integers(0, 9000)


def test_a_token_of_smollm2_takes_23040_bytes() -> None:
    assert SMOLLM2.kv_bytes_per_token == 30 * 2 * 3 * 64 * 2


@pytest.mark.parametrize("recipe", TIERED, ids=lambda recipe: recipe.name)
@given(num_tokens=tokens)
def test_the_window_has_256_to_319_tokens_once_it_slides(recipe: RecipeSpec, num_tokens: int) -> None:
    start = recipe.window_start(num_tokens)
    assert (start - SINK_TOKENS) % GROUP_TOKENS == 0
    assert num_tokens - start <= 319
    if start > SINK_TOKENS:
        assert num_tokens - start >= 256


@given(num_tokens=tokens)
def test_a_window_never_moves_back_as_a_sequence_grows(num_tokens: int) -> None:
    assert RECALL.window_start(num_tokens) <= RECALL.window_start(num_tokens + 1)


@given(num_tokens=tokens)
def test_dense_keeps_every_token_on_the_device_in_whole_blocks(num_tokens: int) -> None:
    need = footprint(SMOLLM2, DENSE, num_tokens)
    blocks = -(-num_tokens // BLOCK_TOKENS)
    assert need.device_bytes == need.window_bytes == blocks * BLOCK_TOKENS * SMOLLM2.kv_bytes_per_token
    assert need.host_bytes == 0


@pytest.mark.parametrize("recipe", TIERED, ids=lambda recipe: recipe.name)
@given(num_tokens=tokens)
def test_each_distant_token_is_in_host_memory(recipe: RecipeSpec, num_tokens: int) -> None:
    distant = recipe.window_start(num_tokens) - SINK_TOKENS
    assert footprint(SMOLLM2, recipe, num_tokens).host_bytes == distant * SMOLLM2.kv_bytes_per_token


@pytest.mark.parametrize("recipe", [DENSE, *TIERED], ids=lambda recipe: recipe.name)
@given(num_tokens=tokens, more=st.integers(0, 500))
def test_a_footprint_never_shrinks_as_a_sequence_grows(recipe: RecipeSpec, num_tokens: int, more: int) -> None:
    now, later = (footprint(SMOLLM2, recipe, n) for n in (num_tokens, num_tokens + more))
    assert now.device_bytes <= later.device_bytes
    assert now.host_bytes <= later.host_bytes


@given(num_tokens=st.integers(0, 272))
def test_a_short_sequence_has_neither_index_nor_slots(num_tokens: int) -> None:
    need = footprint(SMOLLM2, RECALL, num_tokens)
    assert (need.index_bytes, need.slot_bytes, need.host_bytes) == (0, 0, 0)


def test_an_index_takes_16_plus_4_bytes_for_two_bits_of_a_key() -> None:
    # Codes: 64 numbers at 2 bits. Scale and zero: 4 bytes for each channel of a group of 64 tokens.
    groups = 128
    cells = SMOLLM2.num_layers * SMOLLM2.num_kv_heads
    assert index_blocks(SMOLLM2, RECALL, groups) * SMOLLM2.block_bytes == groups * GROUP_TOKENS * cells * (16 + 4)


def test_an_index_of_whole_keys_needs_no_scales() -> None:
    oracle = replace(RECALL, index_bits=16, index_params=0)
    cells = SMOLLM2.num_layers * SMOLLM2.num_kv_heads
    assert index_blocks(SMOLLM2, oracle, 2) * SMOLLM2.block_bytes == 2 * GROUP_TOKENS * cells * 64 * 2


def test_a_recall_session_of_8000_tokens_takes_less_than_a_sixth_of_dense() -> None:
    need = footprint(SMOLLM2, RECALL, 8000)
    dense = footprint(SMOLLM2, DENSE, 8000)
    assert need.device_bytes < dense.device_bytes / 6
    assert 23 * MB < need.device_bytes < 25 * MB
