"""Two servers side by side on the page, in a real browser against stand-ins for them."""

import json

from playwright.sync_api import expect

from tests.server.page_stub import DROP
from tests.server.page_use import ask


def test_compare_streams_from_both_servers_side_by_side(open_page, server, start):
    second = start(allowed_origin=server.url, drop=None, models=("full",), first_s=0.3, gap_s=0.1)
    page = open_page()
    page.fill("#compare", f"{second.url}/v1/")  # as OpenAI's clients have it
    page.click("#compare-form button")
    page.wait_for_url(f"{server.url}/?compare=*")
    expect(page.locator("#second")).to_have_text(f"{second.url} full: no mask reported: stock server")
    ask(page)
    answers = page.locator(".answer")
    expect(answers).to_have_count(2)
    expect(page.locator(".answer.own .text")).to_have_text("A short answer.")
    expect(page.locator(".answer.other")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".verdict")).to_contain_text("This server was")
    expect(page.locator(".verdict")).to_contain_text("times the second server's")
    expect(page.locator(".answer.other .text")).to_have_text("A short answer.")
    expect(page.locator(".answer.other h4")).to_have_text(f"full at 127.0.0.1:{second.port}")
    assert page.locator(".answer .times").nth(1).inner_text().startswith("TTFT")
    left, right = (answers.nth(index).bounding_box() for index in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert second.asked("/v1/chat/completions")[0][1]["model"] == "full"
    page.click("#stop-comparing")
    expect(page.locator("#second")).to_be_empty()


def test_a_second_server_with_a_mask_reports_it(open_page, server, start):
    second = start(allowed_origin="*")
    page = open_page(f"?compare={second.url}")
    expect(page.locator("#second")).to_contain_text(f"embedded: {DROP['summary']}")


def test_a_second_server_that_allows_no_other_origin_is_explained(open_page, server, start):
    page = open_page(f"?compare={start().url}")
    expect(page.locator("#second code")).to_have_text(f"""--allowed-origins '["{server.url}"]'""")


def test_a_second_server_that_is_not_there_is_told_from_one_without_cors(open_page, server, start):
    second = start(allowed_origin="*")
    second.close()
    page = open_page(f"?compare={second.url}")
    expect(page.locator("#second")).to_contain_text("does not answer")
    expect(page.locator("#second code")).to_have_count(0)
    second.start()
    page.click("#second button")
    expect(page.locator("#second")).to_contain_text(DROP["summary"])


def test_what_is_no_base_url_is_refused(open_page, server):
    page = open_page("?compare=javascript:alert(1)")
    expect(page.locator("#second")).to_contain_text("is no base URL")
    ask(page)
    expect(page.locator(".answer .text")).to_have_text("A short answer.")


def test_the_api_key_goes_to_its_own_server_only(open_page, server, start):
    server.api_key = "own-key"
    second = start(allowed_origin=server.url, api_key="second-key")
    page = open_page(f"?compare={second.url}")
    expect(page.locator("#state")).to_have_text("API key needed")
    page.fill("#key input", "wrong")
    page.press("#key input", "Enter")
    expect(page.locator("#key")).to_contain_text("The key was not accepted")
    page.fill("#key input", "own-key")
    page.click("#key button")
    expect(page.locator("#state")).to_have_text("Running")
    expect(page.locator("#key input")).to_have_count(0)
    page.fill("#second input", "second-key")
    page.press("#second input", "Enter")
    expect(page.locator("#second")).to_contain_text(DROP["summary"])
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()
    assert server.asked("/v1/chat/completions")[0][0]["Authorization"] == "Bearer own-key"
    assert {headers.get("Authorization") for _, _, headers, _ in second.requests} == {None, "Bearer second-key"}
    assert "second-key" not in json.dumps([headers for _, _, headers, _ in server.requests])
    assert '"Authorization: Bearer $API_KEY"' in page.inner_text("#curl")
    assert page.evaluate("Object.keys(localStorage)") == []
    third = start(allowed_origin="*")
    page.goto(f"{server.url}/?compare={third.url}")
    expect(page.locator("#second")).to_contain_text(DROP["summary"])
    assert all("Authorization" not in headers for _, _, headers, _ in third.requests)
