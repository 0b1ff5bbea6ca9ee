"""Seconds until the dashboard answers, in the browser and as CPU time of the server; and pictures of its pages.

python benchmarks/dashboard.py                     first screen and changes, as a table
python benchmarks/dashboard.py --pictures FOLDER   every page at 1400 x 2000 and 1280 x 800
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
SIZES = ((1400, 2000), (1280, 800))
PAGES = {
    "plan": {},
    "infeasible": {"system": "h100-sxm", "gpus": "8"},
    "knobs": {"view": "MoE knobs", "ep": "8", "skew": "zipf:1", "placement": "eplb", "redundant": "8"},
    "simulation": {"view": "Simulation"},
    "compare": {"view": "Compare clusters"},
}


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """Address and process id of a dashboard of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[1])
    words = [sys.executable, "-m", "planner", "dashboard", "--port", str(port), "--no-browser"]
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, env=os.environ | {"PYTHONPATH": root}, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            while not healthy(url):
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2) as answer:
            return bool(answer.read() == b"ok")
    except OSError:
        return False


def cpu_s(pid: int) -> float:
    """CPU seconds of the process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle(page: Any) -> None:
    expect(page.locator("[data-testid='stApp'][data-test-script-state='notRunning']")).to_have_count(1)


def enter(page: Any, label: str, value: str) -> None:
    page.get_by_role("spinbutton", name=label).fill(value)
    page.keyboard.press("Enter")


def timed(page: Any, pid: int, act: Callable[[], None], text: str) -> tuple[float, float, float]:
    """Seconds until the command line on the page holds `text`, until all is drawn, and CPU seconds of the server."""
    start, before = time.perf_counter(), cpu_s(pid)
    act()
    expect(page.locator(".answer")).to_be_visible()
    expect(page.get_by_test_id("stCode").first).to_contain_text(text)
    answered = time.perf_counter() - start
    idle(page)
    return answered, time.perf_counter() - start, cpu_s(pid) - before


def measure(url: str, pid: int, page: Any) -> None:
    steps: list[tuple[str, Callable[[], None], str]] = [
        ("first screen, server just started", lambda: page.goto(url), "--rate 4"),
        ("first screen, second visitor", lambda: page.goto(url), "--rate 4"),
        ("rate 4 -> 3", lambda: enter(page, "Requests/s", "3"), "--rate 3"),
        ("rate 3 -> 8: SLO missed, remedies", lambda: enter(page, "Requests/s", "8"), "--rate 8"),
        ("16 -> 32 GPUs", lambda: enter(page, "GPUs", "32"), "h200-sxm:4x8"),
        ("link with skew zipf:1", lambda: page.goto(f"{url}/?{urlencode({'skew': 'zipf:1'})}"), "--skew zipf:1"),
    ]
    print("| what | answer, s | page drawn, s | server CPU, s |\n|---|--:|--:|--:|")
    for name, act, text in steps:
        answered, drawn, cpu = timed(page, pid, act, text)
        print(f"| {name} | {answered:.1f} | {drawn:.1f} | {cpu:.2f} |", flush=True)


def pictures(url: str, page: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        for name, query in PAGES.items():
            page.goto(f"{url}/?{urlencode(query)}")
            expect(page.locator(".answer")).to_be_visible()
            if name == "simulation":
                page.get_by_role("button", name="Simulate the plan").click()
                expect(page.get_by_role("button", name="Download the run folder")).to_be_visible()
                page.mouse.move(5, 5)
            idle(page)
            page.wait_for_timeout(1500)
            page.screenshot(path=folder / f"{name}-{width}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path)
    wanted = parser.parse_args().pictures
    expect.set_options(timeout=120_000)
    with sync_playwright() as runner, server() as (url, pid):
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1400, "height": 2000}, reduced_motion="reduce")
        page.set_default_timeout(120_000)
        if wanted is None:
            measure(url, pid, page)
        else:
            pictures(url, page, wanted)
        browser.close()


if __name__ == "__main__":
    main()
