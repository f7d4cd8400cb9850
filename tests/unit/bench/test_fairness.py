from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from kvservice.bench.fairness import PATIENT, FairnessLoad, FairnessResult, measure
from kvservice.client import Client, LocalService
from kvservice.models.tiny import write_tiny_checkpoint

LOAD = FairnessLoad(documents=30, doc_tokens=500, repeats=2)
MAX_BATCH = 4
"""Most of the flood waits at the gateway."""


@pytest.mark.slow
async def test_one_call_gets_its_answer_while_the_flood_still_waits_and_usage_has_all_of_them(tmp_path: Path) -> None:
    folder, keys = write_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "keys.json"
    owners = {"flood": "tenant", "one": "tenant", "ops": "operator"}
    entries = [
        {"sha256": hashlib.sha256(f"{tenant}-key".encode()).hexdigest(), "tenant": tenant, "role": role}
        for tenant, role in owners.items()
    ]
    keys.write_text(json.dumps({"keys": entries}))
    arguments = ["--model", str(folder), "--dtype", "fp32", "--threads", "1", "--max-batch", str(MAX_BATCH)]
    async with (
        asyncio.timeout(100),
        LocalService([*arguments, "--kv-bytes", "32MiB", "--api-keys", str(keys)]) as service,
        Client(service.address, "flood-key", retry=PATIENT) as flood,
        Client(service.address, "one-key") as one,
        Client(service.address, "ops-key") as ops,
    ):
        (info,) = await one.list_models()
        result = await measure(flood, one, LOAD, info.shape.vocab_size)
        records, _ = await ops.usage()
    assert result.flood_failed == 0
    assert len(result.alone_s) == len(result.beside_s) == LOAD.repeats
    # By counts: its first call overtook those of the flood that came before it.
    assert result.flood_left[0] > 0
    read = {tenant: sum(each.usage.prompt_tokens for each in records if each.tenant == tenant) for tenant in owners}
    assert read == {"flood": 30 * 500, "one": 5 * 500, "ops": 0}
    assert all(each.device_byte_s > 0 for each in records)


def test_ratios_are_of_the_median_alone() -> None:
    result = FairnessResult((1.0, 2.0, 9.0), (3.0, 4.0, 8.0), (3, 2, 1), 0)
    assert result.ratio == 2.0
    assert result.worst_ratio == 4.0
