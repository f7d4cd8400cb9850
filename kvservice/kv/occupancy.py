"""Bytes times seconds: what KV has taken since somebody last asked. Knows no sequences and no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ByteSeconds:
    """Of one session, or of a worker."""

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: ByteSeconds) -> ByteSeconds:
        """Both together."""
        return ByteSeconds(self.device + other.device, self.host + other.host)


class Occupancy:
    """Adds bytes up over time. Between two observations what was there at the first counts."""

    def __init__(self, now: float) -> None:
        """Begins with nothing."""
        self._since = now
        self._device_bytes = 0
        self._host_bytes = 0
        self._sum = ByteSeconds()

    def observe(self, now: float, device_bytes: int, host_bytes: int) -> None:
        """From now on there are so many bytes."""
        seconds = now - self._since
        self._sum += ByteSeconds(seconds * self._device_bytes, seconds * self._host_bytes)
        self._since, self._device_bytes, self._host_bytes = now, device_bytes, host_bytes

    def take(self) -> ByteSeconds:
        """What has been added up, until the last observation, and since this was last asked."""
        taken, self._sum = self._sum, ByteSeconds()
        return taken
