"""Quantized models with a mask: served as after surgery, whatever names their lists have, and with the KV cache of what
is left. Experts stay in bfloat16 here: vLLM's kernels for quantized ones on CPUs need AMX.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llmdrop_vllm import DropMask
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL, held_out
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.architectures.cases import CASES, LAYERS, model_of
from tests.checkpoints.files import MASK
from tests.engines import KV_CACHE_BYTES, engine, greedy, kv_tokens
from tests.quantized import FORMATS, quantize
from tests.tiny import TINY_LLAMA, write_checkpoint

PROMPT = [*range(3, 40)]
BLOCK_TOKENS = 128  # vLLM's on a CPU
OF_TWELVE = DropMask(12, attention=(11, 7, 8, 10), mlp=(3,))
OF_TINY = DropMask(LAYERS, attention=(3, 1), mlp=(2,))
ROUNDING = {"W8A8": 0.05, "FP8": 0.05, "W4A16": 0.25, "GPTQ": 0.25, "AWQ": 0.25}  # nats per token, at most


def answers(path, prompt, mask=None, **options):
    """(what `greedy` tells, tokens in the KV cache)."""
    overrides = mask.to_config("runtime") if mask else {}
    with engine(path, dtype="bfloat16", hf_overrides=overrides, **options) as llm:
        return greedy(llm, prompt), kv_tokens(llm)


def mean_logprob(answer):
    (_, _, of_prompt), _ = answer
    return sum(of_prompt) / len(of_prompt)


@pytest.fixture(scope="module")
def text():
    """Tokens of a text that the embedded model has not seen."""
    return AutoTokenizer.from_pretrained(MODEL)(next(iter(held_out().values())))["input_ids"][:200]


@pytest.fixture(scope="module")
def dense(text):
    """What the model says that the quantized ones were made of, in full and with the mask."""
    return answers(MODEL, text), answers(MODEL, text, OF_TWELVE)


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_served_in_full_with_a_mask_and_after_surgery(form, text, dense, tmp_path):
    model = quantize(MODEL, tmp_path / "model", form)
    write(plan_surgery(model, OF_TWELVE), tmp_path / "out")
    full, masked = answers(model, text), answers(model, text, OF_TWELVE)
    stripped = answers(tmp_path / "out", text)
    assert stripped == masked
    for ours, theirs in zip((full, masked), dense, strict=True):
        assert mean_logprob(ours) == pytest.approx(mean_logprob(theirs), abs=ROUNDING[form])
        assert ours[1] == theirs[1]
    # The comparisons can fail: what the mask drops costs more than rounding.
    assert mean_logprob(masked) < mean_logprob(full) - 2 * ROUNDING[form]
    block_bytes = Checkpoint.open(tmp_path / "out").decoder.layout().block_values * 2 * BLOCK_TOKENS
    assert stripped[1] == KV_CACHE_BYTES // block_bytes * BLOCK_TOKENS


@pytest.mark.parametrize(
    ("architecture", "form", "spared"),
    [
        ("Qwen3MoeForCausalLM", "W8A8", (r".*\.experts\.",)),
        ("Qwen3MoeForCausalLM", "W4A16", (r".*\.experts\.",)),
        ("Gemma2ForCausalLM", "W8A8", ()),  # with a norm behind each sublayer
        ("Glm4ForCausalLM", "W4A16", ()),
    ],
)
def test_other_layouts_are_served_with_a_mask_as_after_surgery(architecture, form, spared, tmp_path):
    plain = CASES[architecture].save(model_of(architecture), tmp_path / "plain")
    model = quantize(plain, tmp_path / "model", form, spared=spared)
    write(plan_surgery(model, OF_TINY), tmp_path / "out")
    masked = answers(model, PROMPT, OF_TINY)
    assert answers(tmp_path / "out", PROMPT) == masked
    assert answers(model, PROMPT) != masked
    assert mean_logprob(masked) == pytest.approx(mean_logprob(answers(plain, PROMPT, OF_TINY)), abs=0.2)


def test_scales_for_the_kv_cache_and_names_of_what_is_gone_do_no_harm(tmp_path):
    """As llm-compressor writes them: two scales for each layer's KV cache, and in `ignore` a dropped module and one of
    no layer.
    """
    spared = ("model.layers.2.self_attn.o_proj", "model.layers.99.mlp.down_proj")
    plain = write_checkpoint(tmp_path / "plain", TINY_LLAMA)
    model = quantize(plain, tmp_path / "model", "W8A8", spared=spared)
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    config["quantization_config"] |= {"kv_cache_scheme": scheme, "ignore": ["lm_head", *spared]}
    (model / "config.json").write_text(json.dumps(config))
    path = model / "model.safetensors"
    scale = torch.tensor([0.5], dtype=torch.bfloat16)
    scales = {f"model.layers.{layer}.self_attn.{kind}_scale": scale.clone() for layer in range(8) for kind in "kv"}
    save_file(load_file(path) | scales, path, metadata={"format": "pt"})
    write(plan_surgery(model, MASK), tmp_path / "out")
    after = answers(tmp_path / "out", PROMPT, kv_cache_dtype="fp8")
    assert after == answers(model, PROMPT, MASK, kv_cache_dtype="fp8")
    assert after != answers(model, PROMPT, kv_cache_dtype="fp8")
