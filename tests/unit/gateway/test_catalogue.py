from __future__ import annotations

import pytest

from kvservice.config.recipes import served_recipes
from kvservice.errors import FailedPrecondition, NotFound
from kvservice.gateway.catalogue import choose_recipe, override_recipe
from kvservice.types import ModelInfo, ModelShape

SHAPE = ModelShape(2, 4, 2, 16, 64, 128, 256, 2048)
WITH_MAP = ModelInfo("small", SHAPE, served_recipes(shares_keys=True), "recall", "a test")
WITHOUT = ModelInfo("small", SHAPE, served_recipes(shares_keys=False), "recall", "a test")


@pytest.mark.parametrize(
    ("of_session", "wanted"), [("recall", "exact"), ("pod", "pod-exact"), ("pod", ""), ("pod", "pod")]
)
def test_a_call_may_attend_to_more_of_what_its_session_keeps(of_session: str, wanted: str) -> None:
    assert override_recipe(WITH_MAP, of_session, wanted).name == (wanted or of_session)


@pytest.mark.parametrize(("of_session", "wanted"), [("pod", "exact"), ("recall", "pod-exact"), ("pod-exact", "pod")])
def test_a_call_cant_have_keys_that_its_session_drops_or_keeps_otherwise(of_session: str, wanted: str) -> None:
    with pytest.raises(FailedPrecondition, match="can't answer with"):
        override_recipe(WITH_MAP, of_session, wanted)


def test_a_worker_without_a_map_doesnt_know_recipes_that_share_keys() -> None:
    with pytest.raises(NotFound, match=r"is served with dense, exact, recall, (?!pod)"):
        choose_recipe(WITHOUT, "pod", "")
