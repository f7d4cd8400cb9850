"""`bench rolls`, small: gateways restarted and workers replaced under callers who notice nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice.cli.main import main
from kvservice.models.tiny import write_tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


def test_no_call_fails_while_gateways_are_upgraded_and_workers_rolled(tmp_path: Path) -> None:
    model = str(write_tiny_checkpoint(tmp_path / "tiny"))
    report = tmp_path / "rolls.json"
    load = ("--callers", "3", "--doc-tokens", "200", "--new-tokens", "48")
    sizes = ("--kv-bytes", "16MiB", "--host-bytes", "32MiB")
    with pytest.raises(SystemExit) as ended:
        main(("bench", "rolls", "--model", model, *load, *sizes, "--json", str(report)))
    assert not ended.value.code
    found = json.loads(report.read_text())["results"]
    assert (found["gateways"], found["workers"], found["bad_exits"]) == (2, 2, 0)
    assert (found["failed"], found["wrong"], found["lost_turns"]) == ({}, 0, 0)
    assert found["answers"] > 6
