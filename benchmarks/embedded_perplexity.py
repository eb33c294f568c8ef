"""Held-out perplexity of the embedded model with sublayers dropped, measured through vLLM.

    python benchmarks/embedded_perplexity.py [--out benchmarks/results/embedded_perplexity.json]

Sublayers are ranked by importance, 1 - mean cosine similarity between the residual stream before and after them
(arXiv 2406.15786), on the intact model; then the n least important attention or MLP sublayers are dropped.
"""

import argparse
import gc
import math
import os
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

from benchmarks.record import finish
from llmdrop_vllm import DropMask
from llmdrop_vllm.embedded import MODEL, held_out

COUNTS = (1, 2, 4)
RANKING_TEXTS = 64


def rankings(texts: list[str]) -> tuple[list[int], list[int]]:
    """(attention layers, MLP layers), least important first."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    before: dict[str, torch.Tensor] = {}
    sums: dict[str, float] = {}

    def keep_input(name):
        return lambda _module, args: before.__setitem__(name, args[0])

    def add_similarity(name):
        def hook(_module, _args, output):
            x = before[name]
            y = x + (output[0] if isinstance(output, tuple) else output)
            sums[name] = sums.get(name, 0.0) + torch.cosine_similarity(x, y, dim=-1).sum().item()

        return hook

    for index, layer in enumerate(model.model.layers):
        for kind, norm, module in (
            ("attention", layer.input_layernorm, layer.self_attn),
            ("mlp", layer.post_attention_layernorm, layer.mlp),
        ):
            norm.register_forward_pre_hook(keep_input(f"{kind}.{index}"))
            module.register_forward_hook(add_similarity(f"{kind}.{index}"))
    with torch.no_grad():
        for text in texts[:RANKING_TEXTS]:
            model(**tokenizer(text, return_tensors="pt", truncation=True))
    layers = range(model.config.num_hidden_layers)
    attention, mlp = (sorted(layers, key=lambda layer: -sums[f"{kind}.{layer}"]) for kind in ("attention", "mlp"))
    return attention, mlp


def perplexity(mask: DropMask, texts: list[str]) -> tuple[float, int]:
    """(perplexity, tokens predicted), each document by itself, cut at the model's context."""
    llm = LLM(
        str(MODEL),
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        hf_overrides=mask.to_config("runtime"),
    )
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer(text, truncation=True, max_length=1023)["input_ids"] for text in texts]
    requests = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False),
    )
    logprobs = [
        entry[token].logprob
        for request, prompt in zip(requests, prompts, strict=True)
        for token, entry in zip(prompt[1:], request.prompt_logprobs[1:], strict=True)
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm, requests
    gc.collect()
    return math.exp(-sum(logprobs) / len(logprobs)), len(logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "embedded_perplexity.json")
    args = parser.parse_args()
    texts = [*held_out().values()]
    attention, mlp = rankings(texts)
    num_layers = len(attention)
    masks = {"full": DropMask(num_layers)}
    masks |= {f"attention {n}": DropMask(num_layers, attention=tuple(attention[:n])) for n in COUNTS}
    masks |= {f"MLP {n}": DropMask(num_layers, mlp=tuple(mlp[:n])) for n in COUNTS}
    result = {
        "model": "embedded",
        "documents": len(texts),
        "ranking": {"attention": attention, "mlp": mlp, "texts": RANKING_TEXTS},
        "perplexity": {},
    }
    for name, mask in masks.items():
        value, result["tokens"] = perplexity(mask, texts)
        result["perplexity"][name] = round(value, 3)
    for name, value in result["perplexity"].items():
        print(f"{name:12} {value:8.2f}")
    finish(result, args.out)


if __name__ == "__main__":
    main()
