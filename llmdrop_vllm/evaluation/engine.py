"""vLLM in this process for one mask at a time, and what is measured through it: likelihoods and speed."""

import gc
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import count, takewhile
from typing import Any

import numpy as np

from llmdrop_vllm.architectures.wrappers import WRAPPERS
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.tokens import TokenIds
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.evaluation.records import Speed, SpeedWorkload
from llmdrop_vllm.masks.mask import DropMask

# Read by vLLM when it starts an engine. In one process it starts in seconds, and its end can be waited for.
# Nothing is sent anywhere, vLLM's usage statistics among it.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
NUM_ROUNDS = 3  # in which speeds are measured
SWITCHING = {"enforce_eager": True, "worker_extension_cls": "llmdrop_vllm.serving.switching.MaskSwitch"}


@dataclass(frozen=True)
class EngineSettings:
    """`dtype` of weights and KV cache; `engines` at once share a GPU; `options` are vLLM's own arguments, and win;
    `seeded` is for requests that bring a seed each, `switching` for an engine in which masks are put on and off.

    Raises InputError for an option that vLLM does not have.
    """

    dtype: str
    max_model_len: int
    engines: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = False
    switching: bool = False

    def __post_init__(self) -> None:
        if not self.options:
            return
        from vllm.engine.arg_utils import EngineArgs

        if unknown := sorted(self.options.keys() - {each.name for each in fields(EngineArgs)}):
            raise InputError(f"--engine-args has {', '.join(unknown)}, which vLLM's EngineArgs do not have")

    def arguments(self, checkpoint: Checkpoint, mask: DropMask) -> dict[str, Any]:
        """What vLLM is started with."""
        gpu = default_device() == "cuda"
        overrides = self.options.get("hf_overrides", {})
        # A mask that the checkpoint has already needs no override, whatever dialect says it.
        if mask.effect != checkpoint.mask.effect:
            # Beside the user's own, or the full model would be measured as the dropped one.
            overrides = checkpoint.decoder.override(mask, overrides)
        # vLLM 0.32 takes a seeded request's generator back after a part of its prompt, which a CPU's cannot.
        whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, self.max_model_len)}
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            # Compiling for every mask takes longer than a CPU wins back.
            "enforce_eager": not gpu,
            "gpu_memory_utilization": 0.9 / self.engines if gpu else 0.3,
            # Examples that all questions of a task share are computed once.
            "enable_prefix_caching": self.engines == 1,
            "seed": 0,
            "use_tqdm_on_load": False,
            # vLLM tells of every engine that starts; one that is started for each mask is told of by its caller.
            "log_level": "ERROR",
            **(whole_prompts if self.seeded and not gpu else {}),
            **(SWITCHING if self.switching else {}),
            # What is measured is text: of a wrapper its tower alone is built.
            **({"language_model_only": True} if checkpoint.architecture in WRAPPERS else {}),
            **self.options,
            "hf_overrides": overrides,
        }


def default_device() -> str:
    """Where vLLM, and whatever is told no other place, computes here."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Question:
    """Token ids to go on from, by up to `max_tokens`."""

    prompt: Sequence[int]
    max_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """Token ids, with the one that ends an answer, and their text; `finish_reason` is "stop" or "length"."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


