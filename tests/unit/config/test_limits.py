from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from pydantic import ValidationError

from kvservice.config.gateway import GatewayConfig
from kvservice.config.limits import Limits, limits_table

DOCS = Path(__file__).parents[3] / "docs"


def test_the_documentation_has_the_table_of_limits() -> None:
    assert limits_table() in (DOCS / "limits.md").read_text()


@pytest.mark.parametrize("name", Limits.model_fields)
def test_every_limit_says_what_it_means_and_how_it_answers(name: str) -> None:
    field = Limits.model_fields[name]
    assert field.description
    assert isinstance(field.json_schema_extra, dict)
    answers = field.json_schema_extra["answers"]
    assert answers == "-" or answers in grpc.StatusCode.__members__


SECRET = b"0123456789abcdef"


@pytest.mark.parametrize(
    "settings",
    [
        {"secret": b"short"},
        {"secret": b"x" * 65},
        {"port": 70_000},
        {"default_recipe": "magic"},
        {"default_recipe": "recall-oracle"},
        {"unknown": 1},
        {"limits": {"default_ttl_s": 1.0}},
        {"limits": {"unknown": 1}},
    ],
)
def test_a_bad_setting_is_refused(settings: dict) -> None:
    with pytest.raises(ValidationError):
        GatewayConfig(**{"secret": SECRET, **settings})


def test_the_secret_is_not_shown() -> None:
    assert "0123456789" not in repr(GatewayConfig(secret=SECRET))
