"""The judge of masks: what it shares between them changes nothing, in any architecture."""

import numpy as np
import pytest
import torch

from llmdrop_vllm import hf
from llmdrop_vllm.artifacts import DataIdentity
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.judge import Judge, Weights
from tests.architectures.cases import CASES, LAYERS

LENGTHS, PROMPT = (40, 24, 9), 6
UNREAD = {"Gemma4ForCausalLM-shared keys": 0}  # no other layer reads its keys and values


def answers():
    rng = np.random.default_rng(0)
    ids = tuple(rng.integers(3, 256, length) for length in LENGTHS)
    identity = DataIdentity(source="random", sequences=3, tokens=sum(LENGTHS) - 18, seq_len=None, seed=0, sha256="")
    return Calibration(ids, identity, starts=(PROMPT - 1,) * len(ids))


def judge_of(checkpoint, directory):
    full = DropMask(LAYERS)
    weights = Weights(lambda: hf.load(checkpoint.under(full), dtype=torch.float32).eval())
    return Judge(weights, checkpoint, answers(), directory)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family.streams is None])
def test_a_mask_is_judged_alike_from_whatever_base(name, tmp_path):
    judge = judge_of(Checkpoint.open(CASES[name].save(CASES[name].model(), tmp_path / "model")), tmp_path)
    layer = UNREAD.get(name, 1)
    full, base = DropMask(LAYERS), DropMask(LAYERS, attention=(layer,))
    further = DropMask(LAYERS, attention=(layer,), mlp=(LAYERS - 1,))
    alone = judge.divergences(further)  # differs from the full model from the second layer on
    judge.rebase(base)
    shared = judge.divergences(further)  # differs from its base in the last layer only
    judge.rebase(further)
    whole = judge.divergences(further)  # nothing is kept

    assert set(alone) == {0, 1, 2}
    for found in (alone, shared):
        assert list(found.values()) == pytest.approx(list(whole.values()), rel=1e-3, abs=1e-6)
    assert max(judge.divergences(full).values()) < 1e-4
    assert min(alone.values()) > 0


def test_it_is_the_divergence_of_the_answers_tokens(tmp_path):
    case = next(iter(CASES.values()))
    checkpoint = Checkpoint.open(case.save(case.model(), tmp_path / "model"))
    judge = judge_of(checkpoint, tmp_path)
    mask = DropMask(LAYERS, attention=(1, 2))
    found = judge.divergences(mask)
    model = hf.load(checkpoint.under(DropMask(LAYERS)), dtype=torch.float32).eval()
    for number, ids in enumerate(answers().sequences):
        token_ids, predicting = torch.from_numpy(ids)[None], slice(PROMPT - 1, len(ids) - 1)
        with torch.inference_mode():
            full = model(token_ids).logits[0, predicting].log_softmax(-1)
            with hf.dropped(model, checkpoint.family, mask):
                masked = model(token_ids, use_cache=False).logits[0, predicting].log_softmax(-1)
        exact = (full.exp() * (full - masked)).sum(-1).mean().item()
        # Of the 64 most likely tokens and all others as one: a lower bound, here of 256 tokens that are all alike.
        assert 0.2 * exact < found[number] <= exact * 1.001


def test_only_some_are_judged_where_that_is_asked(tmp_path):
    case = next(iter(CASES.values()))
    judge = judge_of(Checkpoint.open(case.save(case.model(), tmp_path / "model")), tmp_path)
    mask = DropMask(LAYERS, attention=(1,))
    assert judge.divergences(mask, chunks=()) == {}
    assert judge.divergences(mask, chunks=(0,)) == {0: judge.divergences(mask)[0]}  # each length has its own chunk


def test_weights_that_are_changed_to_while_judging_can_be_learnt_with(tmp_path):
    """Healing has no closed form for every architecture."""
    case = next(iter(CASES.values()))
    judge = judge_of(Checkpoint.open(case.save(case.model(), tmp_path / "model")), tmp_path)
    whole, asked = judge.weights.model, []

    def load():
        asked.append(torch.is_inference_mode_enabled())
        return whole

    judge.weights.change(load)
    judge.divergences(DropMask(LAYERS, attention=(1,)))
    assert asked == [False]
