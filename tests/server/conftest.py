"""The browser that the page is looked at with, and the stand-in for the server behind it."""

import pytest

from tests.browser import browser
from tests.server.page_stub import Stub

__all__ = ["browser", "open_page", "server", "start"]


@pytest.fixture
def start():
    """A function that starts a stand-in; all of them end with the test."""
    stubs = []

    def start_stub(**changes):
        stubs.append(Stub(**changes).start())
        return stubs[-1]

    yield start_stub
    for stub in stubs:
        stub.close()


@pytest.fixture
def server(start):
    return start()


@pytest.fixture
def open_page(browser, server):
    """A function that opens the page and waits until it knows how the server is; `complaints` and `urls` are the page's
    console errors, and what it asked for.
    """
    contexts = []

    def open_one(query="", width=1440, height=860, clock=False, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.complaints, page.urls = [], []
        page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.urls.append(request.url))
        if clock:
            page.clock.install()
        page.goto(f"{server.url}/{query}")
        page.wait_for_selector("body[data-state]")
        return page

    yield open_one
    for context in contexts:
        context.close()
