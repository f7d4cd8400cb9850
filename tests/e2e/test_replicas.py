"""`bench kills` and `bench scale`, small: Ray replicas killed with -9, added by load and taken away again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice.cli.main import main
from kvservice.models.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.timeout(700)

SMALL = ("--kv-bytes", "16MiB", "--host-bytes", "32MiB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("replicas") / "tiny"))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(("bench", *arguments))
    return int(ended.value.code or 0)


def test_workers_killed_in_mid_stream_cost_no_token_and_no_turn(folder: str, tmp_path: Path) -> None:
    report = tmp_path / "kills.json"
    load = ("--kills", "2", "--callers", "2", "--doc-tokens", "400", "--new-tokens", "64")
    assert run("kills", "--model", folder, *load, *SMALL, "--json", str(report)) == 0
    found = json.loads(report.read_text())["results"]
    assert (found["kills"], found["wrong"], found["lost_turns"]) == (2, 0, 0)
    assert found["answers"] > 6
    assert len(found["restart_s"]) == 2


def test_load_alone_adds_a_worker_and_its_end_takes_one_away(folder: str, tmp_path: Path) -> None:
    report = tmp_path / "scale.json"
    load = ("--workers", "2", "--callers", "4", "--doc-tokens", "1200", "--queue-s", "0.002", "--hold-s", "1")
    down = ("--down-delay-s", "3", "--timeout-s", "240")
    plot = tmp_path / "scale.png"
    arguments = ("--model", folder, *load, *down, *SMALL, "--json", str(report), "--plot", str(plot))
    assert run("scale", *arguments) == 0
    found = json.loads(report.read_text())["results"]
    assert (found["most_workers"], found["wrong"], found["lost_turns"]) == (2, 0, 0)
    assert found["samples"][-1]["workers"] == 1
    assert found["refusals"] == {}
    assert plot.stat().st_size > 10_000
