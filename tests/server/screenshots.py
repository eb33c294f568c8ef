"""The documentation's pictures of the page, of real servers: SmolLM2 as `make serve` serves it, and in full.

python -m tests.server.screenshots
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.record import RESULTS
from benchmarks.servers import free_port, serving

OUT = Path(__file__).parents[2] / "server" / "screenshots"
MODEL = ["smollm2", "--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.3"]
DROPPED = ["--drop-attention", "7,6,29", "--comparison", str(RESULTS / "real" / "smollm2" / "comparison.json")]
QUESTION = "What is a mutex, in one sentence?"
WIDE = {"width": 1440, "height": 900}
CONTEXTS = {
    "light": {"viewport": WIDE, "color_scheme": "light"},
    "dark": {"viewport": WIDE, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2},
    "compare": {"viewport": WIDE, "color_scheme": "light"},
}


def ask(page: Page, answers: int) -> None:
    page.fill("#max-tokens", "64")
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    expect(page.locator("#log").get_by_text("TTFT")).to_have_count(answers, timeout=60_000)
    page.wait_for_timeout(6000)  # for the live figures to have had a look before and after


def shoot(browser: Browser, url: str, name: str, query: str = "", answers: int = 1) -> None:
    context = browser.new_context(**CONTEXTS[name])
    page = context.new_page()
    page.goto(f"{url}/{query}")
    page.wait_for_selector("#layers .cell.dropped")
    page.wait_for_timeout(3000)
    ask(page, answers)
    page.screenshot(path=OUT / f"{name}.png", full_page=name == "narrow")
    context.close()


def main() -> None:
    with ExitStack() as stack:
        here = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (here / "full").mkdir()
        port = free_port()
        dropped = stack.enter_context(serving(here, *DROPPED, model=MODEL, port=port))
        origin = json.dumps([f"http://127.0.0.1:{port}"])
        options = ["--allowed-origins", origin, "--served-model-name", "smollm2-full"]
        full = stack.enter_context(serving(here / "full", *options, model=MODEL))
        for server, name in ((dropped, "smollm2"), (full, "smollm2-full")):  # the first request takes longer
            body = {"model": name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-background-networking"]
        )
        for name in ("light", "dark", "narrow"):
            shoot(browser, dropped.url, name)
        shoot(browser, dropped.url, "compare", f"?compare={full.url}", answers=2)
        browser.close()


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    main()
