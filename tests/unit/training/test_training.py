from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from kvservice.compression.layer_groups import LayerGroups, uniform_groups
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import POD_EXACT
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import ConfigError
from kvservice.evaluation.calls import read_document
from kvservice.evaluation.one_pass import Variant, last_logits
from kvservice.models.adapter import LowRank, adapt
from kvservice.models.families.llama import LLAMA
from kvservice.models.llama import LlamaModel
from kvservice.models.tiny import InMemory, tiny_spec, tiny_tensors
from kvservice.training.attention import SharedAttention
from kvservice.training.loss import distances, kl_to
from kvservice.training.network import Network
from kvservice.training.settings import FIRST_DISTANT, TrainingSettings
from kvservice.training.state import Curve, load, save
from kvservice.training.texts import Texts, TrainingText
from kvservice.training.trainer import Trainer
from tests.unit.engine.driving import tokens

CPU = torch.device("cpu")
GROUPS = LayerGroups(((0, 1, 1, 1), (0, 0, 2, 2)))
CONTEXT = 480
LOGITS = 1e-3


@pytest.fixture
def source():
    spec = tiny_spec(num_layers=4)
    return spec, InMemory(tiny_tensors(spec, 0))


@pytest.fixture
def network(source):
    spec, tensors = source
    return Network(spec, LLAMA.weights(spec, tensors), CPU)


def some_texts(seed=0, count=3, length=700):
    return [
        TrainingText(f"text {i}", f"{seed + i:064x}", torch.tensor(tokens(length, seed + i), dtype=torch.int32))
        for i in range(count)
    ]


def settings(**more):
    given = {
        "mode": "key",
        "steps": 4,
        "context": CONTEXT,
        "texts_per_step": 2,
        "rank": 4,
        "loss_tokens": 64,
        "learning_rate": 1e-2,
    }
    return TrainingSettings(**{**given, **more})


def trainer(network, groups=GROUPS, **more):
    return Trainer(network, groups, settings(**more), Texts(some_texts(), CONTEXT), Texts(some_texts(50), CONTEXT + 1))


def some_changes(network, scale=0.1):
    drawn = torch.Generator().manual_seed(3)
    return {
        layer: {
            name: LowRank(
                torch.randn(4, getattr(network.layers[layer], name).shape[1], generator=drawn) * scale,
                torch.randn(getattr(network.layers[layer], name).shape[0], 4, generator=drawn) * scale,
            )
            for name in ("qkv", "o", "gate_up", "down")
        }
        for layer in (1, 3)
    }


@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
def test_what_is_trained_answers_as_what_is_evaluated_and_served(source, network, mode) -> None:
    spec, tensors = source
    plan, changes, text = SharingPlan(GROUPS, mode), some_changes(network), tokens(600)
    out = network.run(torch.tensor(text), SharedAttention(plan, CPU), changes).out
    trained = (out @ network.head.T)[-20:]
    adapter = FakeAdapter(changes)
    _, weights = adapt(spec, LLAMA.weights(spec, tensors), adapter)
    model = LlamaModel(spec, weights, CPU)
    torch.testing.assert_close(trained, last_logits(model, text, 20, Variant(plan)), atol=LOGITS, rtol=LOGITS)
    config = EngineConfig(kv_bytes=64 << 20, host_bytes=64 << 20, step_tokens=128)
    engine = Engine(model, config, NoWriter(), sharing=plan)
    served = served_logits(engine, text, 20)
    torch.testing.assert_close(trained, served, atol=LOGITS, rtol=LOGITS)


class FakeAdapter:
    """An adapter that was never in a file, in fp32."""

    def __init__(self, changes):
        self.changes, self.digest = changes, "fake"


def served_logits(engine, text, count):
    from kvservice.types import SessionId

    session_id = SessionId("s")
    read_document(engine, session_id, POD_EXACT, text[:-count])
    found = engine.score(session_id, text[-count:])
    engine.close()
    return found


@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
def test_gradients_are_those_of_finite_differences(source, mode) -> None:
    spec, tensors = source
    weights = LLAMA.weights(spec, tensors)
    network = Network(spec, replace(weights, embed=weights.embed), CPU)
    attention, text = SharedAttention(SharingPlan(GROUPS, mode), CPU), torch.tensor(tokens(420))
    target = network.run(text, SharedAttention(None, CPU), {}).out[-60:].detach()
    changes = some_changes(network)
    parameter = changes[3]["qkv"].b.requires_grad_()

    def loss():
        return kl_to(target, network.run(text, attention, changes).out[-60:], network.head)

    loss().backward()
    # Along the gradient, where what is seen stands out most from fp32's rounding.
    direction = parameter.grad / parameter.grad.norm()
    step = 0.05
    with torch.no_grad():
        parameter += step * direction
        above = float(loss())
        parameter -= 2 * step * direction
        below = float(loss())
    assert (above - below) / (2 * step) == pytest.approx(float((parameter.grad * direction).sum()), rel=0.02)


