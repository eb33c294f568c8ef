"""Full against dropped against healed on the page, in a real browser against a stand-in for the server."""

import pytest
from playwright.sync_api import expect

from tests.data.comparisons import DROPPED, FULL, HEALED, HEALING, QUESTIONS, comparison, form
from tests.server.page_stub import DROP
from tests.server.test_page_access import CONTRASTS, HOSTILE

FIRST_PAINT_MS = 1000


@pytest.fixture
def recorded(server):
    """A function that has the server tell of a recording."""

    def tell(**changes):
        server.drop |= {"comparison": comparison(**changes).model_dump(mode="json"), "healing": HEALING}

    tell()
    return tell


def columns(page):
    return page.locator("#recorded .answer")


@pytest.mark.usefixtures("recorded")
def test_the_three_answer_the_same_question_beside_what_each_takes(open_page):
    page = open_page()
    expect(page.locator("#recorded .question")).to_have_text(QUESTIONS[0])
    assert columns(page).locator("h4").all_inner_texts() == ["full", "dropped", "healed, as served here"]
    assert columns(page).locator(".text").all_inner_texts() == [FULL[0], DROPPED[0], HEALED[0]]
    assert page.locator("#recorded mark").all_inner_texts() == ["Paris, Paris,", "a city on the Seine."]
    assert columns(page).nth(0).locator(".row").all_inner_texts() == [
        "Dropped\nnothing",
        "KV per token\n3,072 B",
        "Weights\n10 MB",
    ]
    assert columns(page).nth(2).locator(".row").all_inner_texts() == [
        "Dropped\n4 of 12 attention",
        "KV per token\n2,048 B −33.3%",
        "Weights\n9 MB −7.7%",
    ]
    page.get_by_role("radio", name=QUESTIONS[1]).check()
    assert columns(page).locator(".text").all_inner_texts() == [FULL[1], DROPPED[1], HEALED[1]]
    expect(columns(page).nth(2).locator(".times")).to_contain_text("word for word the same")
    expect(columns(page).nth(1).locator(".times")).to_contain_text("cut at max tokens")
    page.click("#recorded summary")
    for said in ("Recorded on 2026-11-27", "48 at most, computed in float32", HEALING, "llmdrop compare healed"):
        expect(page.locator("#recorded details")).to_contain_text(said)
    assert not page.complaints


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("width", "beside"), [(1440, 3), (800, 3), (390, 1)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen_in_both_modes_and_is_there_at_once(open_page, width, beside, scheme):
    page = open_page(width=width, color_scheme=scheme)
    expect(columns(page)).to_have_count(3)
    assert len({round(box["x"]) for box in (columns(page).nth(place).bounding_box() for place in range(3))}) == beside
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(CONTRASTS)[0][0] >= 4.5, page.evaluate(CONTRASTS)[:5]
    if width < 1080:  # above how it is done
        assert page.locator("#recorded").bounding_box()["y"] < page.locator("#layers").bounding_box()["y"]
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") < FIRST_PAINT_MS


def test_without_a_recording_nothing_is_shown_of_it(open_page):
    page = open_page()
    expect(page.locator("#recorded")).to_be_hidden()
    expect(page.locator("#recorded")).to_be_empty()
    expect(page.locator("#log")).to_contain_text("Answers appear here")


@pytest.mark.usefixtures("recorded")
def test_this_server_is_asked_as_the_others_were(open_page, server):
    page = open_page()
    page.fill("#temperature", "0.7")
    page.click("#recorded button")
    expect(columns(page).nth(3).locator(".text")).to_have_text("A short answer.")
    expect(columns(page).nth(3).locator("h4")).to_have_text("this server, now")
    expect(page.locator("#recorded button")).to_be_hidden()
    ((_, body),) = server.asked("/v1/chat/completions")
    assert body["messages"] == [{"role": "user", "content": QUESTIONS[0]}]
    assert (body["temperature"], body["max_tokens"]) == (0, 48)
    page.get_by_role("radio", name=QUESTIONS[1]).check()
    expect(columns(page)).to_have_count(3)
    page.fill("#prompt", "And now?")
    page.press("#prompt", "Enter")
    expect(page.locator("#log > .exchange .text")).to_have_text("A short answer.")
    page.click("#clear")
    expect(page.locator("#log > .exchange")).to_have_count(0)
    expect(columns(page)).to_have_count(3)


@pytest.mark.usefixtures("recorded")
def test_a_server_that_cannot_answer_now_can_be_asked_again(open_page, server):
    server.full = True
    page = open_page()
    page.click("#recorded button")
    expect(columns(page).nth(3)).to_contain_text("The server is full")
    expect(page.locator("#recorded button")).to_be_enabled()


def test_it_says_when_none_of_them_is_what_runs_here(open_page, server, recorded):
    server.drop |= {"healing": None, "summary": "attention dropped in 3 of 12 layers [1-3], MLP in 0"}
    page = open_page()
    expect(page.locator("#recorded summary")).to_contain_text(
        "None of these is what this server runs (attention dropped in 3 of 12 layers [1-3], MLP in 0)."
    )
    expect(page.locator("#recorded .own")).to_have_count(0)
    recorded(forms=(*comparison().forms[:2],))
    server.drop |= {"summary": DROP["summary"], "healing": None}
    page.reload()
    expect(page.locator("#recorded .own h4")).to_have_text("dropped, as served here")


def test_what_models_said_is_text(open_page, recorded):
    forms = (form("full"), form("dropped", ("The", HOSTILE)))
    recorded(forms=forms, questions=(HOSTILE, "Why?"))
    page = open_page()
    expect(page.locator("#recorded .question")).to_have_text(HOSTILE)
    expect(columns(page).nth(1).locator(".times")).to_contain_text("ends earlier")
    page.get_by_role("radio", name="Why?").check()
    expect(page.locator("#recorded mark")).to_have_text(HOSTILE)
    assert page.evaluate("window.pwned") is None
    assert not page.complaints
