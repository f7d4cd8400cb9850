"""The frames in the kv Redis as keys and sizes: to renew, to count, to check and to delete. Knows nothing of tensors.

Looks at keys by SCAN in pages and by name, never by KEYS. Any of them may be gone at the next look.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from kvservice.errors import CorruptFrame
from kvservice.store.manifests import HASH_BYTES, Manifest
from kvservice.store.servers import Problem, ServerFacts, problems_of_kv
from kvservice.store.sizes import Allocator, allocated_bytes
from kvservice.tier.header import FrameRole, frame_key, session_tag
from kvservice.tier.redis import CLUSTERS, FAULTS, OneServer, Servers, index_key, redacted, unavailable
from kvservice.tier.redis_cluster import ClusterServers
from kvservice.tier.wire import decode_frame
from kvservice.types import FrameRef, SessionId

T = TypeVar("T")

TIMEOUT_S = 5.0
MAX_CONNECTIONS = 2
PAGE_KEYS = 512
READ_KEYS = 4
"""Values read in one round trip of a check: at most a few MB."""

_FRAME_KEY = re.compile(rb"kv1:\{([0-9a-f]{32}):([A-Za-z0-9_-]{1,64})\}:.+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Home:
    """Where frames lie: under a session or document of a tenant."""

    tenant_tag: bytes
    session_id: SessionId


@dataclass(frozen=True, slots=True)
class Blob:
    """A frame that was met. `stored_bytes` are those of its value; `ttl_s` is None if it never expires."""

    key: bytes
    home: Home
    stored_bytes: int
    ttl_s: float | None


@dataclass(frozen=True, slots=True)
class Page:
    """What one step of a scan met. Cursor 0: the scan is through."""

    cursor: int
    blobs: tuple[Blob, ...]


class Blobs(Protocol):
    """What reconciling needs of the kv Redis. Every method raises Unavailable after a bounded time."""

    @property
    def allocator(self) -> Allocator:
        """By whose size classes values are counted."""
        ...

    async def scan(self, cursor: int, tenant_tag: bytes = b"", session_id: str = "") -> Page:
        """One page of all frames, of a tenant's, or of those of a home. What stays there comes at least once."""
        ...

    async def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each value; 0 for one that isn't there."""
        ...

    async def renew(self, keys: Sequence[bytes], ttl_s: float) -> int:
        """Lets each value live for at least `ttl_s` from now. Returns how many are there."""
        ...

    async def delete(self, keys: Sequence[bytes]) -> int:
        """Deletes values. Returns how many there were."""
        ...

    async def corrupt(self, keys: Sequence[bytes]) -> list[bytes]:
        """Reads values and checks them: the keys of those that aren't what was written under them."""
        ...


def key_of(manifest: Manifest, home: SessionId, frame: FrameRef) -> bytes:
    """The key of a frame that a manifest names."""
    role = FrameRole(frame.role)
    return frame_key(manifest.tenant_tag, home, manifest.fingerprint, frame.layer_group, role, frame.chunk_hash)


def index_of(manifest: Manifest) -> bytes:
    """The key under which the kv Redis lists what lies in a session's own home."""
    return index_key(session_tag(manifest.tenant_tag, manifest.session_id))


def charged_bytes(manifest: Manifest, allocator: Allocator, also: Iterable[FrameRef] = ()) -> dict[SessionId, int]:
    """What the frames of a manifest take, by their home, and with them others in the session's own home."""
    # Of the many frames most are alike, and keys differ in length by home, group and role only.
    frames = itertools.chain(manifest.named(), ((manifest.session_id, frame) for frame in also))
    alike: Counter[tuple[SessionId, int, str, int]] = Counter(
        (home, frame.layer_group, frame.role, frame.stored_bytes) for home, frame in frames
    )
    charges: dict[SessionId, int] = {}
    for (home, layer_group, role, stored_bytes), count in alike.items():
        key = key_of(manifest, home, FrameRef(layer_group, role, 0, 1, bytes(HASH_BYTES), stored_bytes))
        charges[home] = charges.get(home, 0) + count * allocated_bytes(stored_bytes, len(key), allocator)
    return charges


