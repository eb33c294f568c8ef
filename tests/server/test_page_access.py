"""The page for everyone: contrast, phones, the keyboard, engines that die, and hostile text."""

import json
import shlex

import pytest
from playwright.sync_api import expect

from tests.server.page_stub import DROP
from tests.server.page_use import ask, deep_model

HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'
# WCAG's contrast ratio of every text that can be seen, worst first, with the text.
CONTRASTS = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb(color).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((rgb(color)[3] ?? 1) > 0) return color;
    }
  };
  return [...document.querySelectorAll("body *")]
    .filter((node) => node.checkVisibility() && [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()))
    .map((node) => {
      const pair = [getComputedStyle(node).color, background(node)].map(luminance).sort((a, b) => b - a);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), node.textContent.slice(0, 40)];
    })
    .sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_modes(open_page, server, start, scheme):
    second = start(allowed_origin="*", full=True)
    page = open_page(f"?compare={second.url}", color_scheme=scheme, clock=True)
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 60
    assert contrasts[0][0] >= 4.5, contrasts[:5]
    server.down = "gone"
    page.clock.fast_forward(2000)
    expect(page.locator("#alert")).to_be_visible()
    assert page.evaluate(CONTRASTS)[0][0] >= 4.5


def test_the_mode_follows_the_system_until_it_is_chosen_and_is_remembered(open_page):
    page = open_page(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert light != dark
    page.click("#theme")
    assert page.evaluate(background) == light
    page.reload()
    page.wait_for_selector("body[data-state]")
    assert page.evaluate(background) == light
    expect(page.locator("#theme")).to_have_attribute("aria-pressed", "false")
    page.click("#theme")
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate(background) == dark


@pytest.mark.parametrize("layers", [12, 128])
def test_a_phone_shows_everything_without_scrolling_sideways(open_page, server, start, layers):
    server.drop = deep_model(layers) | {"model": "organisation/" + "a-rather-long-model-name" * 3}
    server.pieces = ("x" * 400,)
    second = start(allowed_origin="*")
    page = open_page(f"?compare={second.url}", width=360, height=740, has_touch=True, is_mobile=True)
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.tap("[data-layer='3'][data-sublayer=mlp]")
    expect(page.locator("#readout")).to_contain_text("Layer 3, MLP: dropped, 1st of 1 to go")


def test_all_of_it_works_from_the_keyboard(open_page, server):
    page = open_page()
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    order = []
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", order
    assert order == ["theme", "cell kept", "temperature", "max-tokens", "clear", "log", "prompt", "send"]
    page.focus("#layers [tabindex='0']")
    for key in ("ArrowDown", "ArrowRight", "End", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    expect(page.locator("#readout")).to_contain_text("Layer 10, attention: dropped, 4th of 4 to go")
    page.reload()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    server.pieces, server.gap_s = ("more ",) * 500, 0.02
    page.keyboard.type("go on")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_focused()


def test_the_dead_engine_is_shown_and_the_page_recovers_with_the_model_that_comes_back(open_page, server):
    page = open_page(clock=True)
    server.down = "the engine core died"
    page.clock.fast_forward(2000)
    expect(page.locator("#state")).to_have_text("Engine down")
    expect(page.locator("#alert")).to_contain_text("The engine is down: the engine core died.")
    server.close()
    page.clock.fast_forward(2000)
    expect(page.locator("#alert")).to_contain_text("does not answer")
    server.down = None
    server.drop |= {"model": "another", "mask": {**DROP["mask"], "attention": []}}
    server.start()
    page.clock.fast_forward(2000)
    expect(page.locator("#state")).to_have_text("Running")
    expect(page.locator("#alert")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("another")
    expect(page.locator("#layers .dropped")).to_have_count(0)


def test_an_answer_that_is_cut_off_does_not_end_the_page(open_page, server):
    page = open_page(clock=True)
    server.cut = True
    page.clock.fast_forward(2000)
    expect(page.locator("#state")).to_have_text("No answer")
    server.cut = False
    page.clock.fast_forward(2000)
    expect(page.locator("#state")).to_have_text("Running")


def test_a_page_opened_while_the_engine_is_down_fills_itself_when_it_is_up(open_page, server):
    server.down = "starting"
    page = open_page(clock=True)
    expect(page.locator("#state")).to_have_text("Engine down")
    server.down = None
    page.clock.fast_forward(2000)
    expect(page.locator("#layers .cell")).to_have_count(24)


def test_whatever_a_model_or_a_server_says_is_text(open_page, server, start):
    server.pieces = (HOSTILE[:20], HOSTILE[20:])
    server.models = (HOSTILE,)
    server.drop |= {"model": HOSTILE, "summary": HOSTILE, "architecture": HOSTILE, "kv_layout": HOSTILE}
    server.drop["scores"]["calibration"] = HOSTILE
    second = start(allowed_origin="*", models=(HOSTILE,), stream_error=HOSTILE)
    page = open_page(f"?compare={second.url}", clock=True)
    ask(page, HOSTILE)
    expect(page.locator(".answer.own .text")).to_have_text(HOSTILE)
    expect(page.locator(".failure")).to_have_text(HOSTILE)
    for place in ("#model", "#summary", ".question"):
        expect(page.locator(place)).to_have_text(HOSTILE)
    assert page.locator("img, body script, iframe").count() == 0
    assert page.evaluate("window.pwned") is None
    assert not page.complaints
    server.down = HOSTILE
    page.clock.fast_forward(2000)
    expect(page.locator("#alert")).to_contain_text(HOSTILE)


def test_no_other_origin_is_asked_for_anything(open_page, server):
    page = open_page()
    ask(page)
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    assert len(page.urls) > 15
    assert {url for url in page.urls if not url.startswith((f"{server.url}/", "data:"))} == set()
    assert not page.complaints


def test_the_curl_line_can_be_copied_and_asks_this_server(open_page, server):
    server.models = ('it\'s "mine"',)
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied")
    command, url, *options = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert (command, url) == ("curl", f"{server.url}/v1/chat/completions")
    assert json.loads(options[options.index("-d") + 1])["model"] == server.models[0]


def test_one_of_several_models_can_be_chosen(open_page, server):
    server.models = ("embedded", "adapter")
    page = open_page()
    page.select_option("#choose-model", "adapter")
    ask(page)
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    assert server.asked("/v1/chat/completions")[0][1]["model"] == "adapter"


def test_nothing_moves_for_those_who_asked_for_that(open_page, server):
    server.pieces, server.gap_s = ("more ",) * 100, 0.02
    page = open_page(reduced_motion="reduce")
    ask(page)
    expect(page.locator(".text")).to_contain_text("more")
    assert page.evaluate("getComputedStyle(document.querySelector('.text'), '::after').animationName") == "none"
