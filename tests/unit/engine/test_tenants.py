"""Several tenants on one engine: whose tokens are read, whose bytes stay, and who pays for them. Nothing is timed."""

import random

import pytest

from kvservice.config.recipes import DENSE, RECALL
from kvservice.engine import sequences
from kvservice.errors import TENANT_ANSWERS, DeadlineExceeded, Overloaded, QuotaExceeded
from kvservice.kv.ledger import Owner
from kvservice.kv.occupancy import ByteSeconds
from kvservice.models.tiny import tiny_model
from kvservice.types import CallId, SessionId, TenantTerms
from tests.unit.engine.driving import PLENTY, Drive, answering, device_bytes, make_engine, tokens

ANN, BOB, EVE = b"ann" + bytes(13), b"bob" + bytes(13), b"eve" + bytes(13)
LENGTH = 256


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0, num_layers=1)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def read(drive, name, tenant, length=LENGTH, new=1, **more):
    seed = sum(name.encode())
    return drive.submit(
        name,
        more.pop("recipe", DENSE),
        document=tokens(length - 8, seed=seed),
        prompt=tokens(8, seed=seed + 1),
        sampling=answering(new),
        tenant_tag=tenant,
        **more,
    )


def steps_to_first_token(drive, name):
    steps = 0
    while (CallId(name), 0) not in drive.answers:
        drive.step()
        steps += 1
    return steps


@pytest.mark.parametrize("new", [1, 40], ids=["reading", "reading and answering"])
@pytest.mark.parametrize("before", [1, 3, 20])
def test_a_call_reads_at_most_twice_as_long_beside_the_flood_of_another_tenant(model, before, new) -> None:
    alone = Drive(make_engine(model))
    read(alone, "one", BOB)
    unloaded = steps_to_first_token(alone, "one")
    drive = Drive(make_engine(model))
    for number in range(20):
        read(drive, f"flood-{number}", ANN, new=new)
    for _ in range(before):
        drive.step()
    read(drive, "one", BOB)
    assert steps_to_first_token(drive, "one") <= 2 * unloaded
    assert len(drive.finished) < 20
    drive.run()
    assert len(drive.finished) == 21


def test_of_one_tenant_first_come_is_first_served(model) -> None:
    drive = Drive(make_engine(model))
    for number in range(6):
        read(drive, f"flood-{number}", ANN)
    drive.run()
    assert list(drive.finished) == [f"flood-{number}" for number in range(6)]


def test_priorities_order_a_tenants_own_calls_and_nobody_elses(model) -> None:
    drive = Drive(make_engine(model))
    read(drive, "last", ANN)
    for number in range(4):
        read(drive, f"urgent-{number}", ANN, priority=100)
    read(drive, "one", BOB, priority=-100)
    drive.run()
    assert list(drive.finished)[0:2] in (["urgent-0", "one"], ["one", "urgent-0"])
    assert list(drive.finished)[-1] == "last"


def test_no_priority_takes_the_memory_of_what_another_tenant_is_answered(model) -> None:
    drive = Drive(make_engine(model, room=device_bytes(model, LENGTH + 64), host_bytes=0))
    read(drive, "bob", BOB, new=20)
    steps_to_first_token(drive, "bob")
    with pytest.raises(Overloaded):
        read(drive, "ann", ANN, priority=100)
    # His own do.
    read(drive, "urgent", BOB, priority=1)
    drive.run()
    assert list(drive.finished) == ["urgent", "bob"]


def test_priorities_that_rise_get_a_tenant_no_more_than_its_share(model) -> None:
    alone = Drive(make_engine(model))
    read(alone, "one", BOB)
    unloaded = steps_to_first_token(alone, "one")
    drive = Drive(make_engine(model, max_batch=64))
    read(drive, "ann-0", ANN, length=1024)
    drive.step()
    read(drive, "one", BOB)
    for number in range(1, 30):
        # Each goes before all that she has sent, of which a part is read.
        read(drive, f"ann-{number}", ANN, length=1024, priority=number)
        drive.step()
        if (CallId("one"), 0) in drive.answers:
            break
    assert number <= 2 * unloaded
    drive.run()


def test_weights_say_how_much_is_read_of_each(model) -> None:
    drive = Drive(make_engine(model, max_batch=64))
    for number in range(20):
        read(drive, f"ann-{number}", ANN, terms=TenantTerms(weight=3.0))
        read(drive, f"bob-{number}", BOB, terms=TenantTerms(weight=1.0))
    drive.until(lambda: len(drive.finished) == 16)
    of_ann = sum(name.startswith("ann") for name in drive.finished)
    assert 11 <= of_ann <= 13


