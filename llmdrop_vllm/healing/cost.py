"""What healing takes, told before it begins: memory, disk, and about how long."""

import time
from dataclasses import dataclass

import torch

from llmdrop_vllm.architectures.family import Sublayer
from llmdrop_vllm.healing.outputs import output_parameters, projection
from llmdrop_vllm.healing.ridge import solved_in
from llmdrop_vllm.scoring.batches import Batches
from llmdrop_vllm.scoring.layers import LayerStream

# So many values of lambda are tried, as a rule, before the held-out error rises again; so many times a descent takes
# all tokens forward and back.
FACTORIZATIONS, DESCENT_PASSES = 6, 60
# What an MLP and its sums have at once of each token of a chunk, in numbers per column.
NUMBERS_PER_COLUMN = 6
PROBE_TOKENS, PROBE_SECONDS = 1024, 0.1


@dataclass(frozen=True)
class Cost:
    """`layer_flops` are of forward passes in the streams' dtype, `sum_flops` of sums and solutions in float32.

    `columns` and `outputs` are of the largest projection that is refitted in closed form; 0 where none is.
    """

    layer_flops: float
    sum_flops: float
    layer_bytes: int
    columns: int
    outputs: int
    hidden_size: int
    tokens_at_once: int

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other."""
        return Cost(
            self.layer_flops + other.layer_flops,
            self.sum_flops + other.sum_flops,
            max(self.layer_bytes, other.layer_bytes),
            *max((self.columns, self.outputs), (other.columns, other.outputs)),
            self.hidden_size,
            max(self.tokens_at_once, other.tokens_at_once),
        )

    @property
    def memory_bytes(self) -> int:
        """Two layers, a chunk on its way, the sums of what learns and what judges, and a solution with its factor."""
        sums = 2 * (self.columns**2 + self.columns * self.outputs) * 4
        solution = 2 * (self.columns**2 + self.columns * self.outputs) * solved_in(self.columns).itemsize
        chunk = NUMBERS_PER_COLUMN * self.tokens_at_once * max(self.columns, self.hidden_size) * 4
        return 2 * self.layer_bytes + chunk + sums + solution

    def seconds(self, device: torch.device, dtype: torch.dtype) -> float:
        """By how fast a product of matrices is here: right to a factor of two or so."""
        width = max(self.hidden_size, 256)
        found = 0.0
        for flops, kind in ((self.layer_flops, dtype), (self.sum_flops, torch.float32)):
            found += flops / flops_per_second(width, device, kind) if flops else 0.0
        return found


def layer_cost(stream: LayerStream, index: int, passes: int, batches: Batches, refits: Sublayer | None) -> Cost:
    """Of a step that takes all tokens through a layer so many times, and refits the end of one of its sublayers."""
    tokens, at_once = batches.tokens, max(each.batch * each.tokens for each in batches.chunks)
    layer = stream.layers[index]
    parameters = sum(each.numel() for each in layer.parameters())
    single = None
    if refits is not None:
        found = output_parameters(stream, index, refits)
        single = projection(layer, found)
        if single is None and found:
            passes += DESCENT_PASSES
    columns, outputs = (single.columns, single.weight.shape[1]) if single else (0, 0)
    sums = 2 * tokens * columns * (columns + outputs)
    solutions = FACTORIZATIONS * columns**2 * (columns / 3 + 2 * outputs)
    layer_bytes = sum(each.numel() * each.element_size() for each in layer.parameters())
    flops = 2.0 * passes * parameters * tokens
    return Cost(flops, sums + solutions, layer_bytes, columns, outputs, stream.hidden_size, at_once)


def flops_per_second(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of products of matrices on this machine, in a moment's measurement."""
    one, other = (torch.ones(size, device=device, dtype=dtype) for size in ((PROBE_TOKENS, width), (width, 4 * width)))

    def multiply() -> None:
        float((one @ other)[0, 0])  # waits for a GPU

    multiply()  # the first makes ready
    begin, done = time.monotonic(), 0
    while (spent := time.monotonic() - begin) < PROBE_SECONDS:
        multiply()
        done += 1
    return 2 * len(one) * other.numel() * done / spent
