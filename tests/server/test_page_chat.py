"""Asking the model on the page, in a real browser against a stand-in for the server."""

import re

import pytest
from playwright.sync_api import expect

from tests.server.page_use import ask, wait_until


def test_an_answer_streams_with_its_times(open_page, server):
    server.pieces, server.first_s, server.gap_s = ("Joins", " path", " segments", "."), 0.1, 0.5
    page = open_page()
    ask(page)
    answer = page.locator(".answer")
    expect(answer.locator(".text")).to_have_text("Joins path", timeout=2000)
    assert answer.get_attribute("aria-busy") == "true"
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(answer.locator(".text")).to_have_text("Joins path segments.")
    times = answer.locator(".times").inner_text()
    assert 100 <= float(re.search(r"TTFT ([\d.]+) ms", times)[1]) < 400
    # A busy browser may see the first piece some hundredths of a second late.
    assert 1.2 < float(re.search(r"([\d.]+) tokens/s", times)[1]) <= 2.04
    assert "4 tokens" in times
    assert "≈" not in times
    ((_, body),) = server.asked("/v1/chat/completions")
    assert body["model"] == "embedded"
    assert body["stream_options"] == {"include_usage": True}
    assert (body["temperature"], body["max_tokens"]) == (0, 256)
    assert not page.complaints


def test_settings_and_the_conversation_so_far_are_sent(open_page, server):
    server.finish = "length"
    page = open_page()
    page.fill("#temperature", "0.7")
    page.fill("#max-tokens", "9")
    ask(page, "one")
    expect(page.locator(".times")).to_contain_text("cut at max tokens")
    ask(page, "two")
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(2)
    body = server.asked("/v1/chat/completions")[1][1]
    assert [message["content"] for message in body["messages"]] == ["one", "A short answer.", "two"]
    assert (body["temperature"], body["max_tokens"]) == (0.7, 9)
    page.click("#clear")
    expect(page.locator(".answer")).to_have_count(0)
    ask(page, "three")
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(1)
    assert len(server.asked("/v1/chat/completions")[2][1]["messages"]) == 1


def test_shift_enter_is_a_new_line_and_control_enter_sends(open_page, server):
    page = open_page()
    page.fill("#prompt", "one")
    page.press("#prompt", "Shift+Enter")
    page.type("#prompt", "two")
    page.press("#prompt", "Control+Enter")
    expect(page.locator(".question")).to_have_text("one\ntwo")


def test_stop_ends_the_answer_on_the_server_too(open_page, server):
    server.pieces, server.gap_s = ("more ",) * 500, 0.02
    page = open_page()
    ask(page)
    expect(page.locator(".text")).to_contain_text("more more")
    page.click("#stop")
    expect(page.locator(".times")).to_contain_text("stopped by you")
    expect(page.locator(".times")).to_contain_text("≈")
    expect(page.locator("#send")).to_be_visible()
    wait_until(server.disconnected.is_set)


def test_a_model_without_a_chat_template_is_asked_for_completions(open_page, server):
    server.chat_template = False
    page = open_page()
    ask(page, "def f(")
    expect(page.locator(".text")).to_have_text("A short answer.")
    expect(page.locator("#no-chat-template")).to_be_visible()
    assert server.asked("/v1/completions")[0][1]["prompt"] == "def f("
    assert "/v1/completions" in page.inner_text("#curl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full": True}, "The server is full. Try again in 7 seconds."),
        ({"stream_error": "the engine ran out of luck"}, "the engine ran out of luck"),
    ],
)
def test_what_goes_wrong_is_said_in_words(open_page, server, changes, message):
    vars(server).update(changes)
    page = open_page()
    ask(page, "please")
    expect(page.locator(".failure")).to_have_text(message)
    # What got no answer at all can be sent again as it is.
    expect(page.locator("#prompt")).to_have_value("please" if server.full else "")
