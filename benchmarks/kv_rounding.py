"""Why an 8-bit KV cache breaks one model and not another: whose keys, rounded in which layers, cost what.

    apt-get install debian-handbook
    python benchmarks/kv_rounding.py [--model qwen2.5-coder-1.5b] [--leave-out 0 --leave-out 0,1]

In Transformers, bfloat16: keys and values are rounded to 8-bit floats (E4M3, without scales) as vLLM stores them by
`--kv-cache-dtype fp8`: all, keys or values alone, all but some layers'. Told is perplexity on the first texts of a
handbook, and of each layer how large its keys are and how much they vary from token to token.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks.options import ending
from benchmarks.real_quality import prose
from benchmarks.record import add_out, finish
from benchmarks.table import rows
from llmdrop_vllm.cli.values import layers
from llmdrop_vllm.fetching.fetch import fetch

TEXTS, TOKENS, NAME = 2, 1024, "rounded"


def rounded(values: torch.Tensor) -> torch.Tensor:
    """To 8-bit floats and back; what is beyond the largest of them becomes that one."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    return values.float().clamp(-limit, limit).to(torch.float8_e4m3fn).to(values.dtype)


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *, how: dict, **options: Any
) -> Any:
    """Transformers' own, on keys and values [batch, heads, tokens, size] that are rounded as `how` says."""
    layer = int(module.layer_idx)
    varies = key.float().std(dim=-2).mean().item()
    how["seen"].setdefault(layer, {"largest": round(key.abs().max().item(), 1), "varies": round(varies, 2)})
    if layer not in how["but"]:
        key, value = rounded(key) if how["keys"] else key, rounded(value) if how["values"] else value
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", metavar="NAME")
    what = "layers that keep bfloat16, as --kv-cache-dtype-skip-layers has it (repeatable)"
    parser.add_argument("--leave-out", type=layers, action="append", default=[], metavar="N,N", help=what)
    add_out(parser)
    args = parser.parse_args()
    how: dict[str, Any] = {"keys": False, "values": False, "but": (), "seen": {}}
    with ending("kv_rounding"), tempfile.TemporaryDirectory() as scratch:
        text = prose(Path(scratch) / "prose.txt").read_text()
        AttentionInterface.register(NAME, partial(attention, how=how))
        AttentionMaskInterface.register(NAME, sdpa_mask)
        path = fetch(args.model)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=NAME).eval()
        ids = AutoTokenizer.from_pretrained(path)(text[: 40 * TEXTS * TOKENS], return_tensors="pt").input_ids
        ids = ids[:, : TEXTS * TOKENS].view(TEXTS, TOKENS)
        ways: dict[str, dict[str, Any]] = {"nothing rounded": {}, "values": {"values": True}, "keys": {"keys": True}}
        both = {"keys": True, "values": True}
        ways["keys and values"] = both
        ways |= {f"but in layers {', '.join(map(str, each))}": both | {"but": each} for each in args.leave_out}
        found = {}
        for name, way in ways.items():
            how |= {"keys": False, "values": False, "but": ()} | way
            with torch.no_grad():
                logits = model(ids).logits[:, :-1].float().flatten(0, 1)
            found[name] = round(cross_entropy(logits, ids[:, 1:].flatten()).exp().item(), 2)
            print(f"{name}: {found[name]}", flush=True)
    told = rows(("rounded", "perplexity"), found.items())
    keys = rows(("layer", "largest key", "varies by"), ((n, *each.values()) for n, each in how["seen"].items()))
    result = {"model": args.model, "tokens": ids.numel(), "perplexity": found, "keys": how["seen"]}
    finish("kv_rounding", result, args.out, table=f"# Keys and values in 8-bit floats\n\n{told}\n{keys}")


if __name__ == "__main__":
    main()
