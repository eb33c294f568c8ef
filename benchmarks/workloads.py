"""What the contenders are asked to do: batches of requests as values."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from llmdrop_vllm import InputError

# vLLM's CPU kernels want more than a few prompt tokens, and fewer outputs than this are all overhead.
MIN_PROMPT_TOKENS, MIN_OUTPUT_TOKENS = 16, 8


@dataclass(frozen=True)
class Workload:
    """`batch` requests that come at once; all prompts begin with the same `shared_prefix_tokens`."""

    name: str
    batch: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0

    @property
    def tokens_per_sequence(self) -> int:
        """KV cache that a finished request needs."""
        return self.prompt_tokens + self.output_tokens

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens to compute where a shared prefix is computed once."""
        return self.shared_prefix_tokens + self.batch * (self.prompt_tokens - self.shared_prefix_tokens)

    @property
    def label(self) -> str:
        """For people: `paper, 8 x (2048 + 2048)`."""
        prefix = f", {self.shared_prefix_tokens} shared" if self.shared_prefix_tokens else ""
        return f"{self.name}, {self.batch} x ({self.prompt_tokens} + {self.output_tokens}){prefix}"

    def scaled(self, factor: float) -> "Workload":
        """Fewer tokens in the same proportions, as far as the floors allow."""
        if not 0 < factor <= 1:
            raise InputError(f"--scale {factor}: expected a number above 0 and not above 1")
        prompt = max(MIN_PROMPT_TOKENS, round(self.prompt_tokens * factor))
        output = max(MIN_OUTPUT_TOKENS, round(self.output_tokens * factor))
        prefix = min(prompt // 2, round(self.shared_prefix_tokens * factor)) if self.shared_prefix_tokens else 0
        return replace(self, prompt_tokens=prompt, output_tokens=output, shared_prefix_tokens=prefix)

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids; another seed shares nothing with what a prefix cache may have kept."""
        generator = np.random.default_rng(seed)
        prefix = generator.integers(3, vocab_size, self.shared_prefix_tokens).tolist()
        own = self.prompt_tokens - self.shared_prefix_tokens
        return [prefix + generator.integers(3, vocab_size, own).tolist() for _ in range(self.batch)]


PAPER = Workload("paper", 1, 2048, 2048)
WORKLOADS = (
    PAPER,
    replace(PAPER, batch=8),
    replace(PAPER, batch=32),
    Workload("prefill-heavy", 8, 4096, 128),
    Workload("decode-heavy", 32, 256, 2048),
    Workload("long-context", 4, 16384, 256),
    Workload("chats", 64, 1024, 256, shared_prefix_tokens=768),
)


def as_many_as_fit(kv_tokens: int, scale: float) -> Workload:
    """The paper's requests, as many as a KV cache of this size holds."""
    one = replace(PAPER, name="as many as fit").scaled(scale)
    return replace(one, batch=max(1, kv_tokens // one.tokens_per_sequence))


def at_contexts(tokens: Iterable[int]) -> tuple[Workload, ...]:
    """Decoding at these contexts, and little else."""
    return tuple(Workload("context", 4, each, 32) for each in tokens)


def chosen(names: str | None) -> tuple[Workload, ...]:
    """Workloads by comma-separated names, all by default."""
    if names is None:
        return WORKLOADS
    known = dict.fromkeys(workload.name for workload in WORKLOADS)
    if unknown := [name for name in names.split(",") if name not in known]:
        raise InputError(f"unknown workload {unknown[0]!r}; known: {', '.join(known)}")
    return tuple(workload for workload in WORKLOADS if workload.name in names.split(","))
