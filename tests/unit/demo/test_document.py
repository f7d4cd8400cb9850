from importlib.resources import files

import pytest

from kvservice.demo.document import OPENING, needle, plant, shipped_text

PROSE = "One two\nthree.\n\nFour.\n\nFive six seven eight nine.\n"


def test_the_needle_is_a_paragraph_of_its_own_at_a_border() -> None:
    planted = plant(PROSE, "12345", 0.4).split("\n\n")
    assert planted[0] == OPENING
    assert planted[3] == needle("12345")
    assert [*planted[1:3], planted[4].rstrip()] == ["One two three.", "Four.", "Five six seven eight nine."]


@pytest.mark.parametrize(("depth", "place"), [(0.0, 1), (1.0, -1)])
def test_the_needle_may_come_first_or_last(depth: float, place: int) -> None:
    assert plant(PROSE, "12345", depth).rstrip().split("\n\n")[place] == needle("12345")


def test_the_shipped_prose_is_long_enough_and_its_origin_is_told() -> None:
    assert 3000 < len(shipped_text().split()) < 4000
    assert "public domain" in (files("kvservice.demo") / "document.license.txt").read_text()


def test_the_shipped_prose_answers_the_questions_that_are_asked_about_it() -> None:
    joined = " ".join(shipped_text().split())
    assert "They were soon settled in comfortable lodgings in Pulteney Street." in joined
    assert "It is such a delicate muslin." in joined


@pytest.mark.real_model
def test_the_document_has_four_to_five_thousand_tokens(real_model_folder) -> None:
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.types import PromptFormat, TextRole

    document = plant(shipped_text(), "12345", 0.5)
    tokens = Tokenizer.load(real_model_folder).encode(document, TextRole.DOCUMENT, PromptFormat.RAW, first=True)
    assert 4000 < len(tokens) < 5000
