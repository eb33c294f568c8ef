import pytest

from llmdrop_vllm import DropMask
from llmdrop_vllm.errors import DataError, MaskError
from llmdrop_vllm.evaluation.recommend import Goal, choices, choose
from tests.evaluation.sweeps import DEPTH, point, sweep

MASKS = [DropMask(DEPTH, attention=tuple(range(n))) for n in range(5)]
# Multiple choice holds longer than generation, as it does on real models.
SWEEP = sweep(
    point(MASKS[1], choice=0.80, generation=0.80, faster=1.1, kv_share=0.875, perplexity=10.1),
    point(MASKS[2], choice=0.80, generation=0.76, faster=1.2, kv_share=0.75, perplexity=10.5),
    point(MASKS[3], choice=0.79, generation=0.60, faster=1.3, kv_share=0.625, perplexity=12.0),
    point(MASKS[4], choice=0.72, generation=0.20, faster=1.4, kv_share=0.5, perplexity=20.0),
)


def chosen(goal):
    choice, meets = choose(SWEEP, goal)
    return choice.point.quality.mask, meets


def test_a_limit_on_the_loss_gives_the_fastest_that_keeps_it_by_generation_too():
    assert chosen(Goal(max_loss=0.06)) == (MASKS[2], True)  # 0.76 of 0.80 is 5% less; by multiple choice 3 would do
    assert chosen(Goal(max_loss=0.0)) == (MASKS[1], True)


def test_a_budget_or_a_speedup_gives_the_least_loss():
    assert chosen(Goal(max_kv_share=0.75)) == (MASKS[2], True)
    assert chosen(Goal(min_speedup=1.3)) == (MASKS[3], True)


def test_goals_are_met_together():
    assert chosen(Goal(max_kv_share=0.9, min_speedup=1.15, max_loss=0.1)) == (MASKS[2], True)


def test_a_goal_out_of_reach_gives_the_nearest():
    assert chosen(Goal(max_kv_share=0.1)) == (MASKS[4], False)
    mask, meets = chosen(Goal(min_speedup=1.4, max_loss=0.01))
    assert (mask, meets) == (MASKS[2], False)  # misses the speedup by a sixth; the others miss by more


def test_without_tasks_the_loss_is_what_perplexity_rose_by():
    found = sweep(
        point(MASKS[1], choice=None, generation=None, perplexity=10.1),
        full=point(MASKS[0], choice=None, generation=None),
    )
    assert choices(found)[1].loss == pytest.approx(0.01)
    assert "generation" not in choices(found)[1].losses


def test_losses_are_relative_to_the_full_model():
    losses = choices(SWEEP)[3].losses
    assert losses == pytest.approx(
        {"multiple choice": 1 - 0.79 / 0.8, "generation": 0.25, "perplexity": 0.2, "agreement": 0.0}
    )


def test_nothing_asked_no_kv_cache_and_a_speedup_without_speeds_are_refused():
    with pytest.raises(MaskError, match="expected --max-loss, --kv-budget or --speedup"):
        Goal()
    with pytest.raises(MaskError, match="--kv-budget is 0%"):
        Goal(max_kv_share=0.0)
    with pytest.raises(DataError, match="measured no speed"):
        choose(sweep(full=point(MASKS[0], faster=None), workload=None), Goal(min_speedup=1.1))


def test_a_goal_says_what_it_wants():
    goal = Goal(max_loss=0.01, max_kv_share=0.5, min_speedup=1.3)
    assert str(goal) == "a loss of at most 1% and a KV cache of at most 50% and a speedup of at least 1.3"
