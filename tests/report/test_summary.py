import pytest

from llmdrop_vllm.evaluation.records import Estimate, Perplexity
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.measures import GENERATION, MULTIPLE_CHOICE, PERPLEXITY
from llmdrop_vllm.report.summary import (
    agreed,
    blind,
    change_of_perplexity,
    change_of_score,
    largest_within,
    main_curve,
    same_within_errors,
    sentences,
    verdicts,
)
from tests.evaluation.sweeps import data
from tests.report.sweeps import TASKS, healed, sweep


def estimate(value, stderr=None):
    return Estimate(value=value, stderr=stderr)


def found_of(**changes):
    return Findings(sweep(**changes), [])


@pytest.mark.parametrize(
    ("losses", "largest"),
    [
        ([(1, 0.5), (2, 1.0), (3, 1.1)], 2),
        ([(1, 2.0)], 0),
        ([], 0),
        ([(3, 0.1), (1, 0.1)], 3),
        ([(1, 0.1), (2, 9.0), (3, 0.1)], 1),
    ],
)
def test_a_number_counts_only_while_every_smaller_one_is_within_the_limit(losses, largest):
    assert largest_within(losses, 1.0) == largest


def test_values_are_the_same_within_the_standard_error_of_their_difference():
    assert same_within_errors(estimate(50, 3), estimate(45, 4))
    assert not same_within_errors(estimate(50, 3), estimate(44.9, 4))
    assert not same_within_errors(estimate(50), estimate(50, 4))


def test_a_change_is_said_in_the_units_of_its_measure():
    assert change_of_score(estimate(30, 1), estimate(25, 1)) == "-5.0 points"
    assert change_of_score(estimate(30, 1), estimate(31, 1)) == "within the standard error"


def test_perplexity_changes_by_more_than_the_error_of_the_difference_or_not_at_all():
    full, more, hardly = (Perplexity.of(nll, 512, data()) for nll in ([1.0, 3.0], [1.1, 3.2], [1.01, 2.99]))
    assert change_of_perplexity(full, more) == "+16.2 ± 5.8%"
    assert change_of_perplexity(full, hardly) == "within the standard error"


def test_each_measure_is_judged_by_its_own_limit():
    findings = found_of(names=["attention"])
    by = {each.measure: each for each in verdicts(findings.sweep, main_curve(findings))}
    full, points = findings.sweep.full, dict(main_curve(findings).points)
    for measure in (MULTIPLE_CHOICE, GENERATION):
        n = by[measure].n
        assert measure.of(full).value - measure.of(points[n]).value <= 1
        assert measure.of(full).value - measure.of(points[n + 1]).value > 1
    n = by[PERPLEXITY].n
    assert PERPLEXITY.of(points[n]).value / PERPLEXITY.of(full).value <= 1.05
    assert PERPLEXITY.of(points[n + 1]).value / PERPLEXITY.of(full).value > 1.05
    assert agreed(by.values()) == min(each.n for each in by.values())


def test_generation_that_suffers_first_is_said():
    said = " ".join(sentences(found_of()))
    assert "generation suffers first" in said


def test_a_task_at_chance_level_does_not_judge():
    guessing = [("arc_easy", "acc", "multiple choice", 0.251, 0.25)]
    findings = found_of(tasks=guessing)
    assert "not clearly above guessing (25.0)" in blind(MULTIPLE_CHOICE, findings.sweep.full)
    found = verdicts(findings.sweep, main_curve(findings))
    assert agreed(found) == found[0].n


def test_a_generation_score_of_zero_does_not_judge():
    findings = found_of(tasks=[("gsm8k", "exact_match", "generation", 0.0, None)])
    assert "no loss can show" in blind(GENERATION, findings.sweep.full)


def test_without_generation_a_reader_is_warned():
    said = " ".join(sentences(found_of(tasks=TASKS[:2])))
    assert "No generation task was measured" in said


def test_attention_is_what_is_judged_wherever_it_stands():
    assert main_curve(found_of(names=["mlp", "attention", "last"])).series.name == "attention"
    assert main_curve(found_of(names=["mlp"])).series.name == "mlp"


def test_a_sweep_of_the_full_model_alone_says_so():
    assert "Only the full model is measured" in sentences(found_of(keep=0))[0]


def test_attention_and_mlp_in_one_list_are_twice_as_many_as_layers():
    assert " of 24 sublayers " in sentences(found_of(names=["joint"]))[0]


def test_a_model_that_can_lose_nothing_is_said_to():
    findings = found_of(names=["reverse"])
    assert sentences(findings)[0].startswith("Not even 1 of 12 attention sublayers")


def test_what_may_go_once_the_rest_is_healed_is_said_beside_what_may_go_before():
    records = sweep(names=["attention"])
    before, after = (sentences(Findings(records, [], found)) for found in ([], [healed(records, 2)]))
    assert [each for each in after if each not in before] == [
        "attention, healed: 0 can go within the limits; measured up to 2."
    ]
