"""The drill's short form, by the command: proxies, real Redis, real processes, a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_faults_cost_time_and_no_answer(tmp_path):
    report = tmp_path / "drill.json"
    command = [sys.executable, "-m", "kvservice", "drill", "--reduced", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {fault["name"]: fault for fault in json.loads(report.read_text())["results"]["faults"]}
    assert set(found) == {
        "none",
        "bits flipped in replies",
        "evicted between look-up and read",
        "killed, restarted empty",
        "clock of a gateway jumps two days ahead",
        "worker killed in Generate",
    }
    assert all(fault["passed"] for fault in found.values())
    cold = found["evicted between look-up and read"]["probes"][0]
    assert (cold["name"], cold["outcome"]) == ("cold", "recomputed")
    assert cold["recomputed_tokens"] > 0
