import math

import pytest

from llmdrop_vllm.artifacts import Similarities
from llmdrop_vllm.report.findings import Findings
from llmdrop_vllm.report.layers import importance, redundancy
from llmdrop_vllm.report.style import NothingToShow
from tests.report.sweeps import scores, sweep


def test_importance_is_one_minus_similarity_for_every_calibration_set():
    one, other = scores(), scores("c4", tilt=0.8)
    axes = importance(Findings.of(sweep(), [one, other]))[0].axes
    for each, kind in zip(axes, ("attention", "mlp", "block"), strict=True):
        for line, given in zip(each.get_lines(), (one, other), strict=True):
            assert [*line.get_ydata()] == [1 - value for value in getattr(given.similarity, kind)]


def test_a_sublayer_that_was_dropped_before_is_a_gap():
    whole = scores().similarity
    gone = Similarities(attention=(None, *whole.attention[1:]), mlp=(None,) * 12, block=whole.block)
    attention, mlp, _ = importance(Findings.of(sweep(), [scores().model_copy(update={"similarity": gone})]))[0].axes
    assert math.isnan(attention.get_lines()[0].get_ydata()[0])
    assert not any(map(math.isfinite, mlp.get_lines()[0].get_ydata()))


def test_the_diagnostics_are_the_records():
    given = scores()
    axes = redundancy(Findings.of(sweep(), [given]))[0].axes
    found = given.diagnostics.attention
    expected = [found.magnitude_ratio, found.token_cosine_before, found.concentration, found.first_token]
    assert [tuple(each.get_lines()[0].get_ydata()) for each in axes] == expected


def test_diagnostics_that_were_not_measured_leave_the_picture_out():
    with pytest.raises(NothingToShow, match="no diagnostics"):
        redundancy(Findings.of(sweep(), [scores(diagnostics=False)]))


@pytest.mark.parametrize("paint", [importance, redundancy])
def test_without_scores_there_is_nothing_per_layer(paint):
    with pytest.raises(NothingToShow, match="no scores"):
        paint(Findings.of(sweep(), []))
