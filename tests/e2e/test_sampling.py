"""Sampling parameters and grammars through the whole service."""

from __future__ import annotations

import json
import re

import pytest
import pytest_asyncio

from kvservice.client import Client, LocalService
from kvservice.errors import InvalidRequest
from kvservice.types import FinishReason

pytestmark = pytest.mark.asyncio(loop_scope="module")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def is_person(value):
    assert set(value) == {"name", "age", "likes"}
    assert len(value["name"]) <= 20
    assert 0 <= value["age"] <= 130
    assert set(value["likes"]) <= {"tea", "coffee"}
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from kvservice.models.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(model):
    sizes = ("--kv-bytes", "48MiB", "--host-bytes", "64MiB", "--dtype", "fp32", "--threads", "1")
    async with (
        LocalService(["--model", str(model), "--log-level", "WARNING", *sizes]) as service,
        Client(service.address) as client,
    ):
        yield client


async def loaded(client):
    session = (await client.create_session(recipe="recall")).session_id
    await client.append(session, "some words to begin with. " * 20)
    return session


async def test_several_answers_differ_and_the_first_is_that_of_a_single_one(client):
    session = await loaded(client)
    before = (await client.get(session)).num_tokens
    sampling = {"temperature": 1.0, "seed": 5, "max_new_tokens": 12, "ignore_eos": True}
    several = await client.ask(session, "go on ", n=3, logprobs=2, **sampling)
    assert several.finished.finish_reasons == (FinishReason.LENGTH,) * 3
    assert len({several.token_ids, *(other.token_ids for other in several.alternatives)}) == 3
    assert (await client.get(session)).num_tokens == before + 6 + 12
    for answer in (several, *several.alternatives):
        assert [entry.chosen.token_id for entry in answer.logprobs] == list(answer.token_ids)
        for entry in answer.logprobs:
            likeliest, second = entry.top
            assert 0 >= likeliest.logprob >= second.logprob
            assert entry.chosen.logprob <= likeliest.logprob
    single = await client.ask(await loaded(client), "go on ", **sampling)
    assert single.token_ids == several.token_ids


async def test_bias_and_penalties_work(client):
    session = await loaded(client)
    ruled = await client.ask(session, "x", max_new_tokens=6, ignore_eos=True, logit_bias={7: 100.0})
    assert ruled.token_ids == (7,) * 6
    # Another session, as the first one's tokens count.
    spread = await client.ask(
        await loaded(client),
        "x",
        max_new_tokens=4,
        ignore_eos=True,
        logit_bias={7: 100.0, 8: 100.0},
        repetition_penalty=10.0,
    )
    assert set(spread.token_ids[:2]) == {7, 8}
    with pytest.raises(InvalidRequest, match="logit_bias holds 259"):
        await client.ask(session, "x", logit_bias={259: 1.0})


async def test_answers_match_their_grammar_and_end_with_it(client):
    session = await loaded(client)
    sampling = {"temperature": 2.0, "max_new_tokens": 300}
    for seed in range(3):
        person = await client.ask(session, "who? ", json_schema=PERSON, seed=seed, **sampling)
        assert is_person(json.loads(person.text))
        assert person.finished.finish_reason is FinishReason.EOS
        date = await client.ask(session, "when? ", regex=r"[12][0-9]{3}-[0-9]{2}", n=2, seed=seed, **sampling)
        for answer in (date, *date.alternatives):
            assert re.fullmatch(r"[12][0-9]{3}-[0-9]{2}", answer.text)
        assert date.finished.finish_reasons == (FinishReason.EOS,) * 2


async def test_a_wrong_grammar_is_refused_and_the_session_stays(client):
    session = await loaded(client)
    before = (await client.get(session)).num_tokens
    with pytest.raises(InvalidRequest, match="look-ahead") as caught:
        await client.ask(session, "x", regex="a(?=b)")
    assert "regex can't be used" in caught.value.message
    assert (await client.get(session)).num_tokens == before


@pytest.mark.real_model
async def test_the_real_model_answers_in_json_and_as_a_regex_says(real_model_folder):
    options = ["--model", str(real_model_folder), "--kv-bytes", "256MiB", "--log-level", "WARNING"]
    async with LocalService(options) as service, Client(service.address) as client:
        session = (await client.create_session(recipe="dense")).session_id
        await client.append(session, "Maria Lopez is forty-two years old. She drinks tea in the morning.\n\n")
        person = await client.ask(session, "The person as JSON: ", json_schema=PERSON, max_new_tokens=80)
        assert is_person(json.loads(person.text))
        assert person.finished.finish_reason is FinishReason.EOS
        answer = await client.ask(
            session, "\n\nHer first name, in capitals: ", regex="[A-Z]{2,12}", max_new_tokens=40, temperature=0.8, n=2
        )
        for text in (answer.text, *(other.text for other in answer.alternatives)):
            assert re.fullmatch("[A-Z]{2,12}", text)
