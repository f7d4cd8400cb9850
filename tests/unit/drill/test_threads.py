"""One thread can be stopped while the others of its process go on."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvservice.drill.faults_of_threads import StoppedThreads, thread_named
from kvservice.errors import Unavailable

CHILD = """
import sys, threading, time
from kvservice.drill import skewed
skewed._name_threads()
count = 0
def run():
    global count
    while True:
        count += 1
        time.sleep(0.001)
threading.Thread(target=run, name="kv-write-behind", daemon=True).start()
time.sleep(0.2)
print("ready", flush=True)
for line in sys.stdin:
    before = count
    time.sleep(0.2)
    print(count - before, flush=True)
"""


async def test_a_stopped_thread_does_nothing_and_goes_on_later():
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:

        def steps():
            child.stdin.write("\n")
            return int(child.stdout.readline())

        assert child.stdout.readline() == "ready\n"
        worker = SimpleNamespace(pid=child.pid)
        deployment = SimpleNamespace(workers=["a"], processes={"a": worker})
        threads = StoppedThreads("kv-write-behind")
        assert steps() > 0
        await threads.stop(deployment)
        assert steps() == 0
        await threads.go_on(deployment)
        assert steps() > 0
        with pytest.raises(Unavailable, match="no thread"):
            thread_named(child.pid, "another")
        child.kill()
