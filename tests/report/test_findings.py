import re
from dataclasses import replace

import pytest

from llmdrop_vllm.errors import DataError, InputError
from llmdrop_vllm.report.findings import Findings
from tests.data.comparisons import comparison, form
from tests.report.sweeps import healed, scores, sweep


def test_scores_of_another_model_are_refused_with_both_fingerprints():
    with pytest.raises(InputError, match="weights beef; the sweep is of /models/tiny-llama with the weights f00d"):
        Findings(sweep(), [scores(), scores("c4", fingerprint="beef")])


def test_scores_of_another_depth_are_refused():
    with pytest.raises(InputError, match="embedded are for 8 layers, the sweep for 12"):
        Findings(sweep(), [scores(depth=8)])


def test_a_sweep_without_a_point_is_refused():
    with pytest.raises(DataError, match="no point yet"):
        Findings(sweep().model_copy(update={"points": {}}), [])


def test_the_scores_that_the_sweep_followed_come_first_and_names_are_told_apart():
    other, same, followed = scores("c4", tilt=0.9), scores("c4", tilt=0.8), scores()
    assert [*Findings(sweep(), [other, same, followed]).calibrations] == ["embedded", "c4", "c4 (3)"]
    assert [*Findings(sweep(), [scores(None)]).calibrations] == ["calibration set 1"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/tiny-llama", "tiny-llama"),
        ("/hub/models--meta-llama--Llama-2-13b-hf/snapshots/5c31dfb671", "meta-llama/Llama-2-13b-hf"),
        ("/", "/"),
    ],
)
def test_the_model_is_called_what_people_call_it(path, name):
    assert Findings(sweep(path=path), []).model == name


def test_a_series_without_a_measured_point_is_no_curve():
    findings = Findings(sweep(names=["attention", "mlp"], keep=0.3), [])
    assert [(curve.series.name, len(curve.points)) for curve in findings.curves] == [("attention", 6)]


def test_curves_are_told_apart_by_what_and_order():
    findings = Findings(sweep(), [])
    assert [curve.series.name for curve in findings.by_importance] == ["attention", "mlp", "blocks", "joint"]
    assert [c.series.name for c in findings.curves if c.random] == ["random 0", "random 1", "random 2"]


def test_a_mask_is_called_after_the_first_series_that_reaches_it():
    findings = Findings(sweep(names=["attention", "joint"]), [])
    names = findings.names
    assert names["full"] == "full model"
    shared = {*findings.sweep.series[0].masks} & {*findings.sweep.series[1].masks}
    assert shared
    assert all(re.fullmatch(r"attention \d+", names[mask]) for mask in shared)


def test_healed_points_are_curves_of_their_own_with_the_speed_and_size_of_their_masks():
    found = sweep(names=["attention"])
    findings = Findings(found, [], [healed(found, 8), healed(found, 4), healed(found, 8, "trained")])
    assert [(each.series.name, [n for n, _ in each.points]) for each in findings.mended] == [
        ("attention, healed", [0, 4, 8]),
        ("attention, trained", [0, 8]),
    ]
    dropped, mended = dict(findings.curves[0].points)[8], dict(findings.mended[0].points)[8]
    assert (mended.speed, mended.kv_share, mended.parameters) == (dropped.speed, dropped.kv_share, dropped.parameters)
    assert mended.quality.perplexity.value < dropped.quality.perplexity.value


def test_an_evaluation_that_is_no_healed_point_of_the_sweep_is_refused():
    found, larger = sweep(names=["attention"], counts=(2, 4)), sweep(names=["attention"])
    with pytest.raises(InputError, match="/models/healed-8 drops other numbers of sublayers"):
        Findings(found, [], [healed(larger, 8)])
    with pytest.raises(InputError, match="is not of a healed model"):
        Findings(found, [], [healed(found, 4, None)])


def test_another_mask_of_as_many_sublayers_is_a_curve_of_its_own():
    found = sweep(names=["attention"])
    before = healed(found, 4, None)
    mask = replace(before.quality.mask, attention=(0, 1, 2, 3))
    assert mask.dropped != before.quality.mask.dropped
    searched = [
        each.model_copy(update={"quality": each.quality.model_copy(update={"mask": mask})})
        for each in (before, healed(found, 4))
    ]
    findings = Findings(found, [scores()], searched)
    assert [each.series.name for each in findings.mended] == ["attention, searched", "attention, searched, healed"]
    ((_, point),) = findings.mended[0].points[1:]
    assert point.speed == dict(findings.curves[0].points)[4].speed
    assert point.quality.mask == mask


def test_answers_of_another_full_model_are_refused():
    found = sweep(names=["attention"])
    assert Findings(found, [], compared=comparison()).compared == comparison()
    other = comparison(forms=(form("full", fingerprint="beef"), form("dropped")))
    with pytest.raises(InputError, match="the answers are of a full model with the weights beef; the sweep is of"):
        Findings(found, [], compared=other)


def test_two_evaluations_of_one_point_are_refused():
    found = sweep(names=["attention"])
    with pytest.raises(InputError, match="two evaluations are of attention 4, healed"):
        Findings(found, [], [healed(found, 4), healed(found, 4)])


def test_where_layers_differ_another_mask_says_nothing_of_its_cache():
    found, both = sweep(names=["attention"]), scores()
    evaluation = healed(found, 4, None)
    mask = replace(evaluation.quality.mask, attention=(0, 1, 2, 3))
    searched = evaluation.model_copy(update={"quality": evaluation.quality.model_copy(update={"mask": mask})})
    groups = ("sliding 128", *both.kv_groups[1:])
    with pytest.raises(InputError, match="differ in KV cache where layers do"):
        Findings(found, [both.model_copy(update={"kv_groups": groups})], [searched])


@pytest.mark.parametrize(("other", "what"), [({"divergence": False}, "divergence"), ({"tasks": ()}, "tasks")])
def test_an_evaluation_that_was_measured_otherwise_is_refused(other, what):
    found = sweep(names=["attention"])
    evaluation = healed(sweep(names=["attention"], **other), 4)
    with pytest.raises(InputError, match=rf"measured otherwise than the sweep \({what}\)"):
        Findings(found, [], [evaluation])