def test_layers_computed_again_give_the_same_gradients(network) -> None:
    found = []
    for recompute in (False, True):
        one = trainer(network, recompute=recompute)
        one.step()
        found.append([parameter.detach().clone() for parameter in one.parameters])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_the_loss_is_the_mean_divergence() -> None:
    drawn = torch.Generator().manual_seed(0)
    target, out, head = (torch.randn(size, 8, generator=drawn) for size in (300, 300, 50))
    out.requires_grad_()
    wanted, found = ((x @ head.T).log_softmax(-1) for x in (target, out))
    plain = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    (gradient,) = torch.autograd.grad(plain, out)
    ours = kl_to(target, out, head)
    ours.backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(out.grad, gradient)
    measured = distances(target, out.detach(), head, torch.zeros(300, dtype=torch.int64))
    assert measured.kl == pytest.approx(float(plain.detach()), rel=1e-4)
    assert measured.nll == pytest.approx(float(-found[:, 0].detach().mean()), rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"method": "full", "matrices": ("qkv",)}, {"state_weight": 1.0}], ids=str)
def test_training_brings_it_nearer_to_dense(network, more) -> None:
    # Random weights know no language, so only what was read is learnt.
    one_text = Texts(some_texts(count=1, length=CONTEXT + 1), CONTEXT + 1)
    given = settings(steps=20, context=CONTEXT + 1, texts_per_step=1, loss_tokens=128, learning_rate=5e-3, **more)
    one = Trainer(network, GROUPS, given, one_text, one_text)
    before = one.evaluate()
    for _ in range(20):
        one.step()
    after = one.evaluate()
    assert before.nll != before.dense_nll
    assert before.unshared_nll == pytest.approx(before.dense_nll)
    assert after.kl < 0.9 * before.kl


def test_where_nothing_is_shared_there_is_nothing_to_learn(network) -> None:
    # The same training without sharing: what it gains from more training alone is nothing.
    one = trainer(network, uniform_groups(4, 2, 8), layers="all")
    steps = [one.step(), one.step()]
    assert [step.gradient for step in steps] == [0.0, 0.0]
    assert all(not change.b.any() for of_layer in one.changes.values() for change in of_layer.values())
    assert one.evaluate().kl == 0.0
    with pytest.raises(ConfigError, match="shares no keys"):
        trainer(network, uniform_groups(4, 2, 8))


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(network, tmp_path) -> None:
    whole, first = trainer(network), trainer(network)
    steps = [whole.step() for _ in range(4)]
    identity = {"settings": whole.settings.identity}
    curve = Curve([first.step(), first.step()], {0: first.evaluate()})
    save(tmp_path / "x.run", first, curve, identity)
    second = trainer(network)
    resumed = load(tmp_path / "x.run", second, identity)
    assert resumed.held == curve.held
    resumed.steps += [second.step(), second.step()]
    for mine, theirs in zip(resumed.steps, steps, strict=True):
        assert asdict(mine) | {"seconds": 0} == asdict(theirs) | {"seconds": 0}
    for mine, theirs in zip(second.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_is_not_gone_on_with_other_settings(network, tmp_path) -> None:
    one, path = trainer(network), tmp_path / "x.run"
    one.step()
    save(path, one, Curve(), {"settings": one.settings.identity, "texts": "a"})
    assert settings(steps=9).identity == one.settings.identity
    with pytest.raises(ConfigError, match="with other texts"):
        load(path, trainer(network), {"settings": one.settings.identity, "texts": "b"})
    with pytest.raises(ConfigError, match="no whole state"):
        load(path, trainer(network, rank=5), {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="whole safetensors file"):
        load(path, trainer(network), {})


def test_parts_depend_on_texts_seed_and_number_alone() -> None:
    texts = Texts(some_texts(), CONTEXT)
    assert torch.equal(texts.part(1, 5), Texts(some_texts(), CONTEXT).part(1, 5))
    assert not torch.equal(texts.part(1, 5), texts.part(1, 6))
    assert texts.part(1, 5).shape == (CONTEXT,)
    assert texts.digest != Texts(some_texts(), CONTEXT + 1).digest
    with pytest.raises(ConfigError, match="none of 3 texts has 9,000 tokens"):
        Texts(some_texts(), 9_000)


def test_the_curve_is_written_as_a_table(network, tmp_path) -> None:
    one = trainer(network)
    curve = Curve(held={0: one.evaluate()})
    curve.steps.append(one.step())
    curve.write_csv(tmp_path / "x.csv")
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert lines[0].startswith("step,tokens,seconds,learning_rate,kl")
    assert len(lines) == 3
    assert lines[1].startswith("0,,")
    assert lines[2].startswith(f"1,{2 * CONTEXT},")


def test_rates_rise_stay_and_fall() -> None:
    found = [settings(steps=30, warmup_steps=5, learning_rate=1.0).rate(step) for step in range(30)]
    assert found[0] == 0.2
    assert found[4:21] == [1.0] * 17
    assert found[29] == pytest.approx(0.1)
    assert settings().context > FIRST_DISTANT
