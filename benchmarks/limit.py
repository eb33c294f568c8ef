"""The limit: floating-point operations and bytes moved per step, from config and mask alone, against two ceilings.

A step is one forward pass. Each of its parts (attention projections, attention itself, MLPs, output head) takes the
longer of: its bytes at the machine's read bandwidth, its operations at the machine's matmul rate. No overhead, no
activations: weights and KV cache are read once per step. Measured times are longer; speedups should come close.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.shapes import Shape
from benchmarks.workloads import Workload
from llmdrop_vllm import DropMask
from llmdrop_vllm.kv_cache.kinds import LayerKind, dtype_bytes, layer_kinds

CONTEXT_SAMPLES = 8


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, as measured."""

    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Work:
    """What one part of a step must do."""

    flops: float
    bytes_moved: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Whichever ceiling is reached later."""
        return max(self.flops / ceilings.flops_per_s, self.bytes_moved / ceilings.read_bytes_per_s)


@dataclass(frozen=True)
class Step:
    """One forward pass over `sequences`, each with `new_tokens` that see `visible_tokens` on average."""

    sequences: float
    new_tokens: float
    visible_tokens: float

    @property
    def tokens(self) -> float:
        """Tokens in the pass."""
        return self.sequences * self.new_tokens


@dataclass(frozen=True)
class Model:
    """The sizes that cost time. Values are weights, `kinds` the remaining attention layers per kind of KV cache."""

    attention_values: int
    mlp_values: int
    head_values: int
    embedding_values: int
    attention_layers: int
    mlp_layers: int
    kinds: tuple[tuple[LayerKind, int], ...]
    query_width: int
    experts: int
    experts_per_token: int
    itemsize: int

    @classmethod
    def of(cls, shape: Shape, mask: DropMask, dtype: str) -> "Model":
        """A shape without the sublayers that the mask drops; KV cache in the same dtype."""
        config, layer = shape.config, "model.layers.0."
        values = {name: math.prod(size) for name, size in shape.tensors().items()}
        attention, mlp = (
            sum(count for name, count in values.items() if name.startswith(tuple(f"{layer}{n}." for n in part.names)))
            for part in (shape.family.attention, shape.family.mlp)
        )
        kinds = layer_kinds(config)
        embedding = values["model.embed_tokens.weight"]
        return cls(
            attention_values=attention,
            mlp_values=mlp,
            head_values=values.get("lm_head.weight", embedding),
            embedding_values=embedding if "lm_head.weight" in values else 0,
            attention_layers=len(mask.kept_attention),
            mlp_layers=shape.num_layers - len(mask.mlp),
            kinds=tuple(Counter(kinds[index] for index in mask.kept_attention).items()),
            query_width=config["num_attention_heads"] * config["head_dim"],
            experts=config.get("num_local_experts", 1),
            experts_per_token=config.get("num_experts_per_tok", 1),
            itemsize=dtype_bytes(dtype),
        )

    @property
    def num_parameters(self) -> int:
        """All that is left, but for the last norm."""
        layers = self.attention_layers * self.attention_values + self.mlp_layers * self.mlp_values
        return layers + self.head_values + self.embedding_values

    @property
    def weight_bytes(self) -> int:
        """Memory for the weights."""
        return self.num_parameters * self.itemsize

    def parts(self, step: Step) -> Iterator[Work]:
        """Attention projections, attention per kind of layer, MLPs, output head."""
        yield self._dense(self.attention_values * self.attention_layers, step.tokens)
        for kind, layers in self.kinds:
            yield self._attention(kind, layers, step)
        yield self._mlps(step.tokens)
        yield self._dense(self.head_values, step.sequences)

    def _dense(self, values: float, tokens: float) -> Work:
        return Work(2 * values * tokens, values * self.itemsize)

    def _mlps(self, tokens: float) -> Work:
        """Of a mixture each token computes `experts_per_token`; a step reads all that any token chose."""
        read = 1 - (1 - self.experts_per_token / self.experts) ** tokens
        values = self.mlp_values * self.mlp_layers
        return Work(2 * values * tokens * self.experts_per_token / self.experts, values * read * self.itemsize)

    def _attention(self, kind: LayerKind, layers: int, step: Step) -> Work:
        """Scores and weighted sum are a multiplication and an addition each, per query value and visible token."""
        visible = min(step.visible_tokens, kind.span or math.inf)
        flops = 4 * self.query_width * visible * step.tokens * layers
        return Work(flops, kind.values * self.itemsize * visible * step.sequences * layers)

    def step_bytes(self, step: Step) -> float:
        """Everything that a step reads."""
        return sum(work.bytes_moved for work in self.parts(step))

    def step_seconds(self, step: Step, ceilings: Ceilings) -> float:
        """The parts of a step come one after the other."""
        return sum(work.seconds(ceilings) for work in self.parts(step))


@dataclass(frozen=True)
class Prediction:
    """Shortest possible seconds for a workload."""

    prefill_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """Both, one after the other."""
        return self.prefill_s + self.decode_s


def predict(
    model: Model, workload: Workload, ceilings: Ceilings, *, max_step_tokens: int, kv_tokens: float = math.inf
) -> Prediction:
    """A workload in as many waves as its sequences need to fit into `kv_tokens` of KV cache."""
    fits = max(1, int(min(workload.batch, kv_tokens // workload.tokens_per_sequence)))
    waves = [fits] * (workload.batch // fits) + [workload.batch % fits] * (workload.batch % fits > 0)
    prefill = _prefill_s(model, workload, ceilings, max_step_tokens)
    return Prediction(prefill, sum(_decode_s(model, workload, ceilings, wave) for wave in waves))


def _prefill_s(model: Model, workload: Workload, ceilings: Ceilings, max_step_tokens: int) -> float:
    """Prompts, a shared prefix once, in steps of at most `max_step_tokens`; a token sees half of its prompt."""
    tokens = workload.prefill_tokens
    steps = math.ceil(tokens / max_step_tokens)
    sequences = max(1.0, workload.batch / steps)
    visible = (workload.shared_prefix_tokens + workload.prompt_tokens) / 2
    return steps * model.step_seconds(Step(sequences, tokens / steps / sequences, visible), ceilings)


def _decode_s(model: Model, workload: Workload, ceilings: Ceilings, sequences: int) -> float:
    """The first token comes from the prefill; step time is averaged over contexts spread through the generation."""
    steps = workload.output_tokens - 1
    contexts = [workload.prompt_tokens + steps * (2 * i + 1) / (2 * CONTEXT_SAMPLES) for i in range(CONTEXT_SAMPLES)]
    return steps * statistics.mean(model.step_seconds(Step(sequences, 1, each), ceilings) for each in contexts)


def measure_ceilings(dtype: str, device: str = "cpu", seconds: float = 2.0) -> Ceilings:
    """The machine's read bandwidth and its matmul rate in this dtype: the best of what `seconds` allow for each."""
    import torch

    kind = getattr(torch, dtype)
    # Larger than any cache; a GPU needs more to be busy.
    values = torch.ones((1 << 30 if device == "cuda" else 1 << 28) // kind.itemsize, dtype=kind, device=device)
    side = 8192 if device == "cuda" else 1536
    square = torch.ones(side, side, dtype=kind, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    read_s = _best_s(lambda: values.view(torch.int32).amax(), wait, seconds)
    matmul_s = _best_s(lambda: square @ square, wait, seconds)
    return Ceilings(values.numel() * kind.itemsize / read_s, 2 * side**3 / matmul_s)


def _best_s(work: Callable[[], object], wait: Callable[[], object], seconds: float) -> float:
    work()
    wait()
    best, deadline = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
