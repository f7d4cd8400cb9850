from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvservice.cli.main import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def flat_err(self) -> str:
        """Standard error on one line, without the box that usage errors come in."""
        return re.sub(r"[\s│]+", " ", self.err)


@pytest.fixture
def kvservice(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command in this process as the shell would."""

    def run(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return run
