"""Contenders must agree, must fit into memory, and say why they are missing."""

import math
from pathlib import Path

import pytest

from benchmarks.contenders import OF_REAL_WEIGHTS, ContenderError, Settings, check_agreement, difference
from benchmarks.lineup import OVERHEAD_BYTES, Lineup, contenders
from benchmarks.shapes import find
from llmdrop_vllm import DropMask, InputError

ANSWER = {"prompt_logprobs": [-1.0, -2.0], "tokens": [5, 6, 7], "logprobs": [-0.5, -0.25, -0.125]}
SETTINGS = Settings("float32", "cpu", kv_bytes=1 << 20, max_step_tokens=2048, compiled=False)


def test_the_same_answer_agrees():
    assert check_agreement("ours", ANSWER, ANSWER, "float32") == 0


def test_another_function_is_refused():
    other = ANSWER | {"prompt_logprobs": [-1.0, -2.01]}
    with pytest.raises(ContenderError, match="ours computes another function .* by up to 0.01, .* Nothing was timed"):
        check_agreement("ours", ANSWER, other, "float32")


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ContenderError, match="up to nan"):
        check_agreement("ours", ANSWER, ANSWER | {"prompt_logprobs": [math.nan, -2.0]}, "float32")


def test_tokens_may_differ_where_they_tie_and_nothing_after_it_counts():
    tie = ANSWER | {"tokens": [5, 9, 1], "logprobs": [-0.5, -0.2500001, -9.0]}
    assert difference(ANSWER, tie)[0] == pytest.approx(1e-7, rel=0.1)
    worse = ANSWER | {"tokens": [5, 9, 7], "logprobs": [-0.5, -0.5, -0.125]}
    assert difference(ANSWER, worse)[0] == 0.25


class Answering:
    """A process that answers what it was made with."""

    def __init__(self, answer):
        self.answer = answer

    def ask(self, do, **arguments):
        assert do == "answer"
        return self.answer


def lineup():
    return Lineup(find("smoke"), SETTINGS, Path("unused"))


def line():
    shape = find("smoke")
    return contenders(shape, {"attention 2": shape.mask("attention", 2)})


def test_everyone_with_a_mask_is_held_to_the_first_answer_for_it():
    here, (full, ours, no_op, _) = lineup(), line()
    assert full.mask == DropMask(4)
    here.check(full, Answering(ANSWER))
    other = ANSWER | {"logprobs": [-3.0, -0.25, -0.125]}
    here.check(ours, Answering(other))
    with pytest.raises(ContenderError, match="vLLM no-op, attention 2 computes another function"):
        here.check(no_op, Answering(ANSWER))


def test_who_does_not_fit_beside_the_baseline_is_skipped_with_the_reason():
    here, everyone = lineup(), line()
    need = here.need_bytes(everyone[0])
    assert here.sittings(everyone, 10 * need) == [everyone]
    assert not here.skipped
    assert here.sittings(everyone, need + OVERHEAD_BYTES) == []
    assert here.skipped["llmdrop, attention 2"] == "needs 1.5 GiB beside the baseline, 1.5 are free"
    with pytest.raises(InputError, match="the baseline needs 1.5 GiB of memory, and 0.0 GiB are free"):
        here.sittings(everyone, 0)


def test_where_few_fit_the_baseline_sits_again_beside_each_of_them():
    here, everyone = lineup(), line()
    full, *others = everyone
    assert here.sittings(everyone, 2 * here.need_bytes(full)) == [[full, other] for other in others]


def test_real_weights_may_lead_twice_as_far_apart_and_random_ones_may_not():
    other = ANSWER | {"prompt_logprobs": [each - 0.15 for each in ANSWER["prompt_logprobs"]]}
    assert check_agreement("ours", ANSWER, other, "bfloat16", OF_REAL_WEIGHTS) == pytest.approx(0.15)
    with pytest.raises(ContenderError, match=r"0\.5 and 0\.05 are expected in bfloat16"):
        check_agreement("ours", ANSWER, other, "bfloat16")
