"""The page as text, and in a real browser."""

import re
from collections import Counter

import pytest

from llmdrop_vllm.report import write_report
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.page import inline, render
from llmdrop_vllm.report.pictures import Picture
from tests.data.comparisons import FULL, comparison, form
from tests.report.sweeps import FINGERPRINT, TASKS, scores, sweep

HOSTILE = '<img src=x onerror="window.pwned=1">'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole report whose names come from someone who wishes us ill."""
    tasks = [(f"{HOSTILE}{TASKS[0][0]}", *TASKS[0][1:]), *TASKS[1:]]
    records = sweep(path=f"/models/{HOSTILE}", tasks=tasks)
    renamed = tuple(
        each.model_copy(update={"name": f"{each.name}{HOSTILE * (each.name == 'last')}"}) for each in records.series
    )
    records = records.model_copy(update={"series": renamed})
    out = tmp_path_factory.mktemp("report")
    texts = (f"{FULL[0]} {HOSTILE}", "Air")
    full, _, healed = comparison().forms
    recorded = comparison(forms=(full, form("dropped", texts), healed), questions=(f"What is {HOSTILE}?", "Why?"))
    write_report(Findings(records, [scores(), scores(HOSTILE, tilt=0.8)], compared=recorded), out)
    return out / "report.html"


@pytest.fixture
def open_report(browser, report):
    """A function that opens the page; `complaints` are console errors, `urls` what it asked for."""
    contexts = []

    def open_one(width, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.complaints, page.urls = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.urls.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()


def test_it_refers_to_nothing_outside(report):
    text = report.read_text()
    assert "http" not in text
    assert "<script" not in text
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:href|src)="([^"]*)"', text))


def test_every_id_is_there_once_and_every_reference_leads_to_one(report):
    text = report.read_text()
    ids = Counter(re.findall(r'\bid="([^"]*)"', text))
    assert [name for name, count in ids.items() if count > 1] == []
    assert {*re.findall(r'href="#([^"]*)"', text), *re.findall(r"url\(#([^)]*)\)", text)} <= {*ids}


def test_what_is_missing_is_said():
    findings = Findings(sweep(names=["attention"], keep=0.6), [])
    text = render(findings, [Picture("speedup", "Quality against speedup.", "speed was <not> measured")])
    assert "4 of 10 points of the sweep are not measured yet" in text
    assert "Left out: Quality against speedup. (speed was &lt;not&gt; measured.)" in text


def test_a_measure_that_cannot_judge_names_no_number():
    findings = Findings(sweep(names=["attention"], tasks=[("x", "acc", "multiple choice", 0.25, 0.25)]), [])
    assert "cannot tell" in render(findings, [])


def test_names_from_files_are_text(report):
    assert HOSTILE not in report.read_text()


def test_an_inline_picture_takes_the_colours_of_the_page_and_says_what_it_shows():
    drawn = '<g id="a" style="fill: #1a1d1f"/><use xlink:href="#a"/>'
    svg = f'<?xml?>\n<svg xmlns="x" width="9pt" viewBox="0 0 1 1">{drawn}</svg>\n'
    assert inline(svg, "kv", 'a "b"') == (
        '<svg viewBox="0 0 1 1" style="max-width: 9pt" role="img" aria-label="a &quot;b&quot;">'
        '<g id="kv-a" style="fill: currentColor"/><use href="#kv-a"/></svg>'
    )


def test_the_provenance_says_what_it_takes_to_measure_again():
    records = sweep()
    text = render(Findings(records, [scores(), scores("c4", tilt=0.8)]), [])
    for expected in (
        records.provenance.model.path,
        FINGERPRINT,
        records.provenance.command,
        "torch 2.13.0",
        "wikitext: 64 sequences of up to 512, 32,768 tokens, seed 0, sha256 ab12",
        "arc_easy (by completion), boolq (by completion), gsm8k (by completion)",
        "4 requests at once, 256 prompt tokens and 128 output tokens each",
        "Scores: c4",
    ):
        assert expected in text
    assert text.count("<dd>yes</dd>") == 1


def test_what_was_not_asked_for_is_said():
    text = render(Findings(sweep(tasks=(), speed=False, divergence=False), [scores(None)]), [])
    assert text.count("not asked for") == 2
    assert "<dd>unknown</dd>" in text


@pytest.mark.parametrize("width", [375, 1280])
def test_it_opens_without_a_complaint_and_fits_the_screen(open_report, report, width):
    page = open_report(width)
    assert page.complaints == []
    assert page.urls == [report.as_uri()]
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.get_by_role("img").count() == 8


def test_in_the_dark_its_letters_and_those_of_the_pictures_are_light(open_report):
    page = open_report(1280, "dark")
    color = "(node) => getComputedStyle(node).color"
    assert page.eval_on_selector("figure svg", color) == page.eval_on_selector("h1", color) == "rgb(230, 233, 235)"


def test_the_same_question_is_answered_side_by_side_and_the_difference_is_marked(open_report):
    page = open_report(1280)
    columns = page.locator(".answers").first.locator("article")
    boxes = [columns.nth(place).bounding_box() for place in range(3)]
    assert boxes[0]["y"] == boxes[1]["y"] == boxes[2]["y"]
    assert columns.nth(2).locator("mark").inner_text() == "a city on the Seine."
    assert "KV per token 2,048 B -33.3%\nweights 9 MB -7.7%" in columns.nth(1).inner_text()
    assert "3 tokens, ends earlier, cut there" in page.locator(".answers").nth(1).inner_text()
    page = open_report(390)
    stacked = (
        page.locator(".answers").first.locator("article").evaluate_all("them => them.map((one) => one.offsetLeft)")
    )
    assert len({*stacked}) == 1


def test_without_recorded_answers_there_is_no_place_for_them():
    assert 'id="answers"' not in render(Findings(sweep(names=["attention"]), []), [])


def test_numbers_stand_at_the_right(open_report):
    align = "cells => [...new Set(cells.map(cell => getComputedStyle(cell).textAlign))]"
    assert open_report(1280).eval_on_selector_all(".points td", align) == ["right"]
