"""What the page shows of the model and its engine, in a real browser against a stand-in for the server."""

import json
import re

import pytest
from playwright.sync_api import expect

from llmdrop_server.schemas import KV, Drop
from tests.server import page_stub
from tests.server.page_stub import DROP
from tests.server.page_use import deep_model


def test_the_stand_in_answers_as_the_server_does():
    from llmdrop_server import routes

    Drop.model_validate_json(json.dumps(page_stub.DROP))
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


def test_how_the_model_was_healed_is_said_if_it_was(open_page, server):
    facts = open_page().locator("#facts")
    expect(facts).to_have_text("LlamaForCausalLM · bfloat16 KV cache · 4 layers healed on 60,000 tokens of answers")
    expect(facts).to_have_attribute("title", DROP["healing"])
    server.drop |= {"healing": None}
    expect(open_page().locator("#facts")).to_have_text("LlamaForCausalLM · bfloat16 KV cache")


def test_without_scores_or_parameters_the_rest_is_shown(open_page, server):
    unknown = {"parameters": None, "kv_bytes_per_token": None}
    server.drop |= {"scores": None, "full": {**DROP["full"], **unknown}}
    page = open_page()
    expect(page.locator("#layers .cell")).to_have_count(24)
    expect(page.locator("#legend")).to_contain_text("without importance scores")
    expect(page.locator("#capacity")).to_contain_text("not known for this architecture")
    assert not page.complaints


def test_without_a_kv_cache_no_gain_is_claimed(open_page, server):
    for form in ("full", "served"):
        server.drop[form] |= {"kv_tokens": 0, "sequences": 0.0}
    page = open_page()
    expect(page.locator(".headline")).to_have_text("The KV cache is that of the full model.")


def test_a_sublayer_that_was_gone_when_scored_says_so(open_page, server):
    server.drop["scores"]["importance"]["attention"][11] = None
    page = open_page()
    page.hover("[data-layer='11'][data-sublayer=attention]")
    expect(page.locator("#readout")).to_contain_text("Already gone when the model was scored")


def test_layers_that_see_a_window_say_so(open_page, server):
    server.drop = {**DROP, "mask": {"num_hidden_layers": 12, "attention": [], "mlp": [], "windows": [[3, 64]]}}
    page = open_page()
    expect(page.locator("#readout")).to_have_text(
        "Dropped: 0 of 12 attention, 0 of 12 MLP sublayers. 1 attention sublayers see a window only. "
        "Point at a cell for its numbers."
    )
    cell = page.locator("[data-layer='3'][data-sublayer=attention]")
    expect(cell).to_have_attribute("aria-label", re.compile("Layer 3, attention: kept, sees the last 64 tokens"))


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


def test_an_engine_without_statistics_runs_all_the_same(open_page, server):
    server.kv = None
    page = open_page()
    expect(page.locator("#state")).to_have_text("Running")
    expect(page.locator("#kv-use")).to_be_empty()
    expect(page.locator("#alert")).to_be_hidden()


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
