"""Sessions of one tenant that begin alike share what they have in common, and nobody else's."""

import pytest

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.engine.prefixes import PrefixIndex
from kvservice.errors import Conflict, NotFound, Overloaded
from kvservice.models.tiny import tiny_model
from kvservice.recall.parking import Place
from kvservice.types import CallId, OnMiss, SessionId
from tests.unit.engine.driving import Drive, answering, device_bytes, make_engine, tokens

TENANT, OTHER = b"one", b"two"
RECIPES = [DENSE, EXACT, RECALL]
TEXT = tokens(450, seed=1)
A, B, C = SessionId("a"), SessionId("b"), SessionId("c")


@pytest.fixture(scope="module")
def model():
    """Bit for bit, so that reuse that isn't equal shows."""
    return tiny_model(seed=0, num_layers=1, row_block=32)


@pytest.fixture
def drive(model):
    drive = Drive(make_engine(model))
    yield drive
    for session in drive.engine._sequences.ids():
        drive.engine.release(session)
    drive.engine.check()
    assert drive.engine.headroom().device_free_bytes == drive.engine.headroom().device_capacity_bytes


def read(drive, session, document, recipe=DENSE, tenant=TENANT, **more):
    return drive.ask(session, recipe, document=document, tenant_tag=tenant, **more)


def question(drive, session, base, recipe=DENSE, document=(), new=4, tenant=TENANT, **more):
    sampling = answering(new, logprobs=2, temperature=0.7, seed=2)
    return drive.ask(
        session,
        recipe,
        base=base,
        document=document,
        prompt=(5, 6, 7),
        sampling=sampling,
        tenant_tag=tenant,
        call="q",
        **more,
    )


def alone(model, base, recipe, document=()):
    """The same answer without anybody to share with."""
    drive = Drive(make_engine(model))
    if base:
        drive.ask("s", recipe, document=base)
    question(drive, "s", base, recipe, document, tenant=b"")
    return drive.answers["q", 0]


# -- the index -------------------------------------------------------------------------------------------------------


def test_prefixes_are_known_by_whole_groups():
    index = PrefixIndex()
    index.update(A, TENANT, "dense", TEXT[:300])
    for same, length in [(300, 272), (272, 272), (271, 208), (80, 80), (79, 0)]:
        asked = TEXT[:same] + (251,) * 100
        assert index.longest(TENANT, "dense", asked) == ((A, length) if length else (None, 0))


def test_tenants_recipes_and_untagged_calls_meet_no_prefixes_but_their_own():
    index = PrefixIndex()
    index.update(A, TENANT, "dense", TEXT)
    index.update(B, b"", "dense", TEXT)
    for tenant, recipe in [(OTHER, "dense"), (TENANT, "exact"), (b"", "dense")]:
        assert index.longest(tenant, recipe, TEXT) == (None, 0)


def test_a_longer_prefix_of_one_sequence_is_preferred_to_a_newer_one_of_another():
    index = PrefixIndex()
    index.update(A, TENANT, "dense", TEXT[:400])
    index.update(B, TENANT, "dense", TEXT[:200])
    assert index.longest(TENANT, "dense", TEXT) == (A, 400)
    index.remove(A)
    assert index.longest(TENANT, "dense", TEXT) == (B, 144)
    index.update(B, TENANT, "dense", TEXT[:300])
    assert index.longest(TENANT, "dense", TEXT) == (B, 272)
    index.remove(B)
    assert index.longest(TENANT, "dense", TEXT) == (None, 0)
    assert not index._holders


# -- reuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(("length", "own", "reused"), [(450, 0, 400), (390, 30, 336), (100, 300, 80)])
def test_a_session_that_begins_like_another_reuses_its_kv_and_answers_alike(drive, model, recipe, length, own, reused):
    """Of `recall` the shared part may end before the window that its donor has now."""
    read(drive, "a", TEXT, recipe)
    document = TEXT[:length] + tokens(own, seed=3)
    finished = question(drive, "b", (), recipe, document)
    assert finished.usage.reused_tokens == reused
    assert (finished.usage.prompt_tokens, finished.usage.recomputed_tokens) == (length + own + 3, 0)
    assert drive.answers["q", 0] == alone(model, (), recipe, document)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_shared_kv_takes_device_and_host_bytes_once(drive, recipe):
    read(drive, "a", TEXT, recipe)
    before = drive.engine.headroom()
    read(drive, "b", TEXT, recipe)
    after = drive.engine.headroom()
    if recipe is DENSE:
        # What is no whole group is its own: of 450 tokens 400 are.
        assert before.device_free_bytes - after.device_free_bytes == device_bytes(drive.engine._model, 64)
    else:
        # Sinks and full blocks of the index are. A window will slide, and is paid for.
        whole = device_bytes(drive.engine._model, 450, recipe=recipe)
        assert before.device_free_bytes - after.device_free_bytes < whole
        assert drive.engine._sequences.get(B).host_bytes > 0
    assert after.host_free_bytes == before.host_free_bytes


