"""The page in a real browser, against a stand-in for the server.

What a test changes of the stand-in is what the page is asked to cope with.
"""

import json
import re
import shlex
import time

import pytest
from playwright.sync_api import expect

from llmdrop_server.schemas import KV, Drop

from . import page_stub
from .page_stub import DROP, Stub

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


def ask(page, prompt="What is a path?"):
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def wait_until(condition, deadline_s=5):
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def deep_model(layers):
    importance = [0.5 / (1 + layer) for layer in range(layers)]
    scores = {"importance": dict.fromkeys(("attention", "mlp", "block"), importance), "calibration": "c4"}
    mask = {"num_hidden_layers": layers, "attention": [*range(layers - 1, layers // 2, -1)], "mlp": [3]}
    return {**DROP, "mask": mask, "scores": scores}


def test_the_stand_in_answers_as_the_server_does():
    from llmdrop_server import routes

    Drop.model_validate(page_stub.DROP)
    KV.model_validate(page_stub.KV)
    assert routes.security_headers()["Content-Security-Policy"] == page_stub.POLICY
    assert routes.ORIGIN.pattern == page_stub.ORIGIN.pattern


def test_every_layer_is_shown_and_the_dropped_ones_are_marked_by_more_than_colour(open_page):
    page = open_page()
    expect(page.locator("#layers .cell")).to_have_count(24)
    dropped = page.locator("#layers .cell.dropped")
    assert dropped.evaluate_all("cells => cells.map((cell) => [cell.dataset.sublayer, cell.textContent])") == [
        ["attention", "×2"],
        ["attention", "×3"],
        ["attention", "×4"],
        ["attention", "×1"],
    ]
    assert dropped.evaluate_all("cells => cells.map((cell) => +cell.dataset.layer)") == [7, 8, 10, 11]
    assert dropped.first.evaluate("cell => getComputedStyle(cell).borderStyle") == "dashed"


def test_a_cell_tells_its_numbers_to_a_pointer_and_shades_importance(open_page):
    page = open_page()
    page.hover("[data-layer='11'][data-sublayer=attention]")
    expect(page.locator("#readout")).to_have_text(
        "Layer 11, attention: dropped, 1st of 4 to go. Importance 0.0042; whole block 0.48."
    )
    page.mouse.move(1000, 400)
    expect(page.locator("#readout")).to_contain_text("4 of 12 attention, 0 of 12 MLP")
    shades = page.locator("[data-sublayer=mlp]").evaluate_all("cells => cells.map((cell) => +cell.dataset.shade)")
    by_importance = sorted(zip(DROP["scores"]["importance"]["mlp"], shades, strict=True))
    assert [shade for _, shade in by_importance] == sorted(shades)
    assert len({*shades}) > 1


def test_without_scores_or_parameters_the_rest_is_shown(open_page, server):
    unknown = {"parameters": None, "kv_bytes_per_token": None}
    server.drop |= {"scores": None, "full": {**DROP["full"], **unknown}}
    page = open_page()
    expect(page.locator("#layers .cell")).to_have_count(24)
    expect(page.locator("#legend")).to_contain_text("without importance scores")
    expect(page.locator("#capacity")).to_contain_text("not known for this architecture")
    assert not page.complaints


def test_a_sublayer_that_was_gone_when_scored_says_so(open_page, server):
    server.drop["scores"]["importance"]["attention"][11] = None
    page = open_page()
    page.hover("[data-layer='11'][data-sublayer=attention]")
    expect(page.locator("#readout")).to_contain_text("Already gone when the model was scored")


@pytest.mark.parametrize("layers", [12, 128])
def test_models_of_any_depth_fit_the_screen(open_page, server, layers):
    server.drop = deep_model(layers)
    page = open_page()
    expect(page.locator("#layers .cell")).to_have_count(2 * layers)
    outside = """cells => {
      const panel = document.getElementById("layers").getBoundingClientRect();
      return cells.map((cell) => cell.getBoundingClientRect())
        .filter((box) => box.bottom > panel.bottom + 1 || box.right > panel.right + 1 || box.width < 10).length;
    }"""
    assert page.locator("#layers .cell").evaluate_all(outside) == 0
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")


def test_the_numbers_are_those_of_the_api(open_page):
    page = open_page()
    expect(page.locator("#model")).to_have_text("embedded")
    expect(page.locator("#summary")).to_have_text(DROP["summary"])
    assert page.locator(".measure b").all_inner_texts() == [
        "3,072 B",
        "2,048 B",
        "341.3",
        "512",
        "5,116,224",
        "4,722,240",
    ]
    expect(page.locator(".headline")).to_have_text("1.5× the requests of the full model")
    widths = page.locator(".measure .fill").evaluate_all("fills => fills.map((fill) => parseFloat(fill.style.width))")
    assert widths == pytest.approx([100, 100 * 2 / 3, 100 * 2 / 3, 100, 100, 92.3], abs=0.1)
    expect(page.locator("#kv-use")).to_contain_text("96 of 4,096 blocks")
    expect(page.locator("#kv-use")).to_contain_text("128 tokens each, prefix hit rate 61%, 2 preemptions")


def test_live_numbers_are_computed_from_two_readings_of_all_engines(open_page, server):
    page = open_page(clock=True)
    page.clock.fast_forward(2000)
    tiles = page.locator(".tile .numbers")
    expect(tiles.nth(2)).to_have_text("8 running3 waiting")
    expect(tiles.nth(3)).to_have_text("2.3%")
    expect(tiles.nth(4)).to_have_text("p50 20 msp95 38 ms")
    expect(tiles.nth(5)).to_have_text("p50 10 msp95 23.5 ms")
    generated, prompt = (float(re.match(r"[\d.]+", text)[0]) for text in tiles.all_inner_texts()[:2])
    assert 250 < generated <= 500  # 1,000 tokens in two seconds and the time between the requests
    assert prompt == pytest.approx(generated / 5, rel=0.01)
    expect(page.locator(".tile .peak").first).to_contain_text("peak")


def test_a_hidden_tab_asks_nothing_and_goes_on_when_it_is_seen(open_page, server):
    page = open_page(clock=True)
    hide = "document.dispatchEvent(new Event('visibilitychange'))"
    page.evaluate(f"Object.defineProperty(document, 'hidden', {{value: true, configurable: true}}); {hide}")
    expect(page.locator("#state")).to_have_text("Paused")
    asked = len(server.requests)
    page.clock.fast_forward(20_000)
    assert len(server.requests) == asked
    page.evaluate(f"Object.defineProperty(document, 'hidden', {{value: false, configurable: true}}); {hide}")
    expect(page.locator("#state")).to_have_text("Running")


def test_an_answer_streams_with_its_times(open_page, server):
    server.pieces, server.first_s, server.gap_s = ("Joins", " path", " segments", "."), 0.1, 0.2
    page = open_page()
    ask(page)
    answer = page.locator(".answer")
    expect(answer.locator(".text")).to_have_text("Joins path", timeout=2000)
    assert answer.get_attribute("aria-busy") == "true"
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(answer.locator(".text")).to_have_text("Joins path segments.")
    times = answer.locator(".times").inner_text()
    assert 100 <= float(re.search(r"TTFT ([\d.]+) ms", times)[1]) < 400
    assert 3 < float(re.search(r"([\d.]+) tokens/s", times)[1]) <= 5.1
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
