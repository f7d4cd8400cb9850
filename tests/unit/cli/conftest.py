from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvservice.cli.main import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def kvservice(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command in this process as the shell would."""

    def run(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return run
