from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvservice.bench.fleet_sim import POLICIES, FleetLoad, recorded_turns, simulate, synthetic_turns
from kvservice.errors import ConfigError

LOAD = FleetLoad(workers=12, sessions=500, tenants=15, documents_a_tenant=6)


@pytest.fixture(scope="module")
def rows():
    turns = synthetic_turns(LOAD)
    return {policy: simulate(LOAD, turns, policy) for policy in POLICIES}


def test_placement_answers_sooner_and_computes_less_than_the_others(rows) -> None:
    ours = rows["placement"]
    for policy in POLICIES[1:]:
        assert ours.ttft_mean_s < rows[policy].ttft_mean_s
        assert ours.computed_tokens < rows[policy].computed_tokens
        assert ours.found_fraction > rows[policy].found_fraction
    assert ours.moved_bytes < rows["random"].moved_bytes
    assert ours.ttft_p99_s < rows["random"].ttft_p99_s


def test_all_policies_place_every_turn_and_runs_repeat(rows) -> None:
    turns = synthetic_turns(LOAD)
    assert {row.turns for row in rows.values()} == {len(turns)}
    assert simulate(LOAD, turns, "placement") == rows["placement"]
    assert [turn.time_s for turn in turns] == sorted(turn.time_s for turn in turns)


def test_hints_as_old_as_the_run_do_not_undo_affinity(rows) -> None:
    stale = replace(LOAD, stale_s=30.0)
    row = simulate(stale, synthetic_turns(stale), "placement")
    assert row.found_fraction > rows["random"].found_fraction


def test_recorded_turns_are_read_in_order_of_time_and_bad_files_are_refused(tmp_path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,session,document,document_tokens\n2.5,1,7,900\n1,0,7,900\n")
    turns = recorded_turns(trace)
    assert [(turn.time_s, turn.session, turn.document_tokens) for turn in turns] == [(1.0, 0, 900), (2.5, 1, 900)]
    assert simulate(replace(LOAD, workers=2), turns, "placement").turns == 2
    trace.write_text("time_s,session\n1,2\n")
    with pytest.raises(ConfigError, match="no column document, document_tokens"):
        recorded_turns(trace)
    with pytest.raises(ConfigError, match="No such file"):
        recorded_turns(tmp_path / "none.csv")


def test_the_command_writes_rows_and_a_picture(tmp_path, capsys) -> None:
    from kvservice.cli.main import main

    result, picture = tmp_path / "p.json", tmp_path / "p.png"
    sizes = ("--workers", "4", "--sessions", "40", "--tenants", "3")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "placement", *sizes, "--json", str(result), "--plot", str(picture)])
    assert ended.value.code == 0
    rows = json.loads(result.read_text())["results"]["rows"]
    assert [row["policy"] for row in rows] == list(POLICIES)
    assert set(rows[0]) >= {"ttft_mean_s", "ttft_p99_s", "moved_bytes", "imbalance"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "consistent_hash" in capsys.readouterr().out
