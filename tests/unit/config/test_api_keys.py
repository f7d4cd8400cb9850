from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from kvservice.config.api_keys import load_api_keys
from kvservice.errors import ConfigError
from kvservice.types import Role

HASH = "ab" * 32


def write(path: Path, content: object, mode: int = 0o600) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return path


def test_keys_are_read_with_tenant_and_role(tmp_path: Path) -> None:
    entries = [{"sha256": HASH, "tenant": "acme"}, {"sha256": "cd" * 32, "tenant": "ops", "role": "operator"}]
    keys = load_api_keys(write(tmp_path / "keys.json", {"keys": entries})).keys
    assert [(key.tenant, key.role) for key in keys] == [("acme", Role.TENANT), ("ops", Role.OPERATOR)]
    assert keys[0].digest == bytes.fromhex(HASH)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("not json", "top level"),
        ({}, "keys"),
        ({"keys": []}, "keys"),
        ({"keys": [{"sha256": "short", "tenant": "a"}]}, "keys.0.sha256"),
        ({"keys": [{"sha256": HASH, "tenant": ""}]}, "keys.0.tenant"),
        ({"keys": [{"sha256": HASH, "tenant": "a", "role": "root"}]}, "keys.0.role"),
        ({"keys": [{"sha256": HASH, "tenant": "a", "key": "clear"}]}, "keys.0.key"),
        ({"keys": [{"sha256": HASH, "tenant": "a"}, {"sha256": HASH, "tenant": "b"}]}, "keys"),
    ],
)
def test_a_bad_file_is_refused_with_file_and_place(tmp_path: Path, content: object, place: str) -> None:
    path = write(tmp_path / "keys.json", content)
    with pytest.raises(ConfigError) as caught:
        load_api_keys(path)
    assert f"{path}, {place}:" in caught.value.message
    assert '"sha256"' in caught.value.message


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: No such file"):
        load_api_keys(tmp_path / "nowhere.json")


def test_a_file_that_all_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"keys": [{"sha256": HASH, "tenant": "acme"}]}
    with caplog.at_level(logging.WARNING):
        load_api_keys(write(tmp_path / "closed.json", content))
        assert not caplog.records
        load_api_keys(write(tmp_path / "open.json", content, 0o644))
    assert caplog.records[0].getMessage() == "api_key_file_readable_by_all"
