import json
import math

import pytest
from pydantic import ValidationError

from llmdrop_vllm import DropMask
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.evaluation.records import Estimate, Perplexity, SpeedWorkload, Sweep, mask_id
from tests.evaluation.sweeps import DEPTH, data, point, speed, sweep

ONE = DropMask(DEPTH, attention=(6,))


def test_an_estimate_has_the_standard_error_of_the_mean():
    found = Estimate.mean([1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5
    assert found.stderr == pytest.approx(math.sqrt(5 / 3) / 2)  # sample deviation over sqrt(4)
    assert Estimate.mean([3.0]).stderr is None


def test_perplexity_is_the_exponential_of_the_mean_with_its_error_carried_over():
    found = Perplexity.of([1.0, 2.0], 16, data())
    assert found.value == pytest.approx(math.exp(1.5))
    assert found.stderr == pytest.approx(math.exp(1.5) * 0.5)
    assert found.tokens == 30


def test_perplexities_are_compared_window_by_window():
    full, dropped = Perplexity.of([1.0, 3.0], 16, data()), Perplexity.of([1.1, 3.2], 16, data())
    found = dropped.relative_to(full)
    assert found.value == pytest.approx(math.exp(0.15))
    # The differences are 0.1 and 0.2, whatever the windows are worth by themselves.
    assert found.stderr == pytest.approx(math.exp(0.15) * 0.05)


def test_masks_that_drop_the_same_have_one_id_whatever_their_order():
    assert mask_id(DropMask(8, (3, 5), (1,))) == mask_id(DropMask(8, (5, 3), (1,)))
    assert mask_id(DropMask(8, (3, 5))) != mask_id(DropMask(8, (), (3, 5)))
    assert mask_id(DropMask(8, (3,))) != mask_id(DropMask(9, (3,)))
    assert mask_id(DropMask(8)) == "full"


def test_speedup_is_of_each_round_against_the_full_model_in_the_same_round():
    # The machine slows down by half between two rounds, and the point is twice as fast in both.
    drifting = point(ONE).model_copy(update={"speed": speed(2.0, 1.0, 3.0), "full_speed": speed(1.0, 0.5, 1.0)})
    found = sweep(drifting)
    assert found.speedup(drifting) == pytest.approx(2.0)
    assert found.speedup_spread(drifting) == pytest.approx((2.0, 3.0))


def test_one_output_token_is_the_prefills_and_decoding_takes_no_time():
    found = sweep(workload=SpeedWorkload(requests=2, prompt_tokens=100, output_tokens=1))
    own, full = (
        speed(factor).model_copy(update={"decode_tokens_per_s": (0.0,)})  # as it is measured: no tokens
        for factor in (2.0, 1.0)
    )
    assert found.speedup(found.full.model_copy(update={"speed": own, "full_speed": full})) == pytest.approx(2.0)


def test_without_speeds_there_is_no_speedup():
    found = sweep(point(ONE, faster=None), full=point(DropMask(DEPTH), faster=None), workload=None)
    assert found.speedup(found.points[mask_id(ONE)]) is None


def test_a_series_begins_with_the_full_model_and_leaves_out_what_is_not_measured():
    found = sweep(point(ONE))
    series = found.series[0].model_copy(update={"counts": (1, 2), "masks": (mask_id(ONE), "later")})
    assert [count for count, _ in found.of(series)] == [0, 1]


def test_a_sweep_without_the_full_model_says_so():
    with pytest.raises(DataError, match="no point yet"):
        _ = sweep().model_copy(update={"points": {}}).full


def test_a_point_under_another_masks_id_is_refused():
    record = json.loads(sweep(point(ONE)).model_dump_json())
    record["points"]["other"] = record["points"].pop(mask_id(ONE))
    with pytest.raises(ValidationError, match="another mask"):
        Sweep.model_validate_json(json.dumps(record))
