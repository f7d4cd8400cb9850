"""More tokens in fewer bits, by hand, and what its bytes are."""

from dataclasses import replace

import pytest
import torch

from kvservice.compression.methods import METHODS, Held, Seen, stages_of
from kvservice.config.recipes import RECIPES
from kvservice.errors import ConfigError
from kvservice.kernels import cpu
from kvservice.models.tiny import tiny_model
from kvservice.recall.held import highest
from kvservice.types import SessionId
from tests.unit.engine.driving import Drive, make_engine, tokens

METHODS.discover("kvservice.methods")
RECIPE = RECIPES["more_tokens"]


def codec():
    return METHODS.get("more_tokens").codec


def test_the_last_queries_choose_and_neighbours_share_what_one_of_them_got():
    scorer = type(METHODS.get("more_tokens").scorer)(window=2, kernel=3)
    probs = torch.tensor([[0.9, 0, 0, 0, 0.1, 0, 0], [0, 0, 0.6, 0.1, 0, 0.3, 0], [0, 0, 0.4, 0.1, 0, 0.3, 0.2]])
    seen = Seen(0, probs.log()[None, None], probs[None, None], torch.arange(7).unsqueeze(0), 4, 0, 0)
    told = scorer.observe(seen, {"mass": torch.zeros(1, 7)})
    assert told["mass"][0].tolist() == pytest.approx([0, 0, 1.0, 0.2, 0, 0.6, 0.2])
    held = Held(torch.arange(7).unsqueeze(0), 7, [0] * 7, torch.tensor([5]), 1, told)
    # Tokens 1 and 3 have the best neighbour; 5 and 6 are the window.
    assert highest(scorer.score(held), torch.tensor([5]))[0].nonzero()[:, 0].tolist() == [1, 2, 3, 5, 6]


def test_only_the_last_queries_must_be_seen():
    scorer = METHODS.get("more_tokens").scorer
    assert [scorer.watches(number) for number in (0, 7, 8, 900)] == [True, True, False, False]


def test_two_bits_by_hand():
    """Channel 0 goes from 1 to 7: steps of 2. A token's values go from -3 to 3."""
    keys, values = torch.zeros(1, 32, 8), torch.zeros(1, 32, 8)
    keys[0, :, 0] = torch.tensor([1.0, 3.0, 4.9, 7.0] * 8)
    values[0, 5] = torch.tensor([-3.0, -1, 1, 3, -3, -1.2, 0.8, 3])
    parts = codec().encode(keys, values, 2)
    # Of each token channels 0, 2, 4, 6, the first in the low bits, then the odd ones. Those that are 0 lie between
    # levels 1 and 2 and are rounded to the even one.
    assert parts[0][0, :8].tolist() == [0b10101000, 170, 0b10101001, 170, 0b10101010, 170, 0b10101011, 170]
    decoded_keys, decoded_values = codec().decode(parts, 8, torch.float32, 2)
    assert decoded_keys[0, :4, 0].tolist() == pytest.approx([1, 3, 5, 7])
    assert decoded_values[0, 5].tolist() == pytest.approx([-3, -1, 1, 3, -3, -1, 1, 3])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_restored_is_off_by_half_a_step_at_most(bits):
    generator = torch.Generator().manual_seed(bits)
    keys, values = torch.randn(2, 3, 32, 64, generator=generator).unbind(0)
    restored = codec().decode(codec().encode(keys, values, bits), 64, torch.float32, bits)
    for exact, found, along in ((keys, restored[0], 1), (values, restored[1], 2)):
        step = (exact.amax(along, keepdim=True) - exact.amin(along, keepdim=True)) / (2**bits - 1)
        assert bool(((exact - found).abs() <= step / 2 + 1e-5).all())


def test_keys_by_token_would_be_worse_where_channels_differ():
    """The negative control: a channel that is large in every key costs the others nothing only if it stands alone."""
    keys = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    keys[:, :, 3] += 40
    by_channel = codec().decode(codec().encode(keys, keys, 4), 64, torch.float32, 4)
    errors = [float((keys - found).square().mean()) for found in by_channel]
    assert errors[0] < errors[1] / 10


@pytest.mark.skipif(cpu.isa() == "none", reason="the C++ kernels aren't built here")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_unpack_what_the_codec_packed(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    keys, values = torch.randn(2, 3, 64, 32, generator=generator).to(dtype).unbind(0)
    groups = [some.reshape(6, 32, 32) for some in (keys, values)]
    parts = [part.view(3, 2, -1) for part in codec().encode(*groups, bits)]
    packed = codec().for_kernels(parts, 32, dtype, bits)
    arena = torch.randn(6, 16, 32, generator=generator).to(dtype)
    table = torch.arange(6, dtype=torch.int32).view(6, 1)
    q = torch.randn(3, 2, 32, generator=generator).to(dtype)
    part = cpu.HeldPart(arena, table, 80, packed)
    out, logits, weights = cpu.attend_held(q, part, torch.tensor([80, 70, 65], dtype=torch.int32), 0.2)
    restored = codec().decode([part.flatten(0, 1) for part in parts], 32, dtype, bits)
    all_keys, all_values = (
        torch.cat([some.view(3, 64, 32), arena[side * 3 : side * 3 + 3]], 1).float()
        for side, some in enumerate(restored)
    )
    wanted = q.float() @ all_keys.transpose(1, 2) * 0.2
    for head, count in enumerate((80, 70, 65)):
        wanted[head, :, count:] = -torch.inf
    near = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights, wanted.softmax(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.float(), wanted.softmax(-1) @ all_values, atol=near, rtol=near)


def test_more_tokens_lie_in_the_bytes_of_fewer():
    """Measured where they lie, with their quantisers: what the arena has handed out."""
    model = tiny_model(seed=0)
    held = {}
    for bits, codec_name in ((0, None), (8, "more_tokens"), (4, "more_tokens"), (2, "more_tokens")):
        limits = replace(RECIPE.eviction, kept_tokens=128, read_tokens=1100, codec=codec_name, bits=bits)
        drive = Drive(make_engine(model))
        drive.ask("s", replace(RECIPE, eviction=limits), document=tokens(900))
        memory = drive.engine.memory_of(SessionId("s"))
        assert memory.device_bytes <= 128 * model.spec.shape.kv_bytes_per_token
        assert drive.engine.stats().window_bytes == memory.device_bytes
        held[bits] = int((memory.held.positions >= 0).sum(1).min())
        drive.engine.check()
    assert held[0] == 128
    assert held[2] > held[4] > held[8] > held[0]
    assert held[4] > 1.7 * held[0]


def test_a_budget_without_room_for_a_group_is_refused():
    tiny = replace(RECIPE, eviction=replace(RECIPE.eviction, kept_tokens=48))
    assert stages_of(tiny) is not None
    with pytest.raises(ConfigError, match="have no room for 32 tokens in 4 bits"):
        Drive(make_engine(tiny_model(seed=0))).ask("s", tiny, document=tokens(100))
