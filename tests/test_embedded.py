"""The embedded model: what is recorded of it is what vLLM measures, and dropping matters to it."""

import json
from pathlib import Path

import pytest

from benchmarks.embedded_perplexity import perplexity
from llmdrop_vllm import DropMask
from llmdrop_vllm.embedded import MODEL, held_out
from llmdrop_vllm.embedded.corpus import documents

RECORDED = json.loads((Path(__file__).parents[1] / "benchmarks/results/embedded_perplexity.json").read_text())


@pytest.mark.parametrize("name", ["full", "attention 4", "MLP 2"])
def test_recorded_perplexity_is_measured_again(name):
    kind, _, count = name.partition(" ")
    ranking = RECORDED["ranking"]
    mask = DropMask(
        12,
        attention=tuple(ranking["attention"][: int(count)]) if kind == "attention" else (),
        mlp=tuple(ranking["mlp"][: int(count)]) if kind == "MLP" else (),
    )
    value, tokens = perplexity(mask, [*held_out().values()])
    assert tokens == RECORDED["tokens"]
    assert value == pytest.approx(RECORDED["perplexity"][name], rel=0.01)


def test_dropping_matters_and_mlps_matter_more():
    values = RECORDED["perplexity"]
    assert values["full"] < 25
    for n in (1, 2, 4):
        assert values["full"] < values[f"attention {n}"] < values[f"MLP {n}"]
    assert values["attention 1"] < values["attention 2"] < values["attention 4"]


def test_make_serve_drops_what_was_measured():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    mask = ",".join(map(str, RECORDED["ranking"]["attention"][:4]))
    assert f"EMBEDDED_MASK := {mask}\n" in makefile


def test_committed_files_are_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 12e6


def test_held_out_subjects_are_not_trained_on():
    corpus = [*documents()]
    assert len({document.answer for document in corpus}) == len(corpus) > 5000
    trained = {document.text for document in corpus if not document.held_out}
    assert trained.isdisjoint(held_out().values())
    assert 0.02 < sum(document.held_out for document in corpus) / len(corpus) < 0.08