def test_a_chunk_of_the_flood_on_its_way_through_the_layers_is_waited_for_one_step_at_most(model) -> None:
    deep = tiny_model(seed=0, num_layers=4)
    drive = Drive(make_engine(deep))
    # Eve's answer makes reading go by layers.
    read(drive, "eve", EVE, length=16, new=200)
    steps_to_first_token(drive, "eve")
    read(drive, "flood", ANN)
    drive.until(lambda: drive.engine._planner._prefill is not None)
    read(drive, "one", BOB, length=100)
    drive.step()
    chunk = drive.engine._planner._prefill
    assert chunk is None or all(item.sequence.tenant == BOB for item in chunk.items)
    drive.step()
    assert any(item.sequence.tenant == BOB for item in drive.engine._planner._prefill.items)


def test_another_tenant_finds_room_though_the_flood_has_taken_all_bytes(model) -> None:
    drive = Drive(make_engine(model, room=device_bytes(model, *[LENGTH + 1] * 3), host_bytes=0))
    for number in range(3):
        read(drive, f"flood-{number}", ANN)
    with pytest.raises(Overloaded):
        read(drive, "flood-3", ANN)
    drive.step()
    read(drive, "one", BOB)
    steps_to_first_token(drive, "one")
    drive.run()
    # Who made room was served all the same.
    assert len(drive.finished) == 4


def test_what_answers_already_makes_no_room_for_another_tenant(model) -> None:
    drive = Drive(make_engine(model, room=device_bytes(model, LENGTH + 64), host_bytes=0))
    read(drive, "ann", ANN, new=20)
    steps_to_first_token(drive, "ann")
    with pytest.raises(Overloaded):
        read(drive, "bob", BOB)
    drive.run()
    read(drive, "bob", BOB)
    drive.run()


def test_a_flood_takes_all_places_and_who_comes_late_finds_one(model) -> None:
    drive = Drive(make_engine(model, max_batch=16))
    for number in range(16):
        read(drive, f"flood-{number}", ANN, length=16)
    with pytest.raises(Overloaded) as caught:
        read(drive, "flood-16", ANN, length=16)
    assert caught.value.reason == TENANT_ANSWERS
    read(drive, "bob", BOB, length=16)
    read(drive, "eve", EVE, length=16)
    with pytest.raises(Overloaded) as caught:
        read(drive, "more", EVE, length=16)
    assert caught.value.reason == "overloaded"
    drive.run()


def test_a_call_that_waits_is_given_up_as_soon_as_it_cant_be_in_time(model) -> None:
    clock = Clock()
    drive = Drive(make_engine(model, clock=clock))
    read(drive, "first", ANN)
    drive.run()
    drive.engine._meters.prefill_tokens_per_s = 128.0
    read(drive, "second", ANN)
    read(drive, "third", ANN, length=1280, deadline=clock.now + 30.0)
    drive.step()
    assert "third" not in drive.failed
    clock.now += 27.0
    drive.step()
    assert isinstance(drive.failed["third"], DeadlineExceeded)
    assert drive.failed["third"].reason == "deadline_unreachable"
    drive.run()


def test_a_tenants_sessions_keep_to_its_bytes_and_its_idle_ones_make_room(model) -> None:
    two = device_bytes(model, LENGTH + 1, LENGTH + 1)
    drive = Drive(make_engine(model))
    terms = TenantTerms(device_bytes=two)
    for name in "abc":
        read(drive, name, ANN, terms=terms)
        drive.run()
    held = drive.engine._sequences
    assert [name for name in "abc" if held.get(SessionId(name))] == ["b", "c"]
    # Others have their own.
    read(drive, "d", BOB)
    drive.run()
    assert held.get(SessionId("b")) is not None


def test_what_runs_of_a_tenant_leaves_no_room_beyond_its_bytes(model) -> None:
    drive = Drive(make_engine(model))
    terms = TenantTerms(device_bytes=device_bytes(model, LENGTH + 1, LENGTH + 1))
    read(drive, "a", ANN, terms=terms)
    read(drive, "b", ANN, terms=terms)
    with pytest.raises(QuotaExceeded) as caught:
        read(drive, "c", ANN, terms=terms)
    assert caught.value.metadata == {"quota": "device_bytes"}
    assert caught.value.retry_after_s is not None
    drive.run()
    read(drive, "c", ANN, terms=terms)
    with pytest.raises(QuotaExceeded, match="host bytes"):
        read(drive, "e", EVE, recipe=RECALL, length=2000, terms=TenantTerms(host_bytes=1000))
    drive.run()


