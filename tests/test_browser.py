"""The dashboard in Debian's Chromium: the way a person takes through it, without a request to the outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs Debian's chromium"),
]
_ROOT = Path(__file__).parents[1]
_START_S = 60


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A dashboard started as a user would, from another folder."""
    pytest.importorskip("streamlit")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("dashboard")
    words = [sys.executable, "-m", "planner", "dashboard", "--port", str(port), "--no-browser"]
    log = (folder / "log").open("w")
    server = subprocess.Popen(words, cwd=folder, env=os.environ | {"PYTHONPATH": str(_ROOT)}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(_START_S * 4):
            assert server.poll() is None, (folder / "log").read_text()
            if _healthy(url):
                break
            time.sleep(0.25)
        yield url
    finally:
        server.terminate()
        server.wait(10)
        log.close()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2) as answer:
            return bool(answer.read() == b"ok")
    except OSError:
        return False


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """A page that fails the test on an error of its own or a request to the outside."""
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        found = browser.new_page(viewport={"width": 1400, "height": 2000}, reduced_motion="reduce")
        found.set_default_timeout(60_000)
        faults: list[str] = []
        inside = (address, address.replace("http", "ws"), "data:", "blob:")
        found.on("pageerror", lambda error: faults.append(str(error)))
        found.on("request", lambda request: request.url.startswith(inside) or faults.append(request.url))
        yield found
        browser.close()
    assert not faults, faults


def _idle(page: Any) -> None:
    from playwright.sync_api import expect

    expect(page.locator("[data-testid='stApp'][data-test-script-state='notRunning']")).to_have_count(1)


def test_the_way_of_a_user(page: Any, address: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    headline = page.locator(".answer")
    page.goto(address)
    expect(headline).to_contain_text("16 x H200 SXM")
    expect(headline).to_contain_text("expected to meet the SLO")
    expect(page.get_by_test_id("stMetricValue")).to_have_count(6)

    page.get_by_role("combobox", name="Model").fill("Mixtral-8x7B-v0.1")
    page.get_by_role("option", name="Mixtral-8x7B-v0.1").first.click()
    expect(page.get_by_test_id("stCode").first).to_contain_text("Mixtral-8x7B-v0.1")
    page.get_by_role("spinbutton", name="Requests/s").fill("30")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("stCode").first).to_contain_text("--rate 30")
    _idle(page)

    dot = page.locator("g.mark-symbol path[aria-label*='meets the SLO']").first
    dot.click(force=True)  # dots overlap: the topmost is as good
    details = page.locator(".st-key-details strong").first
    expect(page.get_by_role("button", name="Use this layout")).to_be_visible()
    _idle(page)
    clicked = details.inner_text()
    page.get_by_role("combobox", name="Details of a layout").click()
    page.get_by_role("option").last.click()
    expect(details).not_to_have_text(clicked)
    _idle(page)
    listed = details.inner_text()
    page.locator("g.mark-symbol path[aria-label*='meets the SLO']").last.click(force=True)
    expect(details).not_to_have_text(listed)
    _idle(page)

    page.get_by_role("radio", name="MoE knobs").or_(page.get_by_role("button", name="MoE knobs")).first.click()
    page.get_by_role("spinbutton", name="Expert parallelism").fill("4")
    page.keyboard.press("Enter")
    expect(headline).to_contain_text("ep4")
    page.get_by_role("spinbutton", name="Expert parallelism").fill("3")
    page.keyboard.press("Enter")
    expect(page.get_by_text("does not divide 8 experts")).to_be_visible()
    page.get_by_role("spinbutton", name="Expert parallelism").fill("4")
    page.keyboard.press("Enter")
    expect(page.get_by_text("does not divide 8 experts")).to_have_count(0)

    page.get_by_role("radio", name="Simulation").or_(page.get_by_role("button", name="Simulation")).first.click()
    page.get_by_role("button", name="Simulate this layout").click()
    expect(page.get_by_role("button", name="Download the run folder")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the run folder").click()
    download.value.save_as(tmp_path / "run.zip")
    assert (tmp_path / "run.zip").stat().st_size > 10_000

    view = page.url
    page.get_by_role("radio", name="Compare").or_(page.get_by_role("button", name="Compare clusters")).first.click()
    expect(page.get_by_role("cell", name="B200 SXM")).to_be_visible()
    expect(page.get_by_role("button", name="Look at H200 SXM")).to_be_visible()

    page.goto(view)
    expect(headline).to_contain_text("ep4")


def test_a_simulation_is_cancelled_while_the_page_stays_quick(page: Any, address: str) -> None:
    from playwright.sync_api import expect

    page.goto(f"{address}/?view=Simulation")
    page.get_by_role("button", name="Simulate the plan").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("No result: cancelled")).to_be_visible()


def test_a_file_that_is_no_model_is_refused_and_nothing_is_lost(page: Any, address: str) -> None:
    from playwright.sync_api import expect

    page.goto(f"{address}/?model=mistralai%2FMixtral-8x7B-v0.1&gpus=4")
    page.get_by_text("Advanced").click()
    upload = page.locator("input[type=file]").first
    upload.set_input_files({"name": "wrong.json", "mimeType": "application/json", "buffer": b"{}"})
    expect(page.get_by_text("wrong.json: neither architectures")).to_be_visible()
    upload.set_input_files({"name": "config.json", "mimeType": "application/json", "buffer": b"not json"})
    expect(page.get_by_text("not valid JSON")).to_be_visible()
    expect(page.get_by_text("neither architectures")).to_have_count(0)
    upload.set_input_files({"name": "config.json", "mimeType": "application/json", "buffer": b" " * 6_000_000})
    expect(page.get_by_text("a config.json has at most 5,000,000")).to_be_visible()
    expect(page.get_by_text("not valid JSON")).to_have_count(0)
    expect(page.locator(".answer")).to_contain_text("4 x H200 SXM")
    expect(page.get_by_role("spinbutton", name="GPUs")).to_have_value("4")
