import re

import pytest

from llmdrop_vllm.errors import DataError, InputError
from llmdrop_vllm.report.findings import Findings
from tests.report.sweeps import scores, sweep


def test_scores_of_another_model_are_refused_with_both_fingerprints():
    with pytest.raises(InputError, match="weights beef; the sweep is of /models/tiny-llama with the weights f00d"):
        Findings.of(sweep(), [scores(), scores("c4", fingerprint="beef")])


def test_scores_of_another_depth_are_refused():
    with pytest.raises(InputError, match="embedded are for 8 layers, the sweep for 12"):
        Findings.of(sweep(), [scores(depth=8)])


def test_a_sweep_without_a_point_is_refused():
    with pytest.raises(DataError, match="no point yet"):
        Findings.of(sweep().model_copy(update={"points": {}}), [])


def test_the_scores_that_the_sweep_followed_come_first_and_names_are_told_apart():
    other, same, followed = scores("c4", tilt=0.9), scores("c4", tilt=0.8), scores()
    assert [*Findings.of(sweep(), [other, same, followed]).calibrations] == ["embedded", "c4", "c4 (3)"]
    assert [*Findings.of(sweep(), [scores(None)]).calibrations] == ["calibration set 1"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/tiny-llama", "tiny-llama"),
        ("/hub/models--meta-llama--Llama-2-13b-hf/snapshots/5c31dfb671", "meta-llama/Llama-2-13b-hf"),
        ("/", "/"),
    ],
)
def test_the_model_is_called_what_people_call_it(path, name):
    assert Findings.of(sweep(path=path), []).model == name


def test_a_series_without_a_measured_point_is_no_curve():
    findings = Findings.of(sweep(names=["attention", "mlp"], keep=0.3), [])
    assert [(curve.series.name, len(curve.points)) for curve in findings.curves] == [("attention", 6)]


def test_curves_are_told_apart_by_what_and_order():
    findings = Findings.of(sweep(), [])
    assert [curve.series.name for curve in findings.by_importance] == ["attention", "mlp", "blocks", "joint"]
    assert [c.series.name for c in findings.curves if c.random] == ["random 0", "random 1", "random 2"]


def test_a_mask_is_called_after_the_first_series_that_reaches_it():
    findings = Findings.of(sweep(names=["attention", "joint"]), [])
    names = findings.names
    assert names["full"] == "full model"
    shared = {*findings.sweep.series[0].masks} & {*findings.sweep.series[1].masks}
    assert shared
    assert all(re.fullmatch(r"attention \d+", names[mask]) for mask in shared)
