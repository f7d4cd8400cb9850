from __future__ import annotations

import asyncio

from kvservice.store.tasks import end_tasks


async def test_a_task_that_loses_a_cancel_is_ended_all_the_same() -> None:
    lost = 0

    async def forgetful() -> None:
        nonlocal lost
        while lost < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(forgetful()), asyncio.create_task(asyncio.Event().wait())]
    await asyncio.sleep(0)
    await end_tasks(tasks)
    assert lost == 2
    assert all(task.cancelled() for task in tasks)
