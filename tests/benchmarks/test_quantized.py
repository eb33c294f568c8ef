"""The table of dropped and quantized models: what the front page tells of it."""

import json
from pathlib import Path

import torch

from benchmarks.quantized import EIGHT_BIT, FULL, variants
from tests.architectures.cases import CASES, LAYERS

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "quantized.json").read_text())


def test_the_front_page_says_what_was_measured():
    page = (ROOT / "README.md").read_text()
    for each in RESULT["variants"]:
        share, error = each["tasks"]["llmdrop_humaneval"]
        cells = (
            each["label"],
            f"{each['weight_bytes'] / 1e9:.2f}",
            f"{each['requests']}",
            f"{each['perplexity']:.1f}",
            f"{share:.1%} ± {error:.1%}",
            *(f"{each['of_full'][batch]:.2f}x" if batch in each["of_full"] else "" for batch in ("1", "16")),
        )
        assert f"| {' | '.join(cells)} |" in page


def test_variants_are_named_by_what_was_done(tmp_path):
    case = CASES["LlamaForCausalLM"]
    for name, mask in {
        "model": {},
        "dropped": {"drop_attn_list": [1, 2]},
        "trained-w8a8": {"drop_attn_list": [1]},
    }.items():
        config = case.write(tmp_path / name) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | mask))
    names = {each.name: each.label for each in variants(tmp_path / "model", tmp_path)}
    assert names == {
        FULL: FULL,
        f"{FULL} + {EIGHT_BIT}": EIGHT_BIT,
        "model": FULL,
        f"model + {EIGHT_BIT}": EIGHT_BIT,
        "dropped": f"2 of {LAYERS} dropped",
        f"dropped + {EIGHT_BIT}": f"2 of {LAYERS} dropped, {EIGHT_BIT}",
        "trained-w8a8": f"1 of {LAYERS} dropped, trained, W8A8",
        f"trained-w8a8 + {EIGHT_BIT}": f"1 of {LAYERS} dropped, trained, W8A8, {EIGHT_BIT}",
    }


def test_an_8_bit_kv_cache_leaves_out_the_layers_whose_keys_are_too_large(tmp_path):
    case = CASES["Qwen2ForCausalLM"]
    model = case.model()
    for layer in (0, 3):
        torch.nn.init.constant_(model.model.layers[layer].self_attn.k_proj.bias, 300)
    case.save(model, tmp_path / "model")
    plain, eight_bit, but = variants(tmp_path / "model", tmp_path)[:3]
    assert (plain.engine_args, eight_bit.engine_args) == ("{}", '{"kv_cache_dtype": "fp8"}')
    assert but.engine_args == '{"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "3"]}'
    assert but.label == f"{EIGHT_BIT} but in layers 0 and 3"
