"""Every wrapper with a tiny model: a mask drops sublayers of its tower, and nothing else of it is touched."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import ModelConfig

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer
from llmdrop_vllm.writing.validation import output_projections
from tests.architectures.cases import LAYERS
from tests.architectures.wrapper_cases import WRAPPER_CASES
from tests.engines import engine, greedy

PROMPT = [*range(3, 43)]
MASK = DropMask(LAYERS, attention=(4, 0, 2), mlp=(4, 1))
KV_CACHE_BYTES = 1 << 26


@pytest.fixture(autouse=True)
def text_only(monkeypatch):
    """The towers are built, and no processor is asked for: these checkpoints have neither tokenizer nor processor."""
    monkeypatch.setattr(ModelConfig, "_supports_multimodal_inputs", lambda self: False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")  # it would go before the engine's option


def served(directory: Path, **options):
    """(greedy token ids, log-probabilities of them and of the prompt, blocks of KV cache and tokens in each)."""
    options = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "attention_backend": "CPU_MLA"} | options
    with engine(directory, **options) as llm:
        tokens, logprobs, prompt = greedy(llm, PROMPT)
        cache = llm.llm_engine.vllm_config.cache_config
        return tokens, [*logprobs, *prompt], (cache.num_gpu_blocks, cache.block_size)


def rewritten(directory: Path, change) -> Path:
    weights = directory / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("wrapper", WRAPPER_CASES)
def test_dropping_is_zeroing_the_last_projections(wrapper, tmp_path):
    case = WRAPPER_CASES[wrapper]
    masked, zeroed = (case.write(tmp_path / name) for name in ("masked", "zeroed"))
    checkpoint = Checkpoint.open(zeroed)
    zeros = output_projections(checkpoint.under(MASK))
    rewritten(zeroed, lambda tensors: tensors | {name: torch.zeros_like(tensors[name]) for name in zeros})
    path = masked / "config.json"
    path.write_text(json.dumps(checkpoint.decoder.config_with(MASK.to_config())))
    family = checkpoint.family
    rewritten(masked, lambda tensors: {n: t for n, t in tensors.items() if not in_dropped_sublayer(n, family, MASK)})
    tokens, logprobs, (blocks, block_tokens) = served(masked)
    expected_tokens, expected, _ = served(zeroed)
    assert tokens == expected_tokens
    assert logprobs == pytest.approx(expected, abs=1e-4)
    layout = checkpoint.under(MASK).layout
    assert blocks == KV_CACHE_BYTES // (4 * block_tokens * layout.block_values)
