"""The two engines that contenders run on, each with the same three methods: answer, run, and what memory it has."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

Prompts = Sequence[list[int]]


class VllmEngine:
    """vLLM in this process, stepped by us: so that each step's tokens get the time at which they came."""

    def __init__(self, model: str, **options: Any) -> None:
        from vllm import LLM

        options = {"skip_tokenizer_init": True, "disable_log_stats": False, "seed": 0} | options
        self.llm = LLM(model, **options)
        self.requests = 0

    def memory(self) -> dict[str, int]:
        """`kv_tokens` that the KV cache holds, `kv_sequences` of the longest kind, in blocks of `block_tokens`."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return {
            "kv_tokens": int(cache.kv_cache_size_tokens),
            "kv_sequences": int(cache.kv_cache_max_concurrency),
            "block_tokens": cache.block_size,
        }

    def answer(self, prompt: list[int], tokens: int) -> dict[str, list]:
        """Log-probabilities of the prompt's tokens after the first, greedy tokens and their log-probabilities."""
        sampling = self._sampling(tokens, logprobs=0, prompt_logprobs=0)
        (request,) = self.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        (output,) = request.outputs
        after_first = zip(prompt[1:], request.prompt_logprobs[1:], strict=True)
        return {
            "prompt_logprobs": [entry[token].logprob for token, entry in after_first],
            "tokens": list(output.token_ids),
            "logprobs": [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)],
        }

    def run(self, prompts: Prompts, tokens: int) -> dict[str, Any]:
        """Seconds until the first and the last token of each request, all sent at once."""
        engine, scheduler = self.llm.llm_engine, self.llm.llm_engine.engine_core.engine_core.scheduler
        preemptions, sampling = self._preemptions(), self._sampling(tokens)
        first_s: dict[str, float] = {}
        last_s: dict[str, float] = {}
        usage, running = 0.0, 0
        start = time.perf_counter()
        for prompt in prompts:
            self.requests += 1
            engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                first_s.setdefault(output.request_id, now)
                last_s[output.request_id] = now
            usage = max(usage, scheduler.kv_cache_manager.usage)
            running = max(running, len(scheduler.running))
        return {
            "first_s": [*first_s.values()],
            "last_s": [last_s[name] for name in first_s],
            "kv_usage": usage,
            "running": running,
            "preemptions": self._preemptions() - preemptions,
        }

    def stages_kv_tokens(self, splits: Sequence[Sequence[int]], memory_bytes: int) -> list[int]:
        """What vLLM plans for pipeline stages of so many layers, each with this memory: tokens, 0 where it refuses."""
        from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

        config = self.llm.llm_engine.vllm_config
        (specs,) = self.llm.llm_engine.model_executor.get_kv_cache_specs()
        layer_of = {name: next(int(part) for part in name.split(".") if part.isdigit()) for name in specs}
        found = []
        for split in splits:
            ends = [sum(split[: stage + 1]) for stage in range(len(split))]
            stages = [
                {name: spec for name, spec in specs.items() if end - size <= layer_of[name] < end}
                for end, size in zip(ends, split, strict=True)
            ]
            if not all(stages):
                found.append(0)
                continue
            plans = _planned(config, stages, [memory_bytes] * len(stages))
            found.append(min(get_kv_cache_capacity(config, plan)[0] for plan in plans))
        return found

    def close(self) -> None:
        """Free the model, so that another can be loaded."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def _sampling(self, tokens: int, **options: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.FINAL_ONLY if options else RequestOutputKind.DELTA
        options |= {"temperature": 0, "ignore_eos": True, "detokenize": False, "output_kind": kind}
        return SamplingParams(max_tokens=tokens, **options)

    def _preemptions(self) -> int:
        return sum(each.value for each in self.llm.get_metrics() if each.name == "vllm:num_preemptions")


def _planned(config: Any, stages: list[dict[str, Any]], memory: list[int]) -> list[Any]:
    """vLLM's plan of the KV cache for each stage."""
    try:
        from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs
    except ImportError:  # before vLLM 0.33, which wants to be given the groups
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        return get_kv_cache_configs(config, stages, memory)
    return get_kv_cache_configs(config, stages, memory, get_global_kv_cache_groups(config, stages))


class TokenTimes(StoppingCriteria):
    """Called by Transformers after every generated token; never stops anything."""

    def __init__(self) -> None:
        self.start, self.seconds = time.perf_counter(), []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TransformersEngine:
    """Transformers' own generate, batched, with the KV cache that it makes by default."""

    def __init__(self, model: str, *, dtype: str, device: str) -> None:
        from llmdrop_vllm import hf

        self.model = hf.from_pretrained(Path(model), dtype=getattr(torch, dtype)).to(device).eval()
        # Every contender generates as many tokens as it is asked to.
        self.model.generation_config.eos_token_id = None
        self.device = device

    def memory(self) -> dict[str, float]:
        """The KV cache grows as long as there is memory."""
        return {"kv_tokens": math.inf, "kv_sequences": math.inf, "block_tokens": 1}

    @torch.inference_mode()
    def answer(self, prompt: list[int], tokens: int) -> dict[str, list]:
        """As VllmEngine."""
        ids = torch.tensor([prompt], device=self.device)
        logprobs = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        made = self._generate(ids, tokens, output_scores=True, return_dict_in_generate=True)
        chosen = made.sequences[0, len(prompt) :]
        scores = torch.cat(made.scores).float().log_softmax(-1)
        return {
            "prompt_logprobs": logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist(),
            "tokens": chosen.tolist(),
            "logprobs": scores.gather(-1, chosen[:, None])[:, 0].tolist(),
        }

    @torch.inference_mode()
    def run(self, prompts: Prompts, tokens: int) -> dict[str, Any]:
        """As VllmEngine; every request of a batch gets its tokens at the same time."""
        times = TokenTimes()
        self._generate(torch.tensor(list(prompts), device=self.device), tokens, stopping_criteria=[times])
        each = len(prompts)
        return {
            "first_s": [times.seconds[0]] * each,
            "last_s": [times.seconds[-1]] * each,
            "kv_usage": 0.0,
            "running": each,
            "preemptions": 0,
        }

    def _generate(self, ids: torch.Tensor, tokens: int, **options: Any) -> Any:
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
        )

    def close(self) -> None:
        """Free the model, so that another can be loaded."""
        del self.model


ENGINES = {"vllm": VllmEngine, "transformers": TransformersEngine}
