"""Draws the pictures of the page and of `kvservice stats`: python docs/img/draw.py. Needs Chromium; takes minutes.

Two tenants talk with the real small model about documents of which not all fit on the device.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from playwright.async_api import Browser, ViewportSize, async_playwright
from rich.console import Console

from kvservice.cli.stats import stats_screen
from kvservice.client import Client, LocalService
from kvservice.demo.document import shipped_text

FOLDER = Path(__file__).parent
KEYS = {"acme": "tenant", "globex": "tenant", "ops": "operator"}
SESSIONS = (("acme", "recall"), ("globex", "recall"), ("acme", "recall"), ("globex", "exact"), ("acme", "recall"))
DOCUMENT_CHARACTERS = 6000
SERVICE_SECONDS = 30.0
"""That the sessions answer all at once before the pictures are taken."""


async def main() -> None:
    """Starts a service, gives it something to do, and takes its pictures."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        keys = Path(folder) / "keys.json"
        write_keys(keys)
        arguments = ["--api-keys", str(keys), "--metrics-port", str(port), "--log-level", "WARNING"]
        async with (
            LocalService([*arguments, "--kv-bytes", "72MiB", "--host-bytes", "512MiB"]) as service,
            AsyncExitStack() as stack,
        ):
            clients = {name: await stack.enter_async_context(Client(service.address, name)) for name in KEYS}
            sessions = await talk(clients)
            browser = await stack.enter_async_context(chromium())
            questions = [
                asyncio.create_task(client.ask(session, "\nGo on.\n", max_new_tokens=1500, ignore_eos=True))
                for client, session in sessions
            ]
            await asyncio.sleep(SERVICE_SECONDS)
            await draw_stats(clients["ops"])
            await draw_page(browser, f"http://127.0.0.1:{port}/")
            for question in questions:
                question.cancel()
            await asyncio.gather(*questions, return_exceptions=True)


def write_keys(path: Path) -> None:
    """An API key for each tenant: its name."""
    entries = [
        {"sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": name, "role": role}
        for name, role in KEYS.items()
    ]
    path.write_text(json.dumps({"keys": entries}))
    path.chmod(0o600)


async def talk(clients: dict[str, Client]) -> list[tuple[Client, str]]:
    """Loads a document into each session and asks about it twice."""
    text = shipped_text()
    sessions: list[tuple[Client, str]] = []
    for number, (tenant, recipe) in enumerate(SESSIONS):
        client = clients[tenant]
        session = (await client.create_session(recipe=recipe)).session_id
        start = number * 1500
        await client.append(session, text[start : start + DOCUMENT_CHARACTERS])
        sessions.append((client, session))
        await client.ask(session, "\n\nWho is told of?\n", max_new_tokens=24, ignore_eos=True)
    for client, session in sessions:
        await client.ask(session, "\nAnd then?\n", max_new_tokens=24, ignore_eos=True)
    return sessions


async def draw_stats(client: Client) -> None:
    """What `kvservice stats` shows, as a terminal."""
    console = Console(record=True, width=110, highlight=False, markup=False, file=io.StringIO())
    console.print(stats_screen("127.0.0.1:50051", await client.stats()))
    drawn = console.export_svg(title="kvservice stats")
    # Rich has a font fetched from elsewhere; the reader's own will do.
    (FOLDER / "stats.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The browser of this system."""
    async with async_playwright() as playwright:
        found = shutil.which("chromium")
        browser = await playwright.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=0)
        yield browser
        await browser.close()


async def draw_page(browser: Browser, url: str) -> None:
    """The page by day and by night."""
    viewport = ViewportSize(width=1280, height=900)
    page = await browser.new_page(color_scheme="light", viewport=viewport, device_scale_factor=1.25)
    page.set_default_timeout(0)
    await page.goto(url)
    await page.wait_for_selector("#main:not([hidden])")
    await page.screenshot(path=FOLDER / "page-light.png", full_page=True)
    await page.emulate_media(color_scheme="dark")
    await page.screenshot(path=FOLDER / "page-dark.png", full_page=True)


if __name__ == "__main__":
    asyncio.run(main())
