"""In-process vLLM engines for tests, and what they computed."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Before vLLM is imported: no engine process (seconds instead of half a minute), and one unit of KV cache.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.platforms import cpu, current_platform

# That unit, a GiB for vLLM: to write it full of zeros is more than half of a tiny engine's life.
KV_CACHE_BYTES = cpu.GiB_bytes = 1 << 25
register_kernels_once = cache(current_platform.register_triton_kernel_overrides)


@contextmanager
def quick() -> Iterator[None]:
    """What takes most of a tiny engine's life is left out, or done once for all engines, or in this process.

    vLLM looks for garbage a dozen times per engine. All modules that this process has ever imported are set aside and
    stay so, or it would go through them each time.
    """
    gc.collect()
    gc.freeze()
    with (
        patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None),
        patch.object(registry, "_run_in_subprocess", lambda inspect: inspect()),
        patch.object(current_platform, "register_triton_kernel_overrides", register_kernels_once),
    ):
        yield


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[LLM]:
    """An engine for the checkpoint at `path`, gone again afterwards: the next test starts another in this process."""
    # On CPU the utilization is a share of the memory that must be free; the size of the KV cache is set above.
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "gpu_memory_utilization": 0.3,
    } | options
    with quick():
        llm = None
        try:
            llm = LLM(str(path), **options)
            yield llm
        finally:
            if llm is not None:  # or what one that could not be built has left would be the next one's
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
            if not options["enforce_eager"]:  # else the sampler would be compiled for each engine
                torch._dynamo.reset()


def greedy(llm: LLM, prompt: list[int], tokens: int = 12, **options: Any) -> tuple[list[int], list[float], list[float]]:
    """(greedy token ids, their log-probabilities, log-probability of each prompt token after the first)."""
    options = {
        "temperature": 0,
        "max_tokens": tokens,
        "prompt_logprobs": 0,
        "logprobs": 0,
        "ignore_eos": True,
    } | options
    (request,) = llm.generate(
        [{"prompt_token_ids": prompt}], SamplingParams(**options, detokenize=False), use_tqdm=False
    )
    (output,) = request.outputs
    prompt_logprobs = zip(prompt[1:], request.prompt_logprobs[1:], strict=True) if request.prompt_logprobs else ()
    return (
        list(output.token_ids),
        [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)],
        [entry[token].logprob for token, entry in prompt_logprobs],
    )


def kv_tokens(llm: LLM) -> int:
    """Tokens that fit into the engine's KV cache."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size
