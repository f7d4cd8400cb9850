"""What docs/request.md says of the code is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "request.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)`(?:\s+·\s+`([\w.]+)`)?", PAGE)


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_a_file_and_what_it_is_said_to_do_are_there(file: str, name: str) -> None:
    source = (ROOT / "kvservice" / file).read_text()
    for part in filter(None, name.split(".")):
        assert re.search(rf"^\s*(?:async )?(?:def|class) {part}\b", source, re.MULTILINE), f"{file} has no {part}"


def test_the_page_follows_a_request_through_many_files() -> None:
    assert len({file for file, _ in NAMED}) > 30
