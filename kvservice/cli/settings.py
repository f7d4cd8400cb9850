"""Where settings come from: a file, flags over it, secrets from the environment. Knows no setting's meaning."""

from __future__ import annotations

import json
import os
import secrets
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kvservice.config.service import ServiceConfig
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError
from kvservice.types import RecipeSpec

Config = TypeVar("Config", bound=BaseModel)

Settings = dict[str, object]

SECRET_VARIABLE = "KVSERVICE_SECRET"
STATE_URL_VARIABLE = "KVSERVICE_STATE_URL"
REDIS_URL_VARIABLE = "KVSERVICE_REDIS_URL"
CONFIG_VARIABLE = "KVSERVICE_CONFIG"
WORKER_HOST_VARIABLE = "KVSERVICE_WORKER_HOST"


def read_settings(path: Path | None) -> Settings:
    """The content of a settings file, TOML if its name ends so, else JSON. Nothing without a path.

    Raises:
        ConfigError: it can't be read or parsed, or isn't a table.
    """
    if path is None:
        return {}
    content = read_file(path, "--config")
    try:
        text = content.decode()
        settings = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        form = "TOML" if path.suffix == ".toml" else "JSON"
        raise ConfigError(f"--config {path}: not {form}: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: holds a {type(settings).__name__}; it must hold a table of settings")
    return settings


def read_secret(path: Path | None) -> str | None:
    """The service's secret, from its file or from the environment; None if neither names one.

    Raises:
        ConfigError: the file can't be read, or others may read it.
    """
    return os.environ.get(SECRET_VARIABLE) or None if path is None else read_secret_file(path, "--secret-file")


def kept_secret(data_dir: Path) -> str:
    """The secret in `data_dir`, made up and put there, for the owner's eyes only, if there is none."""
    path = data_dir / "secret"
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            return read_secret_file(path, "--data-dir")
        secret = secrets.token_hex(32)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret + "\n")
    except OSError as error:
        raise ConfigError(f"--data-dir {data_dir}: {error.strerror}; name a folder that we may write to") from None
    return secret


def read_secret_file(path: Path, flag: str) -> str:
    """The line of text in a file of mode 0600.

    Raises:
        ConfigError: it can't be read, or others may read it.
    """
    content = read_file(path, flag)
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise ConfigError(f"{flag} {path}: other users may read it; run: chmod 600 {path}")
    try:
        return content.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: must be a line of text, such as 32 hexadecimal digits") from None


def read_file(path: Path, flag: str) -> bytes:
    """The bytes of a file that `flag` names.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; give the path of a readable file") from None


def url_from(flag: str | None, variable: str) -> str | None:
    """A URL given by flag, else by the environment, where a password in it stays out of sight."""
    return flag or os.environ.get(variable) or None


def overlay(settings: Settings, flags: Mapping[str, object]) -> Settings:
    """`settings` with `flags` put over it, table by table. A flag that wasn't given is None and sets nothing."""
    merged = dict(settings)
    for name, value in flags.items():
        if value is None:
            continue
        below = merged.get(name)
        merged[name] = overlay(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def sharing_settings(
    recipe: RecipeSpec, sharing_map: Path | None, sharing: str | None, skip_above: float | None
) -> Settings:
    """A worker's settings of how layers share distant keys, as far as they were given.

    Raises:
        ConfigError: the recipe needs a map, and none was named.
    """
    if recipe.shares_keys and sharing_map is None:
        raise ConfigError(
            f"--recipe {recipe.name}: it shares distant keys between layers; name a map of which with --map, made by "
            "`kvservice calibrate pod`",
            reason="map_missing",
        )
    given = {"sharing_map": sharing_map and str(sharing_map), "sharing": sharing, "skip_above": skip_above}
    return {name: value for name, value in given.items() if value is not None}


def worker_config(settings: Settings) -> WorkerConfig:
    """A worker's settings, checked. Raises as `service_config` does."""
    return _checked(WorkerConfig, settings)


def service_config(settings: Settings) -> ServiceConfig:
    """The settings, checked.

    Raises:
        ConfigError: a name is unknown or a value out of bounds; says which, and what is allowed.
    """
    return _checked(ServiceConfig, settings)


def _checked(kind: type[Config], settings: Settings) -> Config:
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigError(f"{place}: {first['msg']}", reason="settings") from None