def test_anothers_document_is_read_as_one_that_nobody_has_read(model) -> None:
    """By counts: tokens reused, tokens read, steps. So no clock can tell, whatever the other does with it."""

    def cost(drive) -> tuple[int, ...]:
        drive.submit("mine", DENSE, document=tokens(200), prompt=(7,), sampling=answering(2), tenant_tag=EVE)
        first, before = drive.engine.headroom().load.waiting_tokens, drive.engine.stats().steps
        drive.run()
        usage = drive.finished[CallId("mine")].usage
        return first, usage.reused_tokens, usage.prompt_tokens, drive.engine.stats().steps - before

    nobody = cost(Drive(make_engine(model)))
    read_before = Drive(make_engine(model))
    read_before.ask("theirs", DENSE, document=tokens(200), tenant_tag=ANN)
    read_before.engine.fork(SessionId("theirs"), SessionId("fork"))
    assert cost(read_before) == nobody
    assert nobody[1] == 0
    # The owner finds it.
    again = read_before.ask("again", DENSE, document=tokens(200), prompt=(7,), sampling=answering(2), tenant_tag=ANN)
    assert again.usage.reused_tokens > 100


class Metered:
    """Adds up what an engine's ledger says over time, and what its sessions are told to have taken."""

    def __init__(self, engine, clock, chance) -> None:
        self.drive = Drive(engine)
        self.clock = clock
        self.chance = chance
        self.by_ledger = [0.0, 0.0]
        self.names = []

    def pass_time(self) -> None:
        ledger, seconds = self.drive.engine._sequences.ledger, self.chance.random()
        device = sum(
            ledger.used_bytes(owner) + ledger.shared_bytes(owner) for owner in (Owner.WINDOW, Owner.INDEX, Owner.SLOTS)
        )
        host = ledger.used_bytes(Owner.HOST) + ledger.shared_bytes(Owner.HOST)
        self.by_ledger[0] += seconds * device
        self.by_ledger[1] += seconds * host
        self.clock.now += seconds

    def submit(self) -> None:
        choose, name = self.chance.choice, f"s{len(self.names)}"
        try:
            self.drive.submit(
                name,
                choose([DENSE, RECALL]),
                document=tokens(choose([60, 300, 450]), seed=choose([1, 2])),
                prompt=(7, 8),
                tenant_tag=choose([ANN, BOB]),
                retain=choose([True, True, False]),
                sampling=choose([answering(4), answering(3, n=2, temperature=0.5)]),
            )
            self.names.append(name)
        except Overloaded:
            pass

    def by_sessions(self):
        engine = self.drive.engine
        taken = [ByteSeconds(each.device_byte_s, each.host_byte_s) for each in self.drive.finished.values()]
        for name in self.names:
            engine.release(SessionId(name))
            taken.append(engine.take_byte_seconds(SessionId(name)))
        taken += [engine._sequences.take_left_over(tenant) for tenant in (ANN, BOB)]
        return [sum(each.device for each in taken), sum(each.host for each in taken)]


@pytest.mark.parametrize("seed", range(4))
def test_byte_seconds_of_all_sessions_add_up_to_the_ledgers(model, monkeypatch, seed) -> None:
    monkeypatch.setattr(sequences, "OBSERVE_INTERVAL_S", 0.0)
    clock, chance = Clock(), random.Random(seed)
    room = device_bytes(model, 1100) if seed % 2 else PLENTY
    metered = Metered(make_engine(model, room=room, host_bytes=1 << 20, clock=clock), clock, chance)
    engine = metered.drive.engine
    for _ in range(60):
        metered.pass_time()
        if chance.random() < 0.4:
            metered.submit()
            metered.pass_time()
        if metered.names and chance.random() < 0.1:
            engine.cancel(CallId(chance.choice(metered.names)))
            metered.pass_time()
        metered.drive.step()
    while engine.has_work:
        metered.pass_time()
        metered.drive.step()
    metered.pass_time()
    assert metered.by_sessions() == pytest.approx(metered.by_ledger)
    assert metered.by_ledger[0] > 0
    assert engine._sequences._unclaimed == {}
