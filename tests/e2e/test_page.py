"""The page for operators in a real browser. Skipped by name where there is no Chromium; CI installs one."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

from kvservice.client import Client, LocalService
from kvservice.telemetry.endpoint import MetricsEndpoint
from kvservice.telemetry.page import AdminPage
from kvservice.v1 import admin_pb2, common_pb2

MIB = 2**20
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PATIENCE_MS = 90_000.0

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.asyncio(loop_scope="module"),
]


class Watched:
    """A page, and what went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        # Its sandbox needs rights that root in a container lacks.
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield browser
        await browser.close()


@asynccontextmanager
async def browsing(browser: Browser, **settings: object) -> AsyncIterator[Watched]:
    context = await browser.new_context(**settings)
    context.set_default_timeout(PATIENCE_MS)
    try:
        yield Watched(await context.new_page())
    finally:
        await context.close()


class Scripted:
    """Stats that move from look to look, with names that would be trouble if they were taken for HTML."""

    worker_id = "<img src=x onerror=alert(1)>"

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> admin_pb2.GetStatsResponse:
        self.looks += 1
        workers = [self._worker(self.worker_id), self._worker("w2")]
        tenants = [admin_pb2.TenantStats(tenant="<b>acme</b>", requests=12, tokens=34_567, concurrent_calls=4)]
        return admin_pb2.GetStatsResponse(
            workers=workers, tenants=tenants, running_calls=3, waiting_calls=self.looks % 3, version="1.2.3"
        )

    def _worker(self, worker_id: str) -> admin_pb2.WorkerStats:
        grown = self.looks * 3 * MIB
        worker = admin_pb2.WorkerStats(
            worker_id=worker_id,
            model="toy",
            device="cpu",
            device_capacity_bytes=512 * MIB,
            device_free_bytes=200 * MIB,
            host_capacity_bytes=1024 * MIB,
            host_free_bytes=600 * MIB,
            weight_bytes=300 * MIB,
            bytes=common_pb2.KvBytes(
                device_window=120 * MIB + grown, device_index=30 * MIB, device_slots=40 * MIB, host=400 * MIB, redis=MIB
            ),
            resident_sessions=6,
            parked_sessions=2,
            running_calls=2,
            recall_lookups=self.looks * 1000,
            recall_hits=self.looks * 900,
        )
        worker.tier.connected = True
        return worker


@pytest.fixture
def address() -> AsyncIterator[str]:
    page = AdminPage("gateway", Scripted(), interval_s=3.0)
    for _ in range(20):
        page.look()
    endpoint = MetricsEndpoint()
    endpoint.show(page)
    yield endpoint.start("127.0.0.1", 0)
    endpoint.close()


async def test_the_page_shows_the_stats_and_asks_nobody_else(browser: Browser, address: str) -> None:
    async with browsing(browser) as watched:
        page = watched.page
        await page.goto(f"http://{address}/")
        await page.wait_for_selector("#main:not([hidden])")
        assert await page.inner_text("#state") == "serving"
        tiles = await page.inner_text("#tiles")
        assert "12\nsessions held" in tiles.replace("\n\n", "\n")
        assert "90.0 %" in tiles
        assert await page.locator("#device path.area").count() == 4
        for name in ("host", "redis", "recall", "queue"):
            assert await page.locator(f"#{name} svg path").count() >= 1
        assert "8 sessions" in await page.inner_text("#ladder")
        # Names are text.
        assert "<b>acme</b>" in await page.inner_text("#tenants")
        assert Scripted.worker_id in await page.inner_text("#workers")
        assert await page.locator("img").count() == 0
        await page.get_by_role("button", name="weights").click()
        assert await page.locator("#device path.area").count() == 5
        await page.get_by_role("button", name="w2").click()
        assert "6\nsessions held" in (await page.inner_text("#tiles")).replace("\n\n", "\n")
        await page.locator("#device svg").hover()
        assert "window" in await page.inner_text("#tip")
        assert watched.complaints == []
        assert {url.split("?")[0] for url in watched.asked} <= {
            f"http://{address}/",
            f"http://{address}/page.json",
            "data:,",
        }


async def test_the_policy_stops_what_is_not_of_the_page(browser: Browser, address: str) -> None:
    async with browsing(browser) as watched:
        await watched.page.goto(f"http://{address}/")
        await watched.page.wait_for_selector("#main:not([hidden])")
        await watched.page.evaluate(
            "() => { const script = document.createElement('script'); script.textContent = 'window.evil = 1';"
            " document.body.append(script); }"
        )
        assert await watched.page.evaluate("() => window.evil") is None
        refused = await watched.page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => false, () => true)")
        assert refused
        assert any("Content Security Policy" in each for each in watched.complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_is_legible_by_day_and_night_and_on_a_telephone(browser: Browser, address: str, scheme: str) -> None:
    async with browsing(browser, color_scheme=scheme, viewport={"width": 390, "height": 844}) as watched:
        page = watched.page
        await page.goto(f"http://{address}/")
        await page.wait_for_selector("#main:not([hidden])")
        assert await page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        assert await contrast(page) > 4.5
        await page.click("#theme")
        assert await contrast(page) > 4.5
        assert await page.evaluate("() => document.documentElement.dataset.theme") != scheme


async def contrast(page: Page) -> float:
    """Of the least prominent text that is to be read, on its card (WCAG)."""
    ink, card = await page.evaluate(
        "() => [getComputedStyle(document.querySelector('h2 + p')).color,"
        " getComputedStyle(document.querySelector('.card')).backgroundColor]"
    )

    def luminance(colour: str) -> float:
        channels = [int(each) / 255 for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(ink), luminance(card)))
    return (light + 0.05) / (dark + 0.05)


async def test_a_running_service_has_the_page_and_it_follows(browser: Browser, tmp_path) -> None:
    from kvservice.models.tiny import write_tiny_checkpoint

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    sizes = ("--kv-bytes", "48MiB", "--host-bytes", "64MiB", "--dtype", "fp32", "--threads", "1")
    model = str(write_tiny_checkpoint(tmp_path / "tiny"))
    arguments = ["--model", model, "--log-level", "WARNING", *sizes, "--metrics-port", str(port)]
    async with LocalService(arguments) as service, Client(service.address) as client, browsing(browser) as watched:
        await watched.page.goto(f"http://127.0.0.1:{port}/")
        session = (await client.create_session(recipe="recall")).session_id
        await client.append(session, "The pass key is 28478. " * 40)
        await client.ask(session, "question? ", max_new_tokens=8, ignore_eos=True)
        await watched.page.wait_for_function("() => document.querySelector('#tiles')?.innerText.startsWith('1')")
        held = (await client.stats()).workers[0]
        shown = json.loads(await (await watched.page.request.get(f"http://127.0.0.1:{port}/page.json")).text())
        assert shown["workers"][0]["window"] == held.window_bytes > 0
        assert shown["workers"][0]["host"] == held.host_bytes > 0
        assert "local" in await watched.page.inner_text("#tenants")
        assert watched.complaints == []
