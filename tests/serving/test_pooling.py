"""Embeddings and classes of a model with a mask: those of the full one with what is dropped adding nothing."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmdrop_vllm.embedded import MODEL
from tests.engines import engine
from tests.tiny import TINY_LLAMA, shapes, tensor

PROMPT = {"prompt_token_ids": [*range(3, 103)]}
MASK = {"drop_attn_list": [2, 5, 0], "drop_mlp_list": [6]}
PARTS = {"drop_attn_list": ("self_attn", "input_layernorm"), "drop_mlp_list": ("mlp", "post_attention_layernorm")}
OUTPUTS = {"drop_attn_list": "self_attn.o_proj", "drop_mlp_list": "mlp.down_proj"}
LABELS = {"num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
KINDS = {
    "embed": ("LlamaForCausalLM", {}),
    "base": ("LlamaModel", {}),
    "classify": ("LlamaForSequenceClassification", LABELS),
}


def write(directory, kind, entries=None, zeroed=False, stripped=False):
    """A checkpoint of the kind: a base model's tensors lack `model.`, a classifier has a score for a head."""
    architecture, labels = KINDS[kind]
    weights = {name: tensor(name, shape, 0) for name, shape in shapes(TINY_LLAMA).items()}
    head = weights.pop("lm_head.weight")
    if kind == "embed":
        weights["lm_head.weight"] = head
    if kind == "classify":
        weights["score.weight"] = tensor("score.weight", (3, TINY_LLAMA["hidden_size"]), 0)
    for said, layers in MASK.items():
        for layer in layers:
            if zeroed:
                weights[f"model.layers.{layer}.{OUTPUTS[said]}.weight"] *= 0
            gone = tuple(f"model.layers.{layer}.{part}." for part in PARTS[said])
            if stripped:
                weights = {name: each for name, each in weights.items() if not name.startswith(gone)}
    if kind == "base":
        weights = {name.removeprefix("model."): each for name, each in weights.items()}
    directory.mkdir()
    config = TINY_LLAMA | {"architectures": [("Dropped" if stripped else "") + architecture]} | labels
    (directory / "config.json").write_text(json.dumps(config | (entries or {})))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def pooled(path, kind, **options):
    """(embedding or probabilities, attentions with a KV cache)."""
    options = {"runner": "pooling", "skip_tokenizer_init": False, "tokenizer": str(MODEL)} | options
    if kind != "base":  # which vLLM converts unasked
        options["convert"] = "classify" if kind == "classify" else "embed"
    with engine(path, **options) as llm:
        layers = len(llm.llm_engine.vllm_config.compilation_config.static_forward_context)
        if kind == "classify":
            return np.array(llm.classify([PROMPT], use_tqdm=False)[0].outputs.probs), layers
        return np.array(llm.embed([PROMPT], use_tqdm=False)[0].outputs.embedding), layers


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_model_pools_what_the_zeroed_one_does(kind, tmp_path):
    expected, _ = pooled(write(tmp_path / "zeroed", kind, zeroed=True), kind)
    full = write(tmp_path / "full", kind)
    assert np.abs(pooled(full, kind)[0] - expected).max() > 0.01
    at_run_time = pooled(full, kind, hf_overrides=MASK)
    in_a_checkpoint = pooled(write(tmp_path / "dropped", kind, MASK, stripped=True), kind)
    for found, layers in (at_run_time, in_a_checkpoint):
        assert np.allclose(found, expected, atol=1e-5)
        assert layers == 5
