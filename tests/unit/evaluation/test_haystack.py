import pytest

from kvservice.errors import InvalidRequest
from kvservice.evaluation.haystack import (
    DEPTHS_PERCENT,
    NOISE,
    OPENING,
    is_answered,
    make_cases,
    needle,
    noise_units,
    prose_units,
)

PROSE = "\n\n".join(f"Paragraph {number} has\ntwo lines." for number in range(40))


def count_characters(text: str) -> int:
    return len(text)


def noise_cases(num_tokens: int = 4000, num_cases: int = 10, seed: int = 3):
    return make_cases(
        noise_units(), is_prose=False, num_tokens=num_tokens, num_cases=num_cases, seed=seed, count=count_characters
    )


def prose_cases(num_tokens: int = 900, num_cases: int = 10):
    return make_cases(
        prose_units(PROSE), is_prose=True, num_tokens=num_tokens, num_cases=num_cases, seed=3, count=count_characters
    )


def test_cases_go_through_the_depths_in_turn() -> None:
    assert [case.depth_percent for case in noise_cases()] == [*DEPTHS_PERCENT, *DEPTHS_PERCENT]


def test_the_needle_lies_at_its_depth() -> None:
    for case in noise_cases(num_tokens=20_000, num_cases=5):
        before = case.document.index(needle(case.pass_key)) - len(OPENING)
        assert abs(100 * before / len(case.document) - case.depth_percent) < 2


def test_noise_has_the_published_form() -> None:
    case = noise_cases(num_cases=1)[0]
    assert case.document.startswith(OPENING + NOISE)
    assert f"And back again. {needle(case.pass_key)} The grass".lower() in case.document.lower()


def test_in_prose_the_needle_stands_on_a_line_of_its_own() -> None:
    for case in prose_cases():
        assert f"\n\n{needle(case.pass_key)}\n\n" in case.document + "\n\n"
        assert "has two lines." in case.document


def test_no_prompt_is_longer_than_asked_and_none_is_much_shorter() -> None:
    for case in noise_cases():
        assert 4000 - 2 * len(NOISE) < len(case.document) <= 4000


def test_pass_keys_are_a_function_of_the_seed() -> None:
    assert noise_cases(seed=3) == noise_cases(seed=3)
    assert {case.pass_key for case in noise_cases(seed=3)} != {case.pass_key for case in noise_cases(seed=4)}


def test_each_round_of_depths_reads_another_part_of_the_prose() -> None:
    cases = prose_cases()
    assert cases[0].document.split("\n\n")[1] != cases[5].document.split("\n\n")[1]


def test_a_text_that_is_too_short_is_repeated() -> None:
    case = prose_cases(num_tokens=5000, num_cases=1)[0]
    assert case.document.count("Paragraph 7 ") > 1


def test_a_prompt_without_room_for_one_paragraph_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="too few for one paragraph"):
        noise_cases(num_tokens=200)


def test_an_empty_text_is_no_haystack() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        prose_units("\n \n\n")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" 12345. Remember it.", True),
        (" 12345", True),
        (" 123456", False),
        (" the 99999, not 12345", False),
        ("", False),
    ],
)
def test_the_first_number_of_an_answer_counts(answer: str, found: bool) -> None:
    assert is_answered(answer, "12345") is found
