from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvservice.errors import NotFound
from kvservice.registry import Registry


def test_what_was_registered_is_found_under_each_of_its_names() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one", "uno")(1)
    assert registry.get("one") == registry.get("uno") == 1
    assert list(registry) == [("one", 1), ("uno", 1)]


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("two")(2)
    registry.register("one")(1)
    with pytest.raises(NotFound, match="unknown number 'three': known are one, two") as caught:
        registry.get("three")
    assert caught.value.reason == "unknown_number"


def test_a_name_is_given_once() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one")(1)
    with pytest.raises(ValueError, match="'one' is registered twice"):
        registry.register("one")(2)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "plugins_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def test_discovery_imports_every_module(package: Path) -> None:
    (package / "a.py").touch()
    (package / "b.py").touch()
    Registry[int]("number").discover(package.name)
    assert {f"{package.name}.a", f"{package.name}.b"} <= sys.modules.keys()


def test_a_module_that_fails_to_import_ends_the_discovery(package: Path) -> None:
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        Registry[int]("number").discover(package.name)
