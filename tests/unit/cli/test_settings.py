from __future__ import annotations

from pathlib import Path

import pytest

from kvservice.cli.settings import overlay, read_secret, read_settings, service_config, url_from
from kvservice.errors import ConfigError

SECRET = "0123456789abcdef"


def test_settings_come_from_json_and_from_toml(tmp_path: Path) -> None:
    as_json = tmp_path / "a.json"
    as_json.write_text('{"worker": {"kv_bytes": "64MiB"}}')
    as_toml = tmp_path / "a.toml"
    as_toml.write_text('[worker]\nkv_bytes = "64MiB"\n')
    assert read_settings(as_json) == read_settings(as_toml) == {"worker": {"kv_bytes": "64MiB"}}
    assert service_config(read_settings(as_json)).worker.kv_bytes == 64 * 2**20


def test_flags_go_over_the_file_and_leave_what_they_do_not_name() -> None:
    settings: dict[str, object] = {"worker": {"kv_bytes": 1, "threads": 2}, "workers": 3}
    assert overlay(settings, {"worker": {"kv_bytes": 9, "threads": None}, "workers": None}) == {
        "worker": {"kv_bytes": 9, "threads": 2},
        "workers": 3,
    }
    assert settings == {"worker": {"kv_bytes": 1, "threads": 2}, "workers": 3}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "{", "not JSON"),
        ("a.toml", "=", "not TOML"),
        ("a.json", "[]", "must hold a table"),
        ("a.json", b"\xff\xfe", "not JSON"),
    ],
)
def test_a_damaged_settings_file_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=says) as caught:
        read_settings(path)
    assert str(path) in caught.value.message


def test_a_missing_settings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_settings(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"wrokers": 2}, "wrokers: Extra inputs"),
        ({"worker": {"kv_bytes": -1}}, "worker.kv_bytes"),
        ({"worker": {"recipe": "recall-oracle"}}, "recipe 'recall-oracle' is not served"),
        ({"gateway": {"secret": "short"}}, "gateway: .* 5 bytes; it must be 16 to 64"),
        ({"workers": 65}, "workers: .* less than or equal to 64"),
    ],
)
def test_a_wrong_setting_is_named_with_its_place(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        service_config(settings)


def test_a_wrong_setting_is_never_answered_with_a_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        service_config({"gateway": {"secret": "hunter2"}})
    assert "hunter2" not in caught.value.message


def test_the_secret_comes_from_a_file_that_nobody_else_reads(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    assert read_secret(path) == SECRET
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(path)


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSERVICE_SECRET", SECRET)
    monkeypatch.setenv("KVSERVICE_REDIS_URL", "redis://:word@host/0")
    assert read_secret(None) == SECRET
    assert url_from(None, "KVSERVICE_REDIS_URL") == "redis://:word@host/0"
    assert url_from("redis://other", "KVSERVICE_REDIS_URL") == "redis://other"
    monkeypatch.delenv("KVSERVICE_SECRET")
    assert read_secret(None) is None
