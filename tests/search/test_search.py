"""Spaces, ways and the whole search, on losses that are known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from llmdrop_vllm.artifacts import DataIdentity, ModelIdentity, Provenance
from llmdrop_vllm.data.growing import appended
from llmdrop_vllm.errors import MaskError, OutputError
from llmdrop_vllm.kv_cache.layout import kv_layout
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.methods import OFFSPRING, backward, evolve, forward, ranked_alone
from llmdrop_vllm.search.search import with_cosine
from llmdrop_vllm.search.space import Space
from llmdrop_vllm.search.trials import EnoughError, Loss, SearchHeader, Trial, Trials
from llmdrop_vllm.selection.candidates import Candidates
from tests.selection.test_selection_kv import hybrid_scores

DEPTH = 6
DATA = DataIdentity(source="a", sequences=4, tokens=40, seq_len=None, seed=0, sha256="")


class FakeJudge:
    """The loss of a mask is a function of it, the same for four sequences in four chunks but for their noise."""

    def __init__(self, loss):
        self.loss, self.base, self.asked = loss, DropMask(DEPTH), []
        self.tokens = np.array([10, 10, 10, 10])
        self.batches = type(
            "Batches", (), {"chunks": [type("C", (), {"first_sequence": n, "batch": 1}) for n in range(4)]}
        )

    def rebase(self, mask):
        self.base = mask

    def divergences(self, mask, chunks):
        self.asked.append((mask.dropped, tuple(chunks)))
        return {number: self.loss(mask) * (1 + 0.1 * number) for number in chunks}


def header(**changes):
    model = ModelIdentity(path="m", architecture="A", fingerprint="f")
    kept = {"answers": DATA, "held_out": DATA, "tokens": (10,) * 4, "to_heal": None, "start": DropMask(DEPTH)}
    return SearchHeader(provenance=Provenance(model=model), **kept | changes)


@pytest.fixture
def trials(tmp_path):
    """Of a loss: layers cost their number, but 0 and 5 together cost nothing."""
    with appended(tmp_path / "trials.jsonl", header(), Trial) as file:
        yield Trials(FakeJudge(pairs), FakeJudge(pairs), file, 1000)


def pairs(mask):
    gone = {*mask.attention}
    free = {0, 5} if {0, 5} <= gone else set()
    return 0.1 + sum(1 + layer for layer in gone - free) + 0.5 * sum(1 + layer for layer in mask.mlp)


def test_a_mask_grows_by_what_is_still_asked_for():
    space = Space(DropMask(DEPTH, attention=(2,)), attention=1, mlp=1, protect=frozenset({0}))
    masks = list(space.extended(space.start))
    assert [mask.attention for mask in masks[:4]] == [(2, 1), (2, 3), (2, 4), (2, 5)]
    assert [mask.mlp for mask in masks[4:]] == [(1,), (2,), (3,), (4,), (5,)]
    assert all(not mask.mlp for mask in masks[:4])
    assert [mask.mlp for mask in space.extended(masks[0])] == [(1,), (2,), (3,), (4,), (5,)]


def test_what_the_start_has_never_comes_back():
    space = Space(DropMask(DEPTH, attention=(2,)), attention=1)
    more = space.more([("attention", 4), ("mlp", 1), ("attention", 3), ("attention", 4)], 1)
    assert more.attention == (2, 4, 3)
    assert [mask.attention for mask in space.reduced(more)] == [(2, 3), (2, 4)]
    rng = np.random.default_rng(0)
    for _ in range(50):
        swapped = space.swapped(DropMask(DEPTH, attention=(2, 4)), rng)
        assert swapped.attention[0] == 2
        assert len(set(swapped.attention)) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attention": 6}, "6 attention sublayers asked; 5 can go"),
        (
            {"attention": 5, "protect": frozenset({0, 1})},
            r"5 attention sublayers asked; 4 can go \(6 layers; protected",
        ),
        ({"mlp": -1}, "-1 mlp sublayers asked; 6 can go"),
        ({}, "nothing is left to search"),
        ({"attention": 1, "protect": frozenset({6})}, "protect"),
    ],
)
def test_what_cannot_be_is_refused(asked, message):
    with pytest.raises(MaskError, match=message):
        Space(DropMask(DEPTH), **asked)


def test_the_greedy_way_takes_the_least_loss_at_each_step(trials):
    found = list(forward(Space(DropMask(DEPTH), attention=3), trials))
    assert [each.mask.attention for each in found] == [(0,), (0, 5), (0, 5, 1)]  # 0 and 5 together are free
    assert len(trials.asked) == 6 + 5 + 4


def test_sublayers_are_ranked_by_what_is_lost_without_each_alone(trials):
    space = Space(DropMask(DEPTH, attention=(2,)), attention=2, mlp=1)
    ranking = ranked_alone(space, trials)
    assert [layer for kind, layer in ranking if kind == "attention"] == [0, 1, 3, 4, 5]
    assert [layer for kind, layer in ranking if kind == "mlp"] == [0, 1, 2, 3, 4, 5]
    mask = space.more(ranking, 0)
    assert (mask.attention, mask.mlp) == ((2, 0, 1), (0,))


def test_a_beam_finds_what_one_mask_alone_would_miss(trials):
    """The best first step, layer 4, is not of the free pair."""
    trials.judge.loss = lambda mask: (
        pairs(replace(mask, attention=tuple(5 - layer for layer in mask.attention)))
        - (1.05 if mask.dropped[0] == {4} else 0)
    )
    space = Space(DropMask(DEPTH), attention=2)
    narrow, wide = ([each.mask.dropped[0] for each in forward(space, trials, beam=beam)] for beam in (1, 3))
    assert narrow == [{4}, {4, 5}]
    assert wide == [{4}, {0, 5}]


def test_the_way_back_gives_up_what_costs_most(trials):
    space = Space(DropMask(DEPTH), attention=2)
    found = list(backward(space, trials, DropMask(DEPTH, attention=(1, 4, 0, 5))))
    assert [set(each.mask.attention) for each in found] == [{0, 1, 5}, {0, 5}]


def test_an_evolution_comes_to_the_best_mask_and_keeps_the_numbers(trials):
    space = Space(DropMask(DEPTH), attention=2, mlp=1)
    best = list(itertools.islice(evolve(space, trials, DropMask(DEPTH, attention=(1, 2), mlp=(5,))), 12))[-1]
    assert best.mask.dropped == ({0, 5}, {0})
    masks = [(len(attention), len(mlp)) for _, _, attention, mlp, _ in trials.asked]
    assert set(masks) == {(2, 1)}
    few = [chunks for _, chunks in trials.judge.asked if len(chunks) < 4]
    assert len(few) > OFFSPRING / 2  # most are judged on a part of the answers


def test_where_nothing_can_be_swapped_an_evolution_ends(trials):
    space = Space(DropMask(DEPTH), attention=2, protect=frozenset({0, 1, 2, 3}))
    assert list(evolve(space, trials, DropMask(DEPTH, attention=(4, 5)))) == []


def test_a_line_that_is_none_of_ours_is_left_alone(trials, tmp_path):
    trials.on_answers(DropMask(DEPTH, attention=(1,)))
    trials.file.file.close()
    path = tmp_path / "trials.jsonl"
    for line in (b'{"text": "hello"}\n', b'{"attention": "all"}\n'):
        before = path.read_bytes() + line + path.read_bytes().splitlines(keepends=True)[1]
        other = tmp_path / "other.jsonl"
        other.write_bytes(before)
        with pytest.raises(OutputError, match="line 3, is not of"), appended(other, header(), Trial):
            pytest.fail("gone on with")
        assert other.read_bytes() == before


def test_the_same_seed_goes_the_same_way(trials, tmp_path):
    space, parent = Space(DropMask(DEPTH), attention=2), DropMask(DEPTH, attention=(1, 2))
    first = [each.mask for each in itertools.islice(evolve(space, trials, parent, seed=3), 4)]
    with appended(tmp_path / "other.jsonl", header(), Trial) as file:
        again = Trials(FakeJudge(pairs), FakeJudge(pairs), file, 1000)
        assert [each.mask for each in itertools.islice(evolve(space, again, parent, seed=3), 4)] == first


def test_a_search_that_is_asked_again_judges_nothing_twice(trials, tmp_path):
    space = Space(DropMask(DEPTH), attention=2)
    found = list(forward(space, trials))
    trials.on_held_out(found[-1].mask)
    with pytest.raises(OutputError, match="in use"), appended(tmp_path / "trials.jsonl", header(), Trial):
        pytest.fail("written twice")
    trials.file.file.close()
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(b'{"attention": [0')  # killed while it wrote
    with appended(tmp_path / "trials.jsonl", header(), Trial) as file:
        again = Trials(FakeJudge(pairs), FakeJudge(pairs), file, 1000)
        assert [each.mask for each in forward(space, again)] == [each.mask for each in found]
        again.on_held_out(found[-1].mask)
        assert (again.judge.asked, again.held_out.asked) == ([], [])
        assert len(again.asked) == len(trials.asked)


def test_trials_of_another_search_are_left_alone(trials, tmp_path):
    trials.on_answers(DropMask(DEPTH, attention=(1,)))
    trials.file.file.close()
    path = tmp_path / "trials.jsonl"
    before = path.read_bytes()
    with (
        pytest.raises(OutputError, match="was written with another start"),
        appended(path, header(start=DropMask(DEPTH, attention=(3,))), Trial),
    ):
        pytest.fail("gone on with")
    assert path.read_bytes() == before


def test_the_same_answers_elsewhere_are_the_same(trials, tmp_path):
    trials.on_answers(DropMask(DEPTH, attention=(1,)))
    trials.file.file.close()
    moved, others = DATA.model_copy(update={"source": "b"}), DATA.model_copy(update={"sha256": "beef"})
    with appended(tmp_path / "trials.jsonl", header(answers=moved), Trial) as file:
        assert file.count == 1
    with (
        pytest.raises(OutputError, match="was written with another answers"),
        appended(tmp_path / "trials.jsonl", header(answers=others), Trial),
    ):
        pytest.fail("gone on with")
    with (
        pytest.raises(OutputError, match="was written with another to_heal"),
        appended(tmp_path / "trials.jsonl", header(to_heal=DATA), Trial),
    ):
        pytest.fail("gone on with")
    with appended(tmp_path / "healed.jsonl", header(to_heal=DATA), Trial):
        pass
    with (
        pytest.raises(OutputError, match="was written with another to_heal"),
        appended(tmp_path / "healed.jsonl", header(), Trial),
    ):
        pytest.fail("gone on with")


def test_there_can_be_enough(trials):
    trials.most = 7
    with pytest.raises(EnoughError):
        list(forward(Space(DropMask(DEPTH), attention=3), trials))
    assert len(trials.asked) == 7
    trials.on_held_out(DropMask(DEPTH, attention=(4, 5)))  # what was found is judged all the same
    trials.on_answers(DropMask(DEPTH, attention=(4, 5)), anyway=True)
    trials.on_answers(DropMask(DEPTH, attention=(0,)))  # was judged


def test_time_ends_a_search_and_what_is_known_takes_none(trials):
    trials.on_answers(DropMask(DEPTH, attention=(1,)))
    trials.end = 0.0
    with pytest.raises(EnoughError):
        trials.on_answers(DropMask(DEPTH, attention=(2,)))
    trials.asked.clear()
    trials.on_answers(DropMask(DEPTH, attention=(1,)))


def test_a_difference_is_told_apart_by_pairs():
    """Prompts differ by more than masks do: paired, a small difference is sure; unpaired it is not."""
    rng = np.random.default_rng(0)
    tokens, hard = rng.integers(20, 60, 48), rng.gamma(2, 0.3, 48)
    mask = DropMask(DEPTH)
    one, other = Loss(mask, hard, tokens), Loss(mask, hard + 0.02 + rng.normal(0, 0.005, 48), tokens)
    low, high = other.interval(one)
    assert 0.015 < low < high < 0.025
    assert one.interval()[1] > other.interval()[0]
    assert one.mean == pytest.approx(np.average(hard, weights=tokens))


def test_where_layers_store_unlike_keys_and_values_no_mask_stores_more_than_cosines():
    """12 layers in turn: without two full ones 10 are stored as 4 + 8, without two sliding ones as 6 + 4, 10 in all."""
    scores = hybrid_scores(0.1, 0.11)

    class Fake:
        def under(self, mask):
            return type("Masked", (), {"layout": kv_layout([scores.kinds[layer] for layer in mask.kept_attention])})

    start = DropMask(12)
    space, by_cosine = with_cosine(Space(start, attention=2), Candidates(scores, start), Fake())
    most = Fake().under(by_cosine).layout.token_values
    masks = [DropMask(12, attention=pair) for pair in itertools.combinations(range(12), 2)]
    held = [mask for mask in masks if space.holds(mask)]
    assert 0 < len(held) < len(masks)
    assert {Fake().under(mask).layout.token_values for mask in held} == {most}
    assert all(Fake().under(mask).layout.token_values > most for mask in masks if mask not in held)


def test_what_comes_back_has_the_window_that_it_had():
    start = DropMask(DEPTH, windows=((1, 24), (3, 24)))
    space, rng = Space(start, attention=2), np.random.default_rng(0)
    more = replace(start, attention=(1, 3, 4))
    for mask in (
        *space.reduced(more),
        *space.extended(replace(start, attention=(3,))),
        space.more([("attention", 3)], 1),
    ):
        assert mask == replace(start, attention=mask.attention, mlp=mask.mlp)
    for _ in range(20):
        swapped = space.swapped(replace(start, attention=(1, 3)), rng)
        assert swapped == replace(start, attention=swapped.attention)
