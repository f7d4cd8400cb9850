"""Methods have a say in attention beside the C++ kernels as they have in torch."""

from dataclasses import replace

import pytest
import torch

from kvservice.config.recipes import DENSE, EVICTING, RECALL, REUSING
from kvservice.kernels import cpu
from kvservice.models.cpu_llama import CpuLlama
from kvservice.models.families.llama import LLAMA
from kvservice.models.tiny import InMemory, tiny_model, tiny_spec, tiny_tensors
from kvservice.types import Reuse, SessionId
from tests.unit.engine.driving import Drive, answering, make_engine, tokens

FP32_LOGITS = 1e-3

pytestmark = pytest.mark.skipif(cpu.isa() == "none", reason="the C++ kernels aren't built here")


def small(recipe):
    if recipe.reuse is not None:
        return replace(recipe, reuse=Reuse(recipe.reuse.plan, (("tokens", 24),)))
    return replace(
        recipe, eviction=replace(recipe.eviction, kept_tokens=128 if recipe.eviction.codec else 64, read_tokens=160)
    )


@pytest.fixture(scope="module")
def models():
    spec = tiny_spec(num_layers=4)
    fast = CpuLlama(spec, LLAMA.weights(spec, InMemory(tiny_tensors(spec, 0))))
    return fast, tiny_model(seed=0, num_layers=4)


@pytest.mark.parametrize("recipe", [small(each) for each in (*EVICTING, *REUSING)], ids=lambda recipe: recipe.name)
def test_kernels_and_torch_agree_and_others_in_the_batch_lose_nothing(models, recipe):
    scored, beside = [], []
    for model in models:
        drive = Drive(make_engine(model))
        drive.submit("s", recipe, document=tokens(200))
        drive.submit("dense", DENSE, document=tokens(150, 1), sampling=answering(5, logprobs=1))
        drive.submit("recall", RECALL, document=tokens(350, 2), prompt=tokens(9, 3), sampling=answering(5, logprobs=1))
        drive.run()
        scored.append(drive.engine.score(SessionId("s"), tokens(8, 4)))
        beside.append([[token for token, _ in answer] for answer in drive.answers.values()])
    torch.testing.assert_close(scored[0], scored[1], atol=FP32_LOGITS, rtol=FP32_LOGITS)
    assert beside[0] == beside[1]
