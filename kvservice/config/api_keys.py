"""The file of API keys: hashes of keys, whose they are and what they may do. Never holds a key itself."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvservice.errors import ConfigError
from kvservice.types import Role

logger = logging.getLogger(__name__)


class ApiKey(BaseModel):
    """One key: its SHA-256, its tenant, its role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$", description="SHA-256 of the key, 64 hexadecimal digits.")
    tenant: str = Field(min_length=1, max_length=128, description="Owner of the sessions made with the key.")
    role: Role = Field(Role.TENANT, description="`tenant`, or `operator` for the AdminService too.")

    @property
    def digest(self) -> bytes:
        """The hash as bytes."""
        return bytes.fromhex(self.sha256)


class ApiKeys(BaseModel):
    """All keys of the service."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[ApiKey, ...] = Field(min_length=1)

    @field_validator("keys")
    @classmethod
    def _no_key_twice(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        seen: set[bytes] = set()
        for key in keys:
            if key.digest in seen:
                raise ValueError(f"the key with sha256 {key.sha256[:12]}… is listed twice")
            seen.add(key.digest)
        return keys


def load_api_keys(path: Path) -> ApiKeys:
    """Reads a key file: `{"keys": [{"sha256": "…", "tenant": "acme", "role": "tenant"}]}`.

    Raises:
        ConfigError: it can't be read, or isn't of that form; the message names file and place.
    """
    try:
        text = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"API-key file {path}: {error.strerror}; give the path of a readable file") from None
    if mode & stat.S_IROTH:
        # Hashes of weak keys can be guessed by whoever reads them.
        logger.warning("api_key_file_readable_by_all", extra={"path": str(path)})
    try:
        return ApiKeys.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise ConfigError(
            f'API-key file {path}, {place}: {first["msg"]}; the form is {{"keys": [{{"sha256": "64 hexadecimal '
            'digits", "tenant": "name", "role": "tenant" or "operator"}]}'
        ) from None
