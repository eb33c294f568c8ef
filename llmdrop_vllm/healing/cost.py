"""What healing and training take, told before they begin: memory, and about how long."""

from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from llmdrop_vllm.healing.distill import TrainOptions, multiplies_in_bfloat16, sequences_per_step, trained_names
from llmdrop_vllm.healing.outputs import output_parameters, projection
from llmdrop_vllm.healing.ridge import solved_in
from llmdrop_vllm.healing.run import Run
from llmdrop_vllm.hf import decoder_layers

# So many values of lambda are tried, as a rule, before the held-out error rises again; so many times a descent takes
# all tokens forward and back.
FACTORIZATIONS, DESCENT_PASSES = 6, 60
# What an MLP and its sums have at once of each token of a chunk, in numbers per column.
NUMBERS_PER_COLUMN = 6
# A float32 weight, its gradient and AdamW's two moments; what a layer keeps for its gradients, in numbers for each that
# its projections give, more where adapters stand beside them (measured); a position's logits, those of them that count,
# and the gradients of both.
TRAINED_BYTES, NUMBERS_PER_OUTPUT, WITH_ADAPTERS, LOGIT_COPIES = 16, 2, 3, 4
PROBE_TOKENS, PROBE_SECONDS = 1024, 0.1


@dataclass(frozen=True)
class Cost:
    """`flops` are of passes through layers in a dtype, `sum_flops` of sums and solutions in float32; `memory_bytes` are
    needed at once. `columns` are of the largest projection that is refitted in closed form; 0 where none is.
    """

    flops: float
    memory_bytes: int
    width: int
    device: torch.device
    dtype: torch.dtype
    sum_flops: float = 0.0
    columns: int = 0

    @property
    def seconds(self) -> float:
        """By how fast a product of matrices is here: right to a factor of two or so."""
        kinds = ((self.flops, self.dtype), (self.sum_flops, torch.float32))
        width = max(self.width, 256)
        return sum(flops / flops_per_second(width, self.device, dtype) for flops, dtype in kinds if flops)


def closed_form_cost(run: Run) -> Cost:
    """Of all steps, one after the other: two layers, a chunk on its way, the sums of what learns and what judges, and a
    solution with its factor.
    """
    stream, batches = run.streams.student, run.streams.batches
    tokens, at_once = batches.tokens, max(each.batch * each.tokens for each in batches.chunks)
    flops = sum_flops = 0.0
    layer_bytes, largest = 0, (0, 0)
    for step in run.steps:
        layer, passes = stream.layers[step.layer], step.passes
        found = {} if step.refits is None else output_parameters(stream, step.layer, step.refits)
        single = projection(layer, found)
        if found and single is None:
            passes += DESCENT_PASSES
        columns, outputs = (single.columns, single.weight.shape[1]) if single else (0, 0)
        sums = 2 * tokens * columns * (columns + outputs)
        sum_flops += sums + FACTORIZATIONS * columns**2 * (columns / 3 + 2 * outputs)
        flops += 2.0 * passes * sum(each.numel() for each in layer.parameters()) * tokens
        layer_bytes = max(layer_bytes, sum(each.numel() * each.element_size() for each in layer.parameters()))
        largest = max(largest, (columns, outputs))
    columns, outputs = largest
    memory = 2 * layer_bytes + NUMBERS_PER_COLUMN * at_once * max(columns, stream.hidden_size) * 4
    memory += 2 * (columns**2 + columns * outputs) * (4 + solved_in(columns).itemsize)
    return Cost(flops, memory, stream.hidden_size, stream.device, stream.dtype, sum_flops, columns)


def training_cost(run: Run, options: TrainOptions) -> Cost:
    """Of the teacher's pass and of a student whose every epoch is run to its end."""
    stream = run.streams.student
    model, dtype = stream.model, torch.bfloat16 if multiplies_in_bfloat16(stream.device) else torch.float32
    layers = decoder_layers(model, run.mask.num_hidden_layers)[run.first_lost :]
    whole, behind = model.num_parameters(), sum(each.numel() for layer in layers for each in layer.parameters())
    shapes = [model.get_parameter(name).shape for name in trained_names(model, run, options)]
    if options.rank is None:
        trained = sum(shape.numel() for shape in shapes)
    else:
        trained = sum(shape[:-2].numel() * options.rank * sum(shape[-2:]) for shape in shapes if len(shape) > 1)
    lengths, judging = run.streams.parted(map(len, run.streams.batches.sequences))
    learnt, judged = sum(lengths), sum(judging)
    # Forward through everything, back to the first drop, and the gradients of what is trained.
    step = 2.0 * (2 * whole - (model.num_parameters(exclude_embeddings=True) - behind) + trained)
    checks = 2.0 * whole * judged * options.checks
    teacher = 2.0 * whole * (learnt + judged)
    outputs = (NUMBERS_PER_OUTPUT if options.rank is None else WITH_ADAPTERS) * behind // stream.hidden_size
    at_once = sum(sorted(lengths)[-sequences_per_step(lengths, options) :])  # the longest are together
    vocabulary = model.get_output_embeddings().weight.shape[0]
    memory = trained * TRAINED_BYTES + (whole + at_once * (outputs + LOGIT_COPIES * vocabulary)) * dtype.itemsize
    flops = teacher + options.epochs * (learnt * step + checks)
    return Cost(flops, int(memory), stream.hidden_size, stream.device, dtype)


def flops_per_second(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of products of matrices on this machine, in a moment's measurement."""
    one, other = (torch.ones(size, device=device, dtype=dtype) for size in ((PROBE_TOKENS, width), (width, 4 * width)))
    timer = Timer("one @ other", globals={"one": one, "other": other}, num_threads=torch.get_num_threads())
    return 2 * len(one) * other.numel() / timer.blocked_autorange(min_run_time=PROBE_SECONDS).median
