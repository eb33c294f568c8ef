"""A dropped checkpoint served by vLLM computes what the reference computes, with the KV cache it needs."""

import pytest

from llmdrop_vllm import DropMask
from tests.engines import KV_CACHE_BYTES, engine, greedy, kv_tokens
from tests.tiny import PARITY_CASES, golden, write_checkpoint

BLOCK_TOKENS = 128  # vLLM's on CPU


@pytest.mark.parametrize("strip", [False, True], ids=["all weights", "stripped"])
@pytest.mark.parametrize("case", PARITY_CASES)
def test_dropped_checkpoint_matches_the_reference(case, strip, tmp_path):
    expected = golden(case)
    write_checkpoint(tmp_path, expected["config"], seed=expected["seed"], strip=strip)
    with engine(tmp_path) as llm:
        tokens, logprobs, prompt_logprobs = greedy(llm, expected["prompt_token_ids"])
        capacity = kv_tokens(llm)
    assert tokens == expected["greedy_token_ids"]
    assert logprobs == pytest.approx(expected["greedy_logprobs"], abs=1e-4)
    assert prompt_logprobs == pytest.approx(expected["prompt_logprobs"][1:], abs=1e-4)
    # Two key/value heads of 32 float32 numbers, keys and values, for each remaining attention sublayer.
    bytes_per_token = 2 * 2 * 32 * 4 * len(DropMask.from_config(expected["config"]).kept_attention)
    assert capacity == KV_CACHE_BYTES // (bytes_per_token * BLOCK_TOKENS) * BLOCK_TOKENS


def test_golden_cases_tell_a_mask_from_none(tmp_path):
    """The comparison above can fail: the same weights without the mask are far from the reference."""
    expected = golden("llama_attn_ints")
    config = expected["config"] | {"drop_attn_list": []}
    write_checkpoint(tmp_path, config, seed=expected["seed"])
    with engine(tmp_path) as llm:
        _, _, prompt_logprobs = greedy(llm, expected["prompt_token_ids"])
    worst = max(
        abs(ours - theirs) for ours, theirs in zip(prompt_logprobs, expected["prompt_logprobs"][1:], strict=True)
    )
    assert worst > 1
