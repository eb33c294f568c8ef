"""Where answers part, and recordings that do not hold together."""

from pathlib import Path

import pytest

from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.data.comparison import Comparison, Said
from llmdrop_vllm.mask_file import MaskFile
from tests.data.comparisons import comparison, form

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Paris is large.", "Paris is large."),
        ("Paris is small.", "Paris is "),
        ("Parisians", ""),
        ("Paris", "Paris"),
        ("Paris is large. Very.", "Paris is large. "),
        ("Paris is large.\nVery.", "Paris is "),
        ("", ""),
    ],
)
def test_an_answer_is_cut_at_the_first_word_that_differs(text, same):
    said = Said.beside("Paris is large.", text, 4, "stop")
    assert (said.same, said.same + said.other) == (same, text)


def test_each_question_comes_with_the_answers_of_all():
    (_, first), (question, second) = comparison().exchanges()
    assert question == "Why is the sky blue?"
    assert [said.same + said.other for _, said in second] == [
        "Air scatters blue light more than red light.",
        "Blue, because it is blue.",
        "Air scatters blue light more than red light.",
    ]
    assert [each.name for each, _ in first] == ["full", "dropped", "healed"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"questions": ("one",)}, "full has 2 answers to 1 questions"),
        ({"forms": (form("dropped"), form("full"))}, "the full model and at least another"),
        ({"forms": (form("full"),)}, "the full model and at least another"),
        ({"forms": (form("full"), form("dropped", mask=DropMask(8)))}, "dropped has another number of layers"),
    ],
)
def test_what_does_not_hold_together_is_refused(changes, why):
    with pytest.raises(ValueError, match=why):
        comparison(**changes)


def test_the_recording_that_make_serve_shows_is_one():
    found = read_record(Comparison, RESULTS / "real/smollm2/comparison.json")
    searched = read_record(MaskFile, RESULTS / "real/smollm2/search/8.json")
    assert [form.mask.attention for form in found.forms] == [(), searched.attention, searched.attention]
    assert [form.kv_bytes_per_token for form in found.forms] == [23_040, 16_896, 16_896]
    assert not any(said.other for said in found.forms[0].answers)
