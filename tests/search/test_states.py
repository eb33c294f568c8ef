"""Attention that goes or sees a window, chosen together: the best of what was tried, and within the budget."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from llmdrop_vllm.artifacts import read_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.data.growing import read_grown
from llmdrop_vllm.evaluation.inspection import inspect_checkpoint
from llmdrop_vllm.mask_file import MaskFile
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.judge import Judge
from llmdrop_vllm.search.states import GONE, WINDOW, StateSpace
from llmdrop_vllm.search.trials import SearchHeader, Trial
from tests.tiny import TINY_LLAMA, write_checkpoint

DEPTH, SEEN = 4, 384
# A window of 64 holds 128 + 128 + 2,048 tokens of 8,192.
TINY = TINY_LLAMA | {"num_hidden_layers": DEPTH, "max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), TINY)


@pytest.fixture
def command(model, texts, tmp_path):
    out = str(tmp_path / "mask.json")
    return ["search", str(model), "--answers", str(texts), "--window", "64", "--dtype", "float32", "--out", out]


def share(model, mask):
    """Of the KV cache of a request, in blocks of 16 tokens while 2,048 of a prompt are computed."""
    layouts = [Checkpoint.open(model).under(each).layout for each in (mask, DropMask(DEPTH))]
    masked, whole = (each.request_blocks(8192, 16, 2048) * each.block_values for each in layouts)
    return masked / whole


def judged(tmp_path):
    """By what became of each attention, held-out KL."""
    _, trials = read_grown(tmp_path / "mask.trials.jsonl", SearchHeader, Trial, "llmdrop search")
    return {(frozenset(each.attention), each.windows): np.mean([*each.kl.values()]) for each in trials if each.held_out}


def test_the_best_of_all_that_meets_the_budget(model, command, tmp_path, capsys):
    assert main([*command, "--kv-budget", "60%"]) == 0
    file = read_record(MaskFile, tmp_path / "mask.json")
    printed, held_out = capsys.readouterr().out, judged(tmp_path)
    assert "of long texts" in printed
    names = {each.name for each in file.evidence.compared}
    assert {"cosine", "windows only", "drops only", "least lost alone", "least lost for a byte"} <= names
    assert file.evidence.held_out_tokens == 2 * (600 - SEEN - 1)

    meeting = set()
    for states in product(("", WINDOW, GONE), repeat=DEPTH):
        gone = tuple(layer for layer, state in enumerate(states) if state == GONE)
        windows = tuple((layer, 64) for layer, state in enumerate(states) if state == WINDOW)
        if len(gone) < DEPTH and share(model, DropMask(DEPTH, gone, windows=windows)) <= 0.6:
            meeting.add((frozenset(gone), windows))
    assert len(held_out) > 0
    assert held_out.keys() <= meeting
    best = min(held_out, key=held_out.__getitem__)
    assert (file.mask.dropped[0], file.mask.windows) == best
    by_name = {each.name: each for each in file.evidence.compared}
    assert not by_name["drops only"].windows
    assert not by_name["windows only"].attention
    assert main(["apply", str(model), str(tmp_path / "out"), "--mask", str(tmp_path / "mask.json")]) == 0
    assert (written := Checkpoint.open(tmp_path / "out")).mask == file.mask
    inspected = inspect_checkpoint(written, memory_bytes=2**30, context=8192)
    assert inspected.dropped.request_bytes / inspected.full.request_bytes == share(model, file.mask) <= 0.6


def test_an_interrupted_search_finds_the_same(command, tmp_path, monkeypatch):
    asked = [*command, "--kv-budget", "60%", "--masks", "40"]
    whole = [*asked]
    whole[whole.index("--out") + 1] = str(tmp_path / "whole.json")
    assert main(whole) == 0
    stock, calls = Judge.divergences, []

    def divergences(self, mask, chunks=None):
        calls.append(mask)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return stock(self, mask, chunks)

    monkeypatch.setattr(Judge, "divergences", divergences)
    assert main(asked) == 130
    assert main(asked) == 0
    found, expected = (read_record(MaskFile, tmp_path / f"{name}.json") for name in ("mask", "whole"))
    assert (found.mask, found.evidence) == (expected.mask, expected.evidence)
    lines = [len((tmp_path / f"{name}.trials.jsonl").read_text().splitlines()) for name in ("mask", "whole")]
    assert lines[0] == lines[1] == len(calls)  # a header for the one that was cut off


def test_windows_alone_meet_a_budget_of_a_request_too(model, texts, tmp_path):
    asked = ["--window", "64", "--data", str(texts), "--out", str(tmp_path / "mask.json")]
    assert main(["windows", str(model), *asked, "--kv-budget", "70%"]) == 0
    mask = read_record(MaskFile, tmp_path / "mask.json").mask
    assert share(model, mask) <= 0.7 < share(model, replace(mask, windows=mask.windows[1:]))


def test_what_was_looked_for_is_there_when_there_are_enough_masks(command, tmp_path):
    assert main([*command, "--kv-budget", "60%", "--masks", "3"]) == 0
    file = read_record(MaskFile, tmp_path / "mask.json")
    assert [each.name for each in file.evidence.compared] == ["cosine"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--kv-budget", "10%"), "at best the KV cache of a request of 8,192 tokens is 25% of the full one, with"),
        ((), "--window wants one of --kv-budget, --requests and --decode-speedup"),
        (
            ("--kv-budget", "60%", "--attention", "2", "--tokens", "9"),
            "--attention, --tokens and --window exclude each",
        ),
        (("--kv-budget", "60%", "--window", "500"), "texts of 600 tokens see everything under windows of 500"),
        (("--kv-budget", "60%", "--window", "8000"), "a window of 8000 tokens in layer 3 changes nothing"),
        (("--kv-budget", "60%", "--context", "9000"), "requests of 9000 tokens asked; expected 1 to 8192"),
    ],
)
def test_what_cannot_be_is_refused_at_once(asked, message, command, tmp_path, capsys):
    assert main([*command, *asked]) == 1
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def space(**changes):
    """Of bytes: 1 of a window, 3 of full attention."""

    def stored(mask):
        return 3 * len(mask.kept_attention) - 2 * len(mask.windows)

    asked = {"start": DropMask(6), "attention": 3, "meets": lambda mask: stored(mask) <= 9}
    return StateSpace(**asked | {"window": 9, "takers": frozenset(range(6)), "stored": stored} | changes)


def test_masks_by_what_is_lost_alone():
    lost = {(layer, WINDOW): layer for layer in range(6)} | {(layer, GONE): 9 - layer for layer in range(6)}
    found = [(mask.attention, dict(mask.windows).keys()) for mask in space().by_losses(lost)]
    assert found == [((), {0, 1, 2, 3, 4}), ((5,), {0, 1, 2}), ((5, 4), {0, 1}), ((5, 4, 3), set())]
    assert len([*space(takers=frozenset()).by_losses({key: loss for key, loss in lost.items() if key[1] == GONE})]) == 1


def test_bytes_are_bought_where_they_are_cheapest():
    """Layers 0 and 1 go for 1 a byte, after the window in 0 for 0.5; of the others only a window is cheap in 2."""
    lost = {(layer, state): 99.0 for layer in range(6) for state in (WINDOW, GONE)}
    lost |= {(0, WINDOW): 1.0, (0, GONE): 2.0, (1, GONE): 3.0, (2, WINDOW): 3.0}
    found = space(meets=lambda mask: space().stored(mask) <= 10).cheapest(lost)
    assert (set(found.attention), found.windows) == ({0, 1}, ((2, 9),))
    assert space(meets=lambda _: False).cheapest(lost) is None


def test_two_layers_change_what_became_of_them():
    within = space(
        start=DropMask(6, attention=(5,), windows=((4, 7),)), protect=frozenset({0}), takers=frozenset({1, 2})
    )
    mask = within.mask({1: WINDOW, 3: GONE})
    assert (mask.attention, mask.windows) == ((5, 3), ((1, 9), (4, 7)))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        mask = within.swapped(mask, rng)
        assert mask.attention[0] == 5
        assert 0 not in mask.attention
        assert set(dict(mask.windows)) <= {1, 2, 4}
        assert sorted(within.states(mask).values()) == [GONE, WINDOW]
        seen.add(mask.effect)
    assert len(seen) == 6  # a window in 1 or 2, and another of 1, 2, 3 and 4 without attention
    assert not within.can_swap(replace(within.start, windows=()))


def test_the_same_seed_changes_the_same():
    mask = space().mask({0: WINDOW, 1: GONE, 2: WINDOW})
    one, again, other = (space().swapped(mask, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one == again != other
