"""The file of API keys: hashes of keys, whose they are and what they may do. Never holds a key itself.

To rotate a key, give its tenant a second one, have callers change over, and let the first expire or take it out.
"""

from __future__ import annotations

import hashlib
import logging
import stat
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvservice.config.watched_file import WatchedFile
from kvservice.errors import ConfigError
from kvservice.types import Role

logger = logging.getLogger(__name__)


SHORT_ID_DIGITS = 12


class ApiKey(BaseModel):
    """One key: its SHA-256, its tenant, its role. A tenant may have several at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$", description="SHA-256 of the key, 64 hexadecimal digits.")
    tenant: str = Field(min_length=1, max_length=128, description="Owner of the sessions made with the key.")
    role: Role = Field(Role.TENANT, description="`tenant`, or `operator` for the AdminService too.")
    id: str = Field(
        "",
        max_length=64,
        pattern=r"^[A-Za-z0-9._-]*$",
        description="Name of the key in logs; empty: the first 12 digits of its SHA-256.",
    )
    expires_at: AwareDatetime | None = Field(
        None, description="From then on the key is unknown; with its time zone, such as 2027-01-31T00:00:00Z."
    )

    @property
    def key_id(self) -> str:
        """What logs call the key."""
        return self.id or self.sha256[:SHORT_ID_DIGITS].lower()

    def is_valid(self, now: float) -> bool:
        """Whether it may be used at `now`, in unix seconds."""
        return self.expires_at is None or now < self.expires_at.timestamp()

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
                raise ValueError(f"the key with sha256 {key.sha256[:SHORT_ID_DIGITS]}… is listed twice")
            seen.add(key.digest)
        ids = [key.key_id for key in keys]
        if twice := {key_id for key_id in ids if ids.count(key_id) > 1}:
            raise ValueError(f"two keys have the id {min(twice)!r}: logs couldn't tell them apart")
        return keys

    def current(self) -> ApiKeys:
        """These keys: they never change. The same word as `ApiKeyFile.current`."""
        return self


def key_entry(key: str, tenant: str, role: Role = Role.TENANT) -> dict[str, str]:
    """What a key file says of a key."""
    return {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant, "role": role.value}


def load_api_keys(path: Path) -> ApiKeys:
    """Reads a key file: `{"keys": [{"sha256": "…", "tenant": "acme", "role": "tenant"}]}`, with `id` and `expires_at`
    where wanted.

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
            'digits", "tenant": "name", "role": "tenant" or "operator"}]}, with "id" and "expires_at" where wanted'
        ) from None


class ApiKeyFile:
    """The keys in a file, read again when it changes. A file that can't be used leaves the keys as they were."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the file; raises as `load_api_keys` does."""
        self._file = WatchedFile(path, clock)
        self._keys = load_api_keys(path)
        self.failed_reads = 0

    def current(self) -> ApiKeys:
        """The keys as the file has them."""
        if self._file.has_changed():
            try:
                self._keys = load_api_keys(self._file.path)
            except ConfigError as error:
                # A half-written file must not lock everybody out; it is read again when it changes next.
                self.failed_reads += 1
                logger.error("api_keys_not_read", extra={"why": error.message, "failed_reads": self.failed_reads})
            else:
                logger.info("api_keys_read", extra={"num_keys": len(self._keys.keys)})
        return self._keys
