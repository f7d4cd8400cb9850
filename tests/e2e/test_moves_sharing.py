"""Sessions whose layers share distant keys move and resume as others do: real gRPC and Redis, tiny models."""

from __future__ import annotations

import random

import pytest

from kvservice.compression.layer_groups import LayerGroups
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.worker import publishing
from tests.e2e.test_moves import PATIENCE_S, nothing_is_left, serving
from tests.unit.cli.test_sharing_options import write_map


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(publishing, "BEGIN_TIMEOUT_S", PATIENCE_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def document():
    letters = random.Random(7)
    return "".join(letters.choice("abcdefghij klmnop.\n") for _ in range(700))


@pytest.mark.parametrize("recipe", ["pod", "pod-exact"])
async def test_a_session_that_shares_keys_answers_bit_for_bit_alike_wherever_it_goes_on(
    folder, document, state_url, kv_url, tmp_path, recipe
):
    sharing_map = str(write_map(tmp_path / "map.json", folder))
    async with serving(folder, state_url, kv_url, sharing_map=sharing_map) as service:
        client = service.client
        session = await service.loaded(document, recipe)
        forks = [(await client.fork_session(session)).session_id for _ in range(2)]
        warm = await service.ask(session)
        holder = (await client.get(session)).worker_id

        # Moved: from the tier, all of it.
        assert (await client.move_session(forks[0])).worker_id != holder
        moved = await service.ask(forks[0])
        assert (moved.token_ids, moved.logprobs) == (warm.token_ids, warm.logprobs)
        assert moved.finished.usage.recomputed_tokens == 0
        restored = (await service.resumed()).restored_tokens
        assert restored > 500
        # It must not help the next.
        await client.close_session(forks[0], purge=True)

        # Resumed: the worker that had it has gone.
        await service.workers[holder].stop()
        resumed = await service.ask(forks[1])
        assert (resumed.token_ids, resumed.logprobs) == (warm.token_ids, warm.logprobs)
        assert resumed.finished.usage.recomputed_tokens == 0
        assert (await service.resumed()).misses == {}
        for each in (session, forks[1]):
            await client.close_session(each, purge=True)
        await nothing_is_left(kv_url)


async def test_kv_by_another_map_is_refused_and_computed_again(folder, document, state_url, kv_url, tmp_path):
    maps = [
        str(write_map(tmp_path / f"{index}.json", folder, LayerGroups(anchors)))
        for index, anchors in enumerate([((0, 0), (0, 1)), ((0, 1), (0, 0))])
    ]
    async with serving(folder, state_url, kv_url, names=("a",), sharing_map=maps[0]) as service:
        sharing = await service.loaded(document, "pod")
        whole = await service.loaded(document, "recall")
    async with serving(folder, state_url, kv_url, names=("b",), sharing_map=maps[1]) as service:
        num_tokens = (await service.client.get(sharing)).num_tokens
        answer = await service.ask(sharing)
        assert answer.finished.usage.recomputed_tokens == num_tokens - 1
        assert dict((await service.resumed()).misses) == {"fingerprint": 1}
        # Others have nothing to do with the map.
        assert (await service.ask(whole)).finished.usage.recomputed_tokens == 0
        assert (await service.resumed()).restored_tokens > 500
        # What it has computed is stored by its own map, and read again.
    async with serving(folder, state_url, kv_url, names=("c",), sharing_map=maps[1]) as service:
        again = await service.ask(sharing, "and now? ")
        assert again.finished.usage.recomputed_tokens == 0
        assert dict((await service.resumed()).misses) == {}
