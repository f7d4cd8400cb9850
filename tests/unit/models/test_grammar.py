import json
import re

import pytest
import torch

from kvservice.errors import InternalError, InvalidRequest
from kvservice.models.grammar import Grammars
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import Grammar, GrammarKind, PromptFormat, TextRole

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TINY_VOCAB = 259


def schema(value):
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value))


def regex(pattern):
    return Grammar(GrammarKind.REGEX, pattern)


def allowed_tokens(matcher):
    words = matcher.allowed()
    bits = (words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return set(bits.flatten().nonzero().flatten().tolist())


def follow(matcher, token_ids):
    """Whether the tokens match, all of them up to the end."""
    for token_id in token_ids:
        if token_id not in allowed_tokens(matcher):
            return False
        matcher.accept(token_id)
    return matcher.is_complete


def ids_of(tokenizer, text):
    return tokenizer.encode(text, TextRole.DOCUMENT, PromptFormat.RAW, first=True)


@pytest.fixture
def tokenizer(tiny_folder):
    return Tokenizer.load(tiny_folder)


@pytest.fixture
def grammars(tokenizer):
    return Grammars(tokenizer, TINY_VOCAB)


def test_a_regex_allows_what_matches_it_and_ends_there(tokenizer, grammars):
    matcher = grammars.compile(regex("[0-9]{3}-[ab]+"))
    for token_id in ids_of(tokenizer, "407-"):
        assert token_id in allowed_tokens(matcher)
        assert not tokenizer.eos_token_ids & allowed_tokens(matcher)
        matcher.accept(token_id)
    assert allowed_tokens(matcher) == set(ids_of(tokenizer, "ab"))
    matcher.accept(*ids_of(tokenizer, "a"))
    assert matcher.is_complete
    assert allowed_tokens(matcher) == set(ids_of(tokenizer, "ab")) | tokenizer.eos_token_ids


def test_the_end_token_is_accepted_where_more_could_follow(tokenizer, grammars):
    for end in tokenizer.eos_token_ids:
        matcher = grammars.compile(regex("a+"))
        assert follow(matcher, [*ids_of(tokenizer, "aa"), end])


def test_where_nothing_may_follow_only_the_end_token_is_allowed(tokenizer, grammars):
    matcher = grammars.compile(regex("yes|no"))
    assert follow(matcher, ids_of(tokenizer, "yes"))
    assert allowed_tokens(matcher) == tokenizer.eos_token_ids
    matcher.accept(min(tokenizer.eos_token_ids))


def test_a_schema_allows_only_json_that_fits_it(tokenizer, grammars):
    def matches(text):
        return follow(grammars.compile(schema(PERSON)), ids_of(tokenizer, text))

    assert matches('{"name": "Zoë", "age": 30}')
    assert not matches('{"name": "Zoë", "age": 300}')
    assert not matches('{"name": "Zoë"}')
    assert not matches('{"name": "Zoë", "age": 30, "more": 1}')
    # Laid out in one way only.
    assert not matches('{ "name": "Zoë", "age": 30}')


def test_each_matcher_goes_its_own_way(tokenizer, grammars):
    first, second = grammars.compile(regex("ab|ba")), grammars.compile(regex("ab|ba"))
    first.accept(*ids_of(tokenizer, "a"))
    assert allowed_tokens(first) == set(ids_of(tokenizer, "b"))
    assert allowed_tokens(second) == set(ids_of(tokenizer, "ab"))


def test_a_token_that_does_not_match_is_a_fault(tokenizer, grammars):
    matcher = grammars.compile(regex("ab"))
    with pytest.raises(InternalError, match="doesn't match"):
        matcher.accept(*ids_of(tokenizer, "z"))


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (regex("(a"), "unclosed group"),
        (regex("a(?=b)"), "look-ahead"),
        (regex(r"(a)\1"), "backreferences"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": '), "EOF|expected value"),
        (schema({"type": "objekt"}), "objekt"),
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"$ref": "https://example.org/schema.json"}), "Resource"),
        (schema([]), "object schema"),
        (schema({"type": "string", "pattern": "(?<=x)y"}), "look-behind"),
        (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
    ],
)
def test_a_wrong_grammar_is_refused_by_what_is_wrong_with_it(grammars, grammar, why):
    with pytest.raises(InvalidRequest, match=f"{grammar.kind.value} can't be used: (?s:.*)(?i:{why})") as caught:
        grammars.compile(grammar)
    assert caught.value.field == "sampling.grammar"


def test_a_grammar_that_grows_without_end_is_given_up(tokenizer, grammars):
    # Which of the last 40 characters was an a: 2^40 states.
    matcher = grammars.compile(regex("(a|b)*a(a|b){40}"))
    a, b = ids_of(tokenizer, "ab")
    bits = torch.randint(2, (100_000,), generator=torch.Generator().manual_seed(1)).tolist()

    def go_on():
        for bit in bits:
            matcher.allowed()
            matcher.accept(a if bit else b)

    with pytest.raises(InvalidRequest, match="too complex here"):
        go_on()


def test_many_grammars_are_compiled_again_when_they_return(tokenizer, grammars):
    for number in range(40):
        assert follow(grammars.compile(regex(f"x{number}")), ids_of(tokenizer, f"x{number}"))
    assert follow(grammars.compile(regex("x0")), ids_of(tokenizer, "x0"))


@pytest.mark.real_model
class TestRealTokenizer:
    @pytest.fixture(scope="class")
    @classmethod
    def real(cls, real_model_folder):
        tokenizer = Tokenizer.load(real_model_folder)
        return tokenizer, Grammars(tokenizer, 49_152)

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_is_drawn_matches_a_regex(self, real, seed):
        pattern = r"([a-zà-ÿ]{1,8} é){2,4}[0-9]{2}"
        assert re.fullmatch(pattern, written(*real, regex(pattern), seed))

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_is_drawn_is_json_of_the_schema(self, real, seed):
        bounded = PERSON | {"properties": PERSON["properties"] | {"name": {"type": "string", "maxLength": 20}}}
        person = json.loads(written(*real, schema(bounded), seed))
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 20
        assert 0 <= person["age"] <= 130


def written(tokenizer, grammars, grammar, seed):
    """A text of tokens drawn evenly from those allowed."""
    generator = torch.Generator().manual_seed(seed)
    matcher, token_ids = grammars.compile(grammar), []
    while True:
        allowed = sorted(allowed_tokens(matcher))
        token_id = allowed[int(torch.randint(len(allowed), (), generator=generator))]
        if token_id in tokenizer.eos_token_ids or (matcher.is_complete and tokenizer.eos_token_ids & set(allowed)):
            return tokenizer.decode(token_ids)
        matcher.accept(token_id)
        token_ids.append(token_id)
