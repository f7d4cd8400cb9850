import torch

from kvservice.kv.layout import KVLayout
from kvservice.tier.publish import GroupPublisher, fingerprint
from kvservice.tier.redis import RedisTier
from kvservice.tier.wire import decode_frame
from kvservice.tier.writer import WriteBehind
from kvservice.types import ModelShape, SessionId

SHAPE = ModelShape(2, 4, 2, 16, 64, 128, 256, 4096, dtype_bytes=2)
LAYOUT = KVLayout.of(SHAPE, torch.bfloat16)
TAG, SESSION = bytes(range(16)), SessionId("s")


def publish(kv_url, *writes):
    writer = WriteBehind(RedisTier(kv_url))
    writer.start()
    try:
        publisher = GroupPublisher(writer, fingerprint("digest", LAYOUT), LAYOUT)
        for first_group, tokens, groups in writes:
            publisher.write(TAG, SESSION, first_group, tokens, groups)
        assert writer.flush(10)
        return publisher.bytes_of(TAG, SESSION), writer.stats()
    finally:
        writer.close(5)


async def frames(kv_url):
    from redis.asyncio import Redis

    async with Redis.from_url(kv_url) as client:
        keys = [key async for key in client.scan_iter(b"kv1:*", count=1000) if await client.type(key) == b"string"]
        found = {}
        for key in keys:
            header, payload = decode_frame(key, await client.get(key))
            found[header.start, header.stop, key] = payload
        return found


async def test_groups_arrive_in_redis_bit_for_bit(kv_url):
    groups = torch.randn(3, *LAYOUT.group_shape).to(torch.bfloat16)
    tokens = list(range(16 + 3 * 64))
    stored, stats = publish(kv_url, (0, tokens, groups))
    assert (stats.written_frames, stats.failures) == (3, {})
    assert stored == stats.written_bytes
    found = {key[:2]: payload for key, payload in (await frames(kv_url)).items()}
    assert sorted(found) == [(16, 80), (80, 144), (144, 208)]
    for number, group in enumerate(groups):
        start = 16 + 64 * number
        assert bytes(found[start, start + 64]) == group.view(torch.uint8).numpy().tobytes()


async def test_keys_do_not_depend_on_how_groups_were_handed_over(kv_url):
    groups, tokens = torch.zeros(3, *LAYOUT.group_shape).to(torch.bfloat16), list(range(16 + 3 * 64))
    publish(kv_url, (0, tokens, groups))
    together = set(await frames(kv_url))
    publish(kv_url, (0, tokens[:80], groups[:1]), (1, tokens, groups[1:]))
    assert set(await frames(kv_url)) == together


async def test_another_history_has_other_keys(kv_url):
    group, tokens = torch.zeros(1, *LAYOUT.group_shape).to(torch.bfloat16), list(range(80))
    publish(kv_url, (0, tokens, group))
    publish(kv_url, (0, [7, *tokens[1:]], group))
    assert len(await frames(kv_url)) == 2


def test_fingerprints_tell_weights_and_layouts_apart():
    other = KVLayout.of(ModelShape(2, 4, 2, 16, 64, 128, 256, 4096, dtype_bytes=4), torch.float32)
    assert len({fingerprint("a", LAYOUT), fingerprint("b", LAYOUT), fingerprint("a", other)}) == 3
