"""The tables of docs/methods.md are those of the registry: `kvservice methods --markdown` gives the first."""

from pathlib import Path

from kvservice.cli.catalogue import deviations, markdown, method_rows

DOCS = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def between(begin: str, end: str) -> str:
    return DOCS.split(f"<!-- {begin} -->\n")[1].split(f"<!-- {end} -->")[0]


def test_the_table_of_methods_is_generated() -> None:
    assert between("table: kvservice methods --markdown", "end of table") == markdown(method_rows())


def test_the_list_of_deviations_is_generated() -> None:
    assert between("deviations", "end of deviations") == deviations(method_rows())
