import pytest

from kvservice.errors import InvalidRequest
from kvservice.evaluation.haystack import (
    DEPTHS_PERCENT,
    NOISE,
    OPENING,
    is_answered,
    make_cases,
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
    assert [case.needles[0].depth_percent for case in noise_cases()] == [*DEPTHS_PERCENT, *DEPTHS_PERCENT]


def test_the_needle_lies_at_its_depth() -> None:
    for case in noise_cases(num_tokens=20_000, num_cases=5):
        before = case.document.index(case.needles[0].sentence) - len(OPENING)
        assert abs(100 * before / len(case.document) - case.needles[0].depth_percent) < 2


def test_noise_has_the_published_form() -> None:
    case = noise_cases(num_cases=1)[0]
    assert case.document.startswith(OPENING + NOISE)
    assert f"And back again. {case.needles[0].sentence} The grass".lower() in case.document.lower()


def test_in_prose_the_needle_stands_on_a_line_of_its_own() -> None:
    for case in prose_cases():
        assert f"\n\n{case.needles[0].sentence}\n\n" in case.document + "\n\n"
        assert "has two lines." in case.document


def test_no_prompt_is_longer_than_asked_and_none_is_much_shorter() -> None:
    for case in noise_cases():
        assert 4000 - 2 * len(NOISE) < len(case.document) <= 4000


def test_two_needles_lie_at_two_depths() -> None:
    cases = make_cases(
        noise_units(), is_prose=False, num_tokens=20_000, num_cases=5, seed=3, count=count_characters, num_needles=2
    )
    for case in cases:
        for hidden in case.needles:
            before = case.document.index(hidden.sentence) - len(OPENING)
            assert abs(100 * before / len(case.document) - hidden.depth_percent) < 2
        assert len({hidden.depth_percent for hidden in case.needles}) == 2
        assert len(case.document) <= 20_000


def test_pass_keys_are_a_function_of_the_seed() -> None:
    assert noise_cases(seed=3) == noise_cases(seed=3)
    assert {case.needles[0].number for case in noise_cases(seed=3)} != {
        case.needles[0].number for case in noise_cases(seed=4)
    }


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
