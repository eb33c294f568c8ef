"""Sweeps of the embedded model: resumable, every point once, refused where something else was measured."""

import os
from dataclasses import replace

import pytest

import tests.engines  # noqa: F401 - sets the environment before vLLM is imported
from llmdrop_vllm import DropMask
from llmdrop_vllm.artifacts import Scores, hold, read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.errors import OutputError
from llmdrop_vllm.evaluation import masked_engines
from llmdrop_vllm.evaluation import sweep as sweep_module
from llmdrop_vllm.evaluation.engine import Engine, EngineSettings, running
from llmdrop_vllm.evaluation.evaluate import Measures, load_text
from llmdrop_vllm.evaluation.records import SpeedWorkload, Sweep, mask_id
from llmdrop_vllm.evaluation.series import make_series
from llmdrop_vllm.evaluation.sweep import SweepPlan, mask_title, measure_sweep

WORKLOAD = SpeedWorkload(requests=2, prompt_tokens=16, output_tokens=4)


@pytest.fixture(scope="module")
def plan():
    """Two series that share their first mask: four masks in all, with the full model."""
    checkpoint = Checkpoint.open(MODEL)
    unmeasured = Scores.unmeasured(checkpoint)
    series, masks = make_series(unmeasured, ["attention", "joint"], [1, 2])
    assert [len(each.masks) for each in series] == [2, 2]
    text, context = load_text(checkpoint, "held-out", context=32, windows=2)
    measures = Measures(text, context, divergence_tokens=32)
    settings = EngineSettings(dtype="float32", max_model_len=64)
    return SweepPlan(checkpoint, unmeasured, series, masks, measures, settings, WORKLOAD)


@pytest.fixture(scope="module")
def measured(plan, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep")
    return directory, measure_sweep(plan, directory)


def no_engine(monkeypatch):
    for module in (sweep_module, masked_engines):
        monkeypatch.setattr(module, "running", lambda *args, **kwargs: pytest.fail("an engine was started"))


def test_an_engine_for_each_mask_gives_what_one_for_all_gives(plan, measured, tmp_path, monkeypatch):
    started = []

    def counted(checkpoint, mask, settings, **more):
        started.append((mask.dropped, settings.switching))
        return running(checkpoint, mask, settings, **more)

    monkeypatch.setattr(masked_engines, "running", counted)
    monkeypatch.setattr(Engine, "can_switch", lambda self: False)  # as where the model is compiled
    found = measure_sweep(plan, tmp_path)
    full = DropMask(12).dropped
    assert started[:2] == [(full, True), (full, False)]
    assert [mask for mask, _ in started[2:]] == [full, *(mask.dropped for mask in plan.masks.values())]
    assert all(found.speedup(point) for point in found.points.values())
    for name, point in measured[1].points.items():
        expected = point.quality.perplexity.value
        assert found.points[name].quality.perplexity.value == pytest.approx(expected, rel=1e-5)


def test_every_mask_is_measured_once_and_the_full_model_too(plan, measured):
    directory, found = measured
    assert found.points.keys() == {"full", *plan.masks}
    assert read_record(Sweep, directory / "sweep.json") == found
    for point in found.points.values():
        assert found.speedup(point) > 0
        assert point.quality.perplexity.tokens == 2 * 31


def test_kv_share_and_parameters_are_those_of_the_mask(measured):
    _, found = measured
    one = next(point for point in found.points.values() if len(point.quality.mask.attention) == 1)
    assert one.kv_share == pytest.approx(11 / 12)
    config = Checkpoint.open(MODEL).config
    hidden, head = config["hidden_size"], config["head_dim"]
    attention = 2 * hidden * head * (config["num_attention_heads"] + config["num_key_value_heads"]) + hidden
    assert found.full.parameters - one.parameters == attention


def test_a_sweep_that_was_killed_goes_on_where_it_was(plan, measured, tmp_path, monkeypatch):
    measure, count = sweep_module._Keeper.measure, 0

    def killed_at_the_third(self, *args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        measure(self, *args)

    monkeypatch.setattr(sweep_module._Keeper, "measure", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        measure_sweep(replace(plan, workload=None), tmp_path)
    kept = read_record(Sweep, tmp_path / "sweep.json")
    assert len(kept.points) == 2
    monkeypatch.undo()
    found = measure_sweep(plan, tmp_path)
    assert all(found.speedup(point) for point in found.points.values())
    assert found.points.keys() == measured[1].points.keys()
    # What was there is as it was, with its speed, which was not asked for before.
    assert {name: found.points[name].quality for name in kept.points} == {n: p.quality for n, p in kept.points.items()}
    assert {point.speed for point in kept.points.values()} == {None}
    qualities = {name: point.quality.perplexity.value for name, point in found.points.items()}
    assert qualities == pytest.approx({name: p.quality.perplexity.value for name, p in measured[1].points.items()})


def test_a_finished_sweep_measures_nothing_again(plan, measured, monkeypatch):
    no_engine(monkeypatch)
    assert measure_sweep(plan, measured[0]) == measured[1]


def test_another_request_is_refused_by_what_differs(plan, measured):
    other = replace(plan, measures=replace(plan.measures, context=16))
    with pytest.raises(OutputError, match="context was 32 and is 16; choose another directory"):
        measure_sweep(other, measured[0])


def test_the_same_weights_under_a_mask_of_their_own_are_another_sweep(plan, measured):
    """Its points would be compared with a full model that is not theirs."""
    decoder = replace(plan.checkpoint.decoder, mask=DropMask(12, attention=(5,)))
    checkpoint = replace(plan.checkpoint, decoder=decoder)
    assert checkpoint.fingerprint == plan.checkpoint.fingerprint
    with pytest.raises(OutputError, match="begins with mask full, and the model has .*; choose another directory"):
        measure_sweep(replace(plan, checkpoint=checkpoint), measured[0])


def test_two_sweeps_do_not_share_a_directory(plan, tmp_path):
    lock = hold(tmp_path, "measuring into it")
    with pytest.raises(OutputError, match="in use"):
        measure_sweep(plan, tmp_path)
    os.close(lock)


def test_more_series_go_into_the_same_file(plan, measured, monkeypatch):
    no_engine(monkeypatch)
    fewer = replace(plan, series=plan.series[:1], masks={name: plan.masks[name] for name in plan.series[0].masks})
    assert [each.name for each in measure_sweep(fewer, measured[0]).series] == ["attention", "joint"]


def test_other_counts_of_a_series_leave_the_earlier_ones_in_its_curve(plan, measured, monkeypatch):
    no_engine(monkeypatch)
    last = tuple(each.model_copy(update={"counts": each.counts[1:], "masks": each.masks[1:]}) for each in plan.series)
    assert measure_sweep(replace(plan, series=last), measured[0]).series == plan.series


def test_titles_say_what_goes():
    assert mask_title(DropMask(4)) == "full model"
    assert mask_title(DropMask(4, (1, 2), (3,))) == "attention -2, MLP -1"
    assert mask_id(DropMask(4)) == "full"