class Engine:
    """One engine; `harness` is lm-eval's model around it, where tasks are to be run."""

    def __init__(self, checkpoint: Checkpoint, mask: DropMask, settings: EngineSettings, *, harness: bool) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        arguments = settings.arguments(checkpoint, mask)
        self.harness: Any = None
        self.mask, self.windows = mask, mask.windows
        if harness:
            from lm_eval.models.vllm_causallms import VLLM

            # lm-eval makes the engine itself and has no place for one that is there.
            self.harness = VLLM(pretrained=str(checkpoint.directory), **arguments)
            self.llm = self.harness.model
        else:
            from vllm import LLM

            self.llm = LLM(str(checkpoint.directory), **arguments)
        model = self.llm.llm_engine.vllm_config.model_config
        self.vocab_size, self.context = int(model.get_vocab_size()), int(model.max_model_len)

    def can_switch(self) -> bool:
        """Whether `put_on` works here: not in a compiled model, nor in one without a row in the family table."""
        return not any(self.llm.collective_rpc("llmdrop_refuses"))

    def put_on(self, mask: DropMask) -> None:
        """Answer as under a mask from here on, in an engine for switching that was started with nothing gone or less.

        KV cache stays allocated for all layers, so that only what is computed is as in an engine of that mask. One that
        cannot switch raises SubstitutionError, or what its executor makes of it. Windows are built in: InputError for
        others.
        """
        if mask == self.mask:
            return
        if mask.windows != tuple(each for each in self.windows if each[0] not in mask.attention):
            raise InputError("windows cannot be switched in a running engine, which was built with others")
        self.llm.collective_rpc("llmdrop_put_on", args=(list(mask.attention), list(mask.mlp)))
        self._forget_prompts()
        self.mask = mask

    def negative_log_likelihoods(self, windows: Sequence[TokenIds]) -> list[float]:
        """Per window, the mean over its tokens after the first, in nats."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        found = []
        for request in self.llm.generate([window.tolist() for window in windows], sampling, use_tqdm=False):
            pairs = zip(request.prompt_token_ids[1:], request.prompt_logprobs[1:], strict=True)
            found.append(-float(np.mean([logprobs[token].logprob for token, logprobs in pairs])))
        return found

    def _forget_prompts(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps the KV cache of earlier prompts, which were computed under another mask")

    @property
    def tokenizer(self) -> Any:
        """As Transformers has it, or in its manner."""
        return self.llm.get_tokenizer()

    def replies(self, questions: Sequence[Question], *, temperature: float) -> Iterator[list[Reply]]:
        """In the order asked, each once all before it are there; what else is asked at the same time changes none."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        common = {"temperature": temperature, "output_kind": RequestOutputKind.FINAL_ONLY}
        for place, question in enumerate(questions):
            sampling = SamplingParams(max_tokens=question.max_tokens, seed=question.seed, **common)
            engine.add_request(str(place), list(question.prompt), sampling)
        waiting: dict[int, Reply] = {}
        given = 0
        while engine.has_unfinished_requests():
            for each in engine.step():
                (output,) = each.outputs
                waiting[int(each.request_id)] = Reply(tuple(output.token_ids), output.text, output.finish_reason)
            if ready := [waiting.pop(place) for place in takewhile(waiting.__contains__, count(given))]:
                given += len(ready)
                yield ready

    def close(self) -> None:
        """End the engine and give its memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.harness
        gc.collect()

    def seconds(self, prompts: Sequence[list[int]], tokens: int) -> float:
        """Until all requests have so many tokens, whatever these are."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._forget_prompts()
        start = time.perf_counter()
        self.llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start


_running: list[Engine] = []


@contextmanager
def running(checkpoint: Checkpoint, mask: DropMask, settings: EngineSettings, *, harness: bool) -> Iterator[Engine]:
    """An engine that is gone afterwards, its memory with it. Raises InputError for what vLLM refuses to start with.

    A second one can run at the same time. Its end takes vLLM's process groups along; the first can compute again when
    the next one has started.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    # While an engine starts, vLLM looks for garbage many times: not among all modules that were ever imported.
    gc.collect()
    gc.freeze()
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of torch's, on what vLLM does with it
            engine = Engine(checkpoint, mask, settings, harness=harness)
    except ValueError as error:
        raise InputError(f"vLLM does not start with {checkpoint.directory}: {error}") from error
    _running.append(engine)
    try:
        yield engine
    finally:
        _running.remove(engine)
        engine.close()
        if not _running:
            cleanup_dist_env_and_memory()


def speeds_in_turns(engines: Sequence[tuple[Engine, DropMask]], workload: SpeedWorkload) -> list[Speed]:
    """The same prompts to each engine under its mask in turn, in an order that changes, after a round that warms up.

    Machines drift by more in a minute than many masks gain, so only what was measured within seconds is compared.
    """
    rng = np.random.default_rng(0)
    shape = (workload.requests, workload.prompt_tokens)
    timed: list[tuple[Engine, DropMask, list[tuple[float, float]]]] = [(*each, []) for each in engines]
    for turn in range(1 + NUM_ROUNDS):
        prompts = rng.integers(engines[0][0].vocab_size, size=shape).tolist()
        for engine, mask, pairs in reversed(timed) if turn % 2 else timed:
            engine.put_on(mask)
            pairs.append((engine.seconds(prompts, 1), engine.seconds(prompts, workload.output_tokens)))
    return [_speed(workload, pairs[1:]) for *_, pairs in timed]


def _speed(workload: SpeedWorkload, pairs: Sequence[tuple[float, float]]) -> Speed:
    return Speed(
        prefill_tokens_per_s=tuple(workload.prefill_tokens / first for first, _ in pairs),
        decode_tokens_per_s=tuple(workload.decode_tokens / max(whole - first, 1e-9) for first, whole in pairs),
    )
