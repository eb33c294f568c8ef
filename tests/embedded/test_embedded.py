"""The embedded model: what is recorded of it is what vLLM measures, and dropping matters to it."""

import re
from pathlib import Path

import pytest

import tests.engines  # noqa: F401 - sets the environment before vLLM is imported
from benchmarks.paper_findings import curve
from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL, held_out
from llmdrop_vllm.embedded.corpus import documents
from llmdrop_vllm.evaluation.engine import EngineSettings, running
from llmdrop_vllm.evaluation.evaluate import load_text
from llmdrop_vllm.evaluation.records import Sweep

RECORDED = read_record(Sweep, Path(__file__).parents[2] / "benchmarks/results/embedded/sweep.json")
WINDOWS = 8


@pytest.mark.parametrize(("name", "number"), [("attention", 0), ("attention", 4), ("mlp", 2)])
def test_recorded_likelihoods_are_measured_again(name, number):
    quality = curve(RECORDED, name)[number].quality
    checkpoint, context = Checkpoint.open(MODEL), quality.perplexity.context
    text, _ = load_text(checkpoint, "held-out", context=context, windows=WINDOWS)
    settings = EngineSettings(dtype="float32", max_model_len=context + 1)
    with running(checkpoint, quality.mask, settings, harness=False) as engine:
        found = engine.negative_log_likelihoods(text.sequences)
    assert found == pytest.approx(quality.perplexity.window_nll[:WINDOWS], abs=1e-3)


def test_dropping_matters_and_mlps_matter_more():
    attention, mlp = (
        {n: p.quality.perplexity.value for n, p in curve(RECORDED, name).items()} for name in ("attention", "mlp")
    )
    assert attention[0] < 25
    for n in (1, 2, 3, 4):
        assert attention[0] < attention[n] < mlp[n]
    assert attention[1] < attention[2] < attention[4]


def test_the_results_page_says_what_was_measured():
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    for name in ("attention", "mlp"):
        points = curve(RECORDED, name).values()
        rows = {"perplexity": [point.quality.perplexity.value for point in points]}
        for place, task in enumerate(RECORDED.request.tasks):
            rows[f"{task}, %"] = [100 * point.quality.tasks[place].value for point in points]
        for what, values in rows.items():
            assert f"| {name}: {what} | {' | '.join(f'{value:.1f}' for value in values)} |" in page


def test_make_serve_drops_some_of_the_least_important():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    mask = set(map(int, re.search(r"EMBEDDED_MASK := ([\d,]+)\n", makefile)[1].split(",")))
    assert len(mask) == 4
    assert mask <= set(curve(RECORDED, "attention")[6].quality.mask.attention)


def test_committed_files_are_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 12e6


def test_held_out_subjects_are_not_trained_on():
    corpus = [*documents()]
    assert len({document.answer for document in corpus}) == len(corpus) > 5000
    trained = {document.text for document in corpus if not document.held_out}
    assert trained.isdisjoint(held_out().values())
    assert 0.02 < sum(document.held_out for document in corpus) / len(corpus) < 0.08
