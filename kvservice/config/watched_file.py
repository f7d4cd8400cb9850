"""Whether a file is another than it was. Knows nothing of what it holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

LOOK_INTERVAL_S = 1.0


class WatchedFile:
    """A file that is looked at when it is asked for, at most once a second. Not for several threads."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._seen = _state(path)
        self._looked_at = clock()

    def has_changed(self) -> bool:
        """Whether it changed since this was last answered with yes. One that is gone has not changed."""
        now = self._clock()
        if now - self._looked_at < LOOK_INTERVAL_S:
            return False
        self._looked_at = now
        state = _state(self.path)
        if state is None or state == self._seen:
            return False
        self._seen = state
        return True


def _state(path: Path) -> tuple[int, ...] | None:
    """Changes with the file; a file that was put in its place (as Kubernetes does) has another inode."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