@pytest.mark.parametrize(("tenant", "recipe"), [(OTHER, DENSE), (b"", DENSE), (TENANT, EXACT), (TENANT, RECALL)])
def test_nothing_is_reused_across_tenants_recipes_or_without_a_tenant(drive, tenant, recipe):
    read(drive, "a", TEXT)
    assert read(drive, "b", TEXT, recipe, tenant).usage.reused_tokens == 0


def test_sessions_without_a_tenant_share_nothing_among_themselves(drive):
    read(drive, "a", TEXT, tenant=b"")
    assert read(drive, "b", TEXT, tenant=b"").usage.reused_tokens == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_a_question_selected_is_never_shared(drive, model, recipe):
    """Questions and answers of `recall` depend on more than their tokens."""
    read(drive, "a", TEXT, recipe)
    record = TEXT + question(drive, "a", TEXT, recipe, new=20).appended_tokens
    drive.answers.clear()
    reused = question(drive, "b", (), recipe, record).usage.reused_tokens
    assert reused == (400 if recipe is RECALL else 464)
    assert drive.answers["q", 0] == alone(model, (), recipe, record)


def test_a_question_selects_although_another_session_read_the_same_text_with_everything_in_sight(drive, model):
    read(drive, "a", TEXT, RECALL)
    base, prompt = TEXT[:400], TEXT[400:]
    sampling = answering(8, logprobs=2)
    finished = drive.ask("b", RECALL, document=base, prompt=prompt, sampling=sampling, tenant_tag=TENANT)
    assert finished.usage.reused_tokens == 400
    fresh = Drive(make_engine(model))
    fresh.ask("b", RECALL, document=base, prompt=prompt, sampling=sampling)
    assert drive.answers == fresh.answers


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_base_of_a_session_that_was_dropped_is_found_with_another(drive, model, recipe):
    read(drive, "a", TEXT, recipe)
    read(drive, "b", TEXT[:420], recipe)
    drive.engine.release(B)
    finished = question(drive, "b", TEXT[:420], recipe)
    assert (finished.usage.recomputed_tokens, finished.usage.reused_tokens) == (20, 0)
    assert finished.usage.cached_tokens == 400
    assert drive.answers["q", 0] == alone(model, TEXT[:420], recipe)


def test_missing_kv_that_another_session_has_is_not_missing(drive):
    read(drive, "a", TEXT)
    question(drive, "b", TEXT[:400], on_miss=OnMiss.FAIL)


def test_a_session_reads_its_own_kv_again(drive, model):
    """Taken back to an earlier token, and read on with what stood there before."""
    read(drive, "a", TEXT)
    finished = question(drive, "a", TEXT[:100], document=TEXT[100:420])
    assert finished.usage.reused_tokens == 400 - 100
    assert drive.answers["q", 0] == alone(model, TEXT[:100], DENSE, TEXT[100:420])


