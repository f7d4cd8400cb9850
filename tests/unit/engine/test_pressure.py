"""Who gives way under growing pressure: idle sessions to host memory, then idle ones whole, running ones last."""

from __future__ import annotations

from kvservice.models.tiny import tiny_model
from kvservice.types import SessionId
from tests.unit.engine.driving import Drive, answering, device_bytes, group_bytes, make_engine, tokens


def test_idle_sessions_leave_the_device_then_go_whole_and_running_ones_are_preempted_last() -> None:
    model = tiny_model(seed=0, num_layers=1)
    # Room for four of about 200 tokens on the device, and for little more than one of them in host memory.
    engine = make_engine(model, room=device_bytes(model, *([17 * 16] * 4)), host_bytes=group_bytes(model, 4))
    drive = Drive(engine)

    def read(name: str, new: int, priority: int = 0) -> None:
        seed = sum(name.encode())
        drive.submit(
            name,
            document=tokens(190, seed=seed),
            prompt=tokens(4, seed=seed + 1),
            sampling=answering(new),
            priority=priority,
        )

    def made_room() -> tuple[int, int, int]:
        stats = engine.stats()
        return stats.idle_swapped_out, stats.idle_dropped, stats.swapped_out + stats.forgotten

    for name in ("idle-1", "idle-2", "idle-3"):
        read(name, new=2)
        drive.run()
    read("running", new=64)
    drive.until(lambda: drive.answers.get(("running", 0)))
    assert made_room() == (0, 0, 0)

    # One more fits if an idle one leaves the device: the one that was used least recently.
    read("first", new=64)
    drive.until(lambda: drive.answers.get(("first", 0)))
    assert made_room() == (1, 0, 0)
    assert drive.place("idle-1").name in ("LEAVING", "PARKED")

    # Host memory is full with it: now one is dropped whole. What was stored of it is in Redis.
    read("second", new=64)
    drive.until(lambda: drive.answers.get(("second", 0)))
    assert made_room()[1] == 1
    assert made_room()[2] == 0
    assert SessionId("idle-1") not in engine._sequences.ids()

    # The last idle one goes, and only then one that runs, for a call that goes first.
    read("third", new=64, priority=1)
    drive.until(lambda: drive.answers.get(("third", 0)))
    assert made_room()[2] == 0
    read("fourth", new=64, priority=1)
    drive.until(lambda: drive.answers.get(("fourth", 0)))
    assert made_room()[2] == 1
    drive.run()
    assert {"running", "first", "second", "third", "fourth"} <= set(drive.finished)
    engine.check()
