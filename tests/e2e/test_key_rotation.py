"""Stored KV sealed at rest: keys are rotated while sessions live, and none of them is computed again for it."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvservice.drill.deployment import TENANT, Deployment, DrillConfig
from kvservice.models.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.timeout(240)

STORED_S = 60.0
DOCUMENT = "a story that is longer than any window. " * 30
OLD, NEW = "11" * 32, "22" * 32


def write_keys(path, current, keys):
    path.write_text(json.dumps({"current": current, "keys": keys}))
    path.chmod(0o600)


async def stored(client, session):
    async with asyncio.timeout(STORED_S):
        while not (await client.verify(TENANT, session)).checked_frames:
            await asyncio.sleep(0.1)


async def loaded(client):
    session = (await client.create_session(recipe="recall")).session_id
    await client.append(session, DOCUMENT)
    await client.ask(session, "what? ", max_new_tokens=4, ignore_eos=True)
    await stored(client, session)
    return session


async def restart_workers(deployment):
    """One by one, as a roll does."""
    for name in deployment.workers:
        await deployment.processes[name].stop()
        await deployment.processes[name].start()
        await deployment.until_whole()


async def ask(client, session):
    return await client.ask(session, "and then? ", max_new_tokens=8, ignore_eos=True, logprobs=1)


async def codecs(kv):
    keys = [key for key in await kv.command("KEYS", "*") if await kv.command("TYPE", key) == b"string"]
    return {b"raw+gcm" in (await kv.command("GETRANGE", key, 0, 400)) for key in keys}


@pytest.mark.slow
async def test_keys_are_rotated_and_no_session_is_computed_again(tmp_path):
    keys = tmp_path / "kv-keys.json"
    write_keys(keys, 1, {"1": OLD})
    model = str(write_tiny_checkpoint(tmp_path / "tiny"))
    config = DrillConfig(model, tmp_path / "data", gateways=("gateway-1",), kv_keys=keys)
    async with Deployment(config) as deployment:
        client = deployment.client
        first, second = await loaded(client), await loaded(client)
        assert await codecs(deployment.kv) == {True}
        fork = (await client.fork_session(second)).session_id
        expected = await ask(client, fork)
        await client.close_session(fork, purge=True)

        write_keys(keys, 2, {"1": OLD, "2": NEW})
        await restart_workers(deployment)
        after = await ask(client, second)
        assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)
        assert after.finished.usage.recomputed_tokens == 0
        assert sum(worker.ledger.restored_tokens for worker in (await client.stats()).workers) > 0
        found = await client.verify(TENANT)
        assert (found.missing_frames, found.corrupt_frames) == (0, 0)

        # What was sealed with a key that is gone is time, and no data: it is computed again, and says so.
        write_keys(keys, 2, {"2": NEW})
        await restart_workers(deployment)
        late = await ask(client, first)
        assert (late.token_ids, late.logprobs) == (expected.token_ids, expected.logprobs)
        assert late.finished.usage.recomputed_tokens > 0
