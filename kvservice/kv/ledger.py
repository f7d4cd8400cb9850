"""Every byte by owner, and what has been promised to whom. Knows nothing of blocks or tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

from kvservice.errors import InternalError
from kvservice.types import SessionId


class Owner(Enum):
    """Who holds device or host bytes."""

    WEIGHTS = "weights"
    WORKSPACE = "workspace"
    WINDOW = "window"
    INDEX = "index"
    SLOTS = "slots"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes promised to one sequence."""

    device_bytes: int
    host_bytes: int


class Ledger:
    """Bytes in use by owner, and reservations that keep admitted sequences from running out.

    A sequence reserves all that it can come to hold as if it were alone. What several hold together is credited once
    for each further holder, so `promised = reserved - shared`, and what is in use never exceeds what is promised.

    Args:
        device_capacity_bytes: what sequences may take of the arena, so without the prefill workspace.
        host_capacity_bytes: what they may take of the host tier.
    """

    def __init__(self, device_capacity_bytes: int, host_capacity_bytes: int) -> None:
        self.device_capacity_bytes = device_capacity_bytes
        self.host_capacity_bytes = host_capacity_bytes
        self._used: Counter[Owner] = Counter()
        self._shared: Counter[Owner] = Counter()
        self._reserved: dict[SessionId, Reservation] = {}
        self._device_reserved = 0
        self._host_reserved = 0

    @property
    def device_free_bytes(self) -> int:
        """Device bytes promised to nobody.

        Below zero for a while when a sequence that gave up tokens shares less than before, and will have to copy more
        when it goes on: until that is made good nobody gets more.
        """
        return self.device_capacity_bytes - self._device_reserved + self._device_shared

    @property
    def host_free_bytes(self) -> int:
        """Host bytes promised to nobody."""
        return self.host_capacity_bytes - self._host_reserved + self._shared[Owner.HOST]

    @property
    def _device_shared(self) -> int:
        return self._shared.total() - self._shared[Owner.HOST]

    def used_bytes(self, owner: Owner) -> int:
        """Bytes that `owner` holds now; shared ones count once."""
        return self._used[owner]

    def shared_bytes(self, owner: Owner) -> int:
        """Bytes that would be in use besides if nothing of `owner` were shared."""
        return self._shared[owner]

    def share(self, owner: Owner, num_bytes: int) -> None:
        """Notes that bytes of `owner` got one more holder (or, negative, lost one that wasn't the last)."""
        self._shared[owner] += num_bytes
        if self._shared[owner] < 0:
            raise InternalError(f"{owner.value} lost more holders than it had")

    def add(self, owner: Owner, num_bytes: int) -> None:
        """Notes that `owner` took (or, negative, gave back) bytes."""
        self._used[owner] += num_bytes
        if self._used[owner] < 0:
            raise InternalError(f"{owner.value} gave back more bytes than it took")

    def reservation(self, session_id: SessionId) -> Reservation:
        """What is promised to a sequence; nothing, if it isn't known."""
        return self._reserved.get(session_id, Reservation(0, 0))

    def shortfall(self, session_id: SessionId, wanted: Reservation) -> Reservation:
        """The free bytes that are missing before `reserve` of the same arguments would succeed."""
        held = self.reservation(session_id)
        return Reservation(
            max(0, wanted.device_bytes - held.device_bytes - self.device_free_bytes),
            max(0, wanted.host_bytes - held.host_bytes - self.host_free_bytes),
        )

    def reserve(self, session_id: SessionId, wanted: Reservation) -> None:
        """Sets the sequence's reservation to `wanted`, all of it or nothing.

        Raises:
            InternalError: it grows, and that doesn't fit; the caller asked `shortfall` first.
        """
        held = self.reservation(session_id)
        device, host = wanted.device_bytes - held.device_bytes, wanted.host_bytes - held.host_bytes
        # What is free may be below zero, see `device_free_bytes`; giving back is always possible.
        if device > max(0, self.device_free_bytes) or host > max(0, self.host_free_bytes):
            raise InternalError(f"no room to reserve {wanted}")
        self._set(session_id, wanted)

    def reserve_shared(self, session_id: SessionId, held: Reservation) -> None:
        """The first reservation of a fork: all that it holds. It is credited, so this takes nothing from anyone."""
        self._set(session_id, held)

    def hand_over(self, giver: SessionId, taker: SessionId, part: Reservation) -> None:
        """Makes a part of one sequence's reservation another's."""
        gives, takes = self.reservation(giver), self.reservation(taker)
        self._set(giver, Reservation(gives.device_bytes - part.device_bytes, gives.host_bytes - part.host_bytes))
        self._set(taker, Reservation(takes.device_bytes + part.device_bytes, takes.host_bytes + part.host_bytes))

    def release(self, session_id: SessionId) -> Reservation:
        """Forgets the sequence's reservation and returns what it was."""
        held = self._reserved.pop(session_id, Reservation(0, 0))
        self._device_reserved -= held.device_bytes
        self._host_reserved -= held.host_bytes
        return held

    def _set(self, session_id: SessionId, reservation: Reservation) -> None:
        held = self.reservation(session_id)
        self._device_reserved += reservation.device_bytes - held.device_bytes
        self._host_reserved += reservation.host_bytes - held.host_bytes
        self._reserved[session_id] = reservation