# -- what becomes of donor and fork ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_donor_and_fork_go_on_without_touching_one_another(drive, model, recipe):
    read(drive, "a", TEXT, recipe)
    read(drive, "b", TEXT + tokens(30, seed=7), recipe)
    for name, base in (("a", TEXT), ("b", TEXT + tokens(30, seed=7)), ("a", TEXT), ("b", TEXT[:400])):
        drive.answers.clear()
        question(drive, name, base, recipe)
        assert drive.answers["q", 0] == alone(model, base, recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_donor_that_is_released_leaves_the_fork_what_it_shares(drive, model, recipe):
    read(drive, "a", TEXT, recipe)
    read(drive, "b", TEXT, recipe)
    drive.engine.release(A)
    drive.engine.check()
    question(drive, "b", TEXT, recipe)
    assert drive.answers["q", 0] == alone(model, TEXT, recipe)
    drive.engine.release(B)
    assert read(drive, "c", TEXT, recipe).usage.reused_tokens == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("base", [10, 390])
def test_a_fork_may_be_taken_back_below_the_shared_part(drive, model, recipe, base):
    read(drive, "a", TEXT, recipe)
    read(drive, "b", TEXT, recipe)
    question(drive, "b", TEXT[:base], recipe)
    assert drive.answers["q", 0] == alone(model, TEXT[:base], recipe)
    drive.answers.clear()
    question(drive, "a", TEXT, recipe)
    assert drive.answers["q", 0] == alone(model, TEXT, recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_donor_that_is_busy_is_shared_up_to_what_it_has_read(drive, model, recipe):
    drive.submit("a", recipe, document=TEXT, prompt=(5,), sampling=answering(40), tenant_tag=TENANT, call="long")
    drive.until(lambda: len(drive.answers.get(("long", 0), [])) > 3)
    finished = question(drive, "b", (), recipe, TEXT)
    assert finished.usage.reused_tokens == 400
    drive.engine.cancel(CallId("long"))
    drive.run()
    assert drive.answers["q", 0] == alone(model, (), recipe, TEXT)


def test_a_document_of_which_a_part_is_shared_needs_room_for_the_rest(model):
    """A fork begins with all that its donor has: what it gives up of that is nobody's room."""
    drive = Drive(make_engine(model, room=device_bytes(model, 45 * 16), host_bytes=0))
    read(drive, "a", TEXT)
    document = TEXT[:144] + tokens(400, seed=3)
    finished = read(drive, "b", document)
    assert finished.usage.reused_tokens == 144
    assert drive.engine.headroom().resident_sessions == 1, "the donor had to go"
    question(drive, "b", document)
    assert drive.answers["q", 0] == alone(model, document, DENSE)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_sharing_in_little_room_never_promises_a_block_twice(model, recipe):
    """Forks, their donor and what they give up, in room that is always short."""
    drive = Drive(make_engine(model, room=device_bytes(model, 66 * 16), host_bytes=24 << 14, max_batch=8))
    lengths = [300, 250, 180, 290, 100, 260]
    for turn in range(3):
        for number, length in enumerate(lengths):
            document = TEXT[:length] + tokens(30, seed=number)
            try:
                drive.submit(
                    f"s{number}",
                    recipe,
                    document=document,
                    prompt=(5,),
                    sampling=answering(20, n=1 + number % 2),
                    tenant_tag=TENANT,
                    call=f"c{turn}-{number}",
                )
            except Overloaded:
                drive.until(lambda: drive.finished)
        drive.run()
        assert not drive.failed
        for number in range(0, len(lengths), 2):
            drive.engine.release(SessionId(f"s{number}"))
            drive.engine.check()


def test_a_refused_call_leaves_its_session_as_it_was_even_if_it_would_have_shared_with_another(model):
    drive = Drive(make_engine(model, room=device_bytes(model, 60 * 16), host_bytes=0))
    read(drive, "b", TEXT[:50])
    read(drive, "a", TEXT[:400])
    drive.submit("busy", document=tokens(480, seed=4))
    drive.step()
    with pytest.raises(Overloaded):
        read(drive, "b", TEXT[50:] + TEXT + TEXT[:60], base=TEXT[:50])
    assert drive.engine._sequences.get(B).num_computed == 50
    drive.engine.check()


# -- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("length", [None, 5, 200, 390])
def test_a_fork_is_the_session_at_that_token(drive, model, recipe, length):
    drive.ask("a", recipe, document=TEXT)
    drive.engine.fork(A, B, length)
    drive.engine.check()
    base = TEXT[:length]
    question(drive, "b", base, recipe)
    assert drive.answers["q", 0] == alone(model, base, recipe)
    drive.answers.clear()
    question(drive, "a", TEXT, recipe)
    assert drive.answers["q", 0] == alone(model, TEXT, recipe)


def test_a_fork_copies_no_kv(drive):
    drive.ask("a", document=TEXT)
    before = drive.engine.stats()
    drive.engine.fork(A, B)
    assert drive.engine.stats().window_bytes == before.window_bytes
    # A block of which both will write their own.
    free = drive.engine.headroom().device_free_bytes
    assert before.headroom.device_free_bytes - free == device_bytes(drive.engine._model, 16)


def test_forks_of_what_isnt_held_or_to_what_is_are_refused(drive):
    drive.ask("a", document=TEXT)
    with pytest.raises(NotFound, match="session c is not on this device"):
        drive.engine.fork(C, B)
    with pytest.raises(NotFound, match="num_tokens=451: the session has KV of 450"):
        drive.engine.fork(A, B, 451)
    drive.engine.fork(A, B)
    with pytest.raises(Conflict, match="session b is held already"):
        drive.engine.fork(A, B)


def test_a_fork_waits_for_idle_sessions_that_make_room(model):
    drive = Drive(make_engine(model, room=device_bytes(model, 31 * 16)))
    drive.ask("old", document=tokens(32, seed=5))
    drive.ask("a", document=TEXT)
    drive.engine.fork(A, B)
    drive.engine.check()
    assert drive.place("old") is Place.PARKED
    assert drive.place("a") is drive.place("b") is Place.DEVICE


def test_a_fork_for_which_nobody_can_make_room_is_refused_and_leaves_nothing(model):
    drive = Drive(make_engine(model, room=device_bytes(model, 30 * 16)))
    drive.ask("a", document=TEXT)
    drive.submit("a", base=TEXT, prompt=(5,), sampling=answering(20))
    before = drive.engine.headroom()
    with pytest.raises(Overloaded):
        drive.engine.fork(A, B)
    assert drive.engine.headroom() == before
    drive.run()
