"""Things found by name. Knows nothing of what it holds."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from kvservice.errors import NotFound

T = TypeVar("T")


class Registry(Generic[T]):
    """A named collection that modules add to when they are imported."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._items: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Returns a decorator that adds what it decorates under each of `names`."""

        def add(item: T) -> T:
            for name in names:
                if name in self._items:
                    raise ValueError(f"{self._kind} {name!r} is registered twice")
                self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """The item called `name`.

        Raises:
            NotFound: there is none; the message lists those there are.
        """
        try:
            return self._items[name]
        except KeyError:
            known = ", ".join(self.names())
            raise NotFound(
                f"unknown {self._kind} {name!r}: known are {known}", reason=f"unknown_{self._kind}"
            ) from None

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._items)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return iter(sorted(self._items.items()))

    def discover(self, package: str) -> None:
        """Imports every module of `package`, so that each registers itself. An import error ends the start."""
        module = importlib.import_module(package)
        for info in pkgutil.iter_modules(module.__path__, f"{package}."):
            importlib.import_module(info.name)
