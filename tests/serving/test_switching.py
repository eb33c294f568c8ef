"""Masks switched in a running engine give what an engine built with that mask gives."""

import pytest

from llmdrop_vllm.evaluation.engine import SWITCHING
from llmdrop_vllm.masks.mask import DropMask
from tests.architectures.cases import CASES, LAYERS
from tests.engines import engine, greedy

PROMPT = [5, 9, 200, 31, 77, 8, 120, 64]
# One of each way in which layers add what sublayers return, mixtures of experts among them.
STYLES = tuple(CASES)


# Whose kernels for CPUs take no float32.
BFLOAT16 = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "AXK1ForCausalLM")


def put_on(llm, attention=(), mlp=()):
    llm.collective_rpc("llmdrop_put_on", args=(list(attention), list(mlp)))
    llm.reset_prefix_cache()


@pytest.mark.parametrize("name", STYLES)
def test_a_switched_mask_gives_what_a_built_one_gives(name, tmp_path):
    case = CASES[name]
    path = case.save(case.model(), tmp_path / "full")
    mask = DropMask(LAYERS, attention=(0, 2), mlp=(1, 2))
    with engine(path, hf_overrides=mask.to_config("runtime")) as llm:
        built = greedy(llm, PROMPT)
    with engine(path, **SWITCHING) as llm:
        full = greedy(llm, PROMPT)
        put_on(llm, attention=(LAYERS - 1,), mlp=(0,))
        other = greedy(llm, PROMPT)
        put_on(llm, mask.attention, mask.mlp)
        switched = greedy(llm, PROMPT)
        put_on(llm)
        assert greedy(llm, PROMPT) == full
    assert switched[0] == built[0]
    for ours, theirs in zip(switched[1:], built[1:], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert full[2] != pytest.approx(built[2], abs=1e-3)
    assert other[2] != pytest.approx(built[2], abs=1e-3)