class RedisBlobs:
    """`Blobs` in the kv Redis: one, or a cluster. `check` comes first."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._servers: Servers = (
            ClusterServers(url, timeout_s=timeout_s, max_connections=MAX_CONNECTIONS)
            if urlsplit(url).scheme in CLUSTERS
            else OneServer(url, timeout_s=timeout_s, max_connections=MAX_CONNECTIONS)
        )
        self._where = redacted(url)
        self._timeout_s = timeout_s
        self._allocator = Allocator.LIBC

    @property
    def allocator(self) -> Allocator:
        """See `Blobs.allocator`."""
        return self._allocator

    async def check(self) -> list[Problem]:
        """Asks the server what it is. Gives what isn't as the role needs it.

        Raises:
            Unavailable: it can't be reached.
        """
        questions: list[tuple[str, ...]] = [("INFO", "server"), ("INFO", "memory"), ("CONFIG GET", "maxmemory*")]
        problems: dict[Problem, None] = {}
        for answers in await self._within(self._servers.ask_all(questions)):
            facts = ServerFacts.of(*answers)
            self._allocator = Allocator.of(facts.mem_allocator)
            problems.update(dict.fromkeys(problems_of_kv(facts, self._where)))
        return list(problems)

    async def scan(self, cursor: int, tenant_tag: bytes = b"", session_id: str = "") -> Page:
        """See `Blobs.scan`."""
        pattern = f"kv1:{{{tenant_tag.hex() or '*'}:{session_id or '*'}}}:*"
        following, keys = await self._within(self._servers.scan(cursor, pattern, PAGE_KEYS))
        met = [(key, place) for key in set(keys) if (place := home_of(key)) is not None]
        answers = await self._send([(word, key) for key, _ in met for word in ("STRLEN", "PTTL")]) if met else []
        blobs = (
            Blob(key, place, length, None if ttl_ms < 0 else ttl_ms / 1000)
            for (key, place), length, ttl_ms in zip(met, answers[::2], answers[1::2], strict=True)
            if length
        )
        return Page(following, tuple(blobs))

    async def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """See `Blobs.sizes`."""
        found: list[int] = []
        for part in _parts(keys, PAGE_KEYS):
            found += await self._send([("STRLEN", key) for key in part])
        return found

    async def renew(self, keys: Sequence[bytes], ttl_s: float) -> int:
        """See `Blobs.renew`."""
        renewed = 0
        # The set that names a home's frames must outlive them.
        indexes = sorted({index_key(key) for key in keys})
        for part in _parts([*indexes, *keys], PAGE_KEYS):
            answers = await self._send([("PEXPIRE", key, round(ttl_s * 1000)) for key in part])
            renewed += sum(answer for key, answer in zip(part, answers, strict=True) if not key.startswith(b"kv1i:"))
        return renewed

    async def delete(self, keys: Sequence[bytes]) -> int:
        """See `Blobs.delete`."""
        deleted = 0
        for part in _parts(keys, PAGE_KEYS):
            # One by one: on a cluster they lie in different places.
            deleted += sum(await self._send([("UNLINK", key) for key in part]))
        return deleted

    async def memory(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """What the server says that values take, and that the sets take which name them."""
        indexes = sorted({index_key(key) for key in keys})
        taken: list[int] = []
        for part in _parts([*indexes, *keys], PAGE_KEYS):
            taken += [num_bytes or 0 for num_bytes in await self._send([("MEMORY USAGE", key) for key in part])]
        return sum(taken[len(indexes) :]), sum(taken[: len(indexes)])

    async def corrupt(self, keys: Sequence[bytes]) -> list[bytes]:
        """See `Blobs.corrupt`."""
        bad: list[bytes] = []
        for part in _parts(keys, READ_KEYS):
            values = await self._send([("GET", key) for key in part])
            for key, value in zip(part, values, strict=True):
                if value is not None and not await asyncio.to_thread(_is_whole, key, value):
                    bad.append(key)
        return bad

    async def aclose(self) -> None:
        """Closes connections."""
        await self._servers.aclose()

    async def _send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers, each to a command on one key."""
        answers = await self._within(self._servers.send(commands))
        for answer in answers:
            if isinstance(answer, Exception):
                raise unavailable(answer, self._where) from answer
        return answers

    async def _within(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except FAULTS as error:
            raise unavailable(error, self._where) from error


def home_of(key: bytes) -> Home | None:
    """Where the frame of a key lies; None if it isn't a frame's key."""
    parts = _FRAME_KEY.fullmatch(key)
    return None if parts is None else Home(bytes.fromhex(parts[1].decode()), SessionId(parts[2].decode()))


async def all_blobs(blobs: Blobs, tenant_tag: bytes, session_id: str = "") -> AsyncIterator[Blob]:
    """Every frame of a tenant, or of one of its homes, each once. Takes time in proportion to all that is there."""
    seen: set[bytes] = set()
    cursor = 0
    while True:
        page = await blobs.scan(cursor, tenant_tag, session_id)
        for blob in page.blobs:
            if blob.key not in seen:
                seen.add(blob.key)
                yield blob
        cursor = page.cursor
        if cursor == 0:
            return


def _is_whole(key: bytes, value: bytes) -> bool:
    try:
        decode_frame(key, value)
    except CorruptFrame:
        return False
    return True


def _parts(items: Sequence[Any], limit: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), limit):
        yield items[start : start + limit]
