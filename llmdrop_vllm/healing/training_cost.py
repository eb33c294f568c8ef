"""What training takes, told before it begins: memory, and about how long."""

from dataclasses import dataclass

import torch

from llmdrop_vllm.healing.cost import flops_per_second
from llmdrop_vllm.healing.distill import TrainOptions, multiplies_in_bfloat16, sequences_per_step, trained_names
from llmdrop_vllm.healing.run import Run
from llmdrop_vllm.hf import decoder_layers

# A float32 weight, its gradient and AdamW's two moments; what a layer keeps for its gradients, in numbers for each that
# its projections give, more where adapters stand beside them (measured); a position's logits, those of them that count,
# and the gradients of both.
TRAINED_BYTES, NUMBERS_PER_OUTPUT, WITH_ADAPTERS, LOGIT_COPIES = 16, 2, 3, 4


@dataclass(frozen=True)
class TrainingCost:
    """Of the teacher's pass and all epochs: floating-point operations, and the memory that a step has at once."""

    flops: float
    memory_bytes: int
    width: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return torch.bfloat16 if multiplies_in_bfloat16(self.device) else torch.float32

    @property
    def seconds(self) -> float:
        """By how fast a product of matrices is here: right to a factor of two or so."""
        return self.flops / flops_per_second(max(self.width, 256), self.device, self.dtype)


def training_cost(run: Run, options: TrainOptions) -> TrainingCost:
    """Of a student whose every epoch is run to its end."""
    stream, batches, held_out = run.streams.student, run.streams.batches, run.streams.held_out
    model, mask = stream.model, run.mask
    layers = list(decoder_layers(model, mask.num_hidden_layers))[min((*mask.attention, *mask.mlp)) :]
    whole, behind = model.num_parameters(), sum(each.numel() for layer in layers for each in layer.parameters())
    shapes = [model.get_parameter(name).shape for name in trained_names(model, run.family, mask, options)]
    if options.rank is None:
        trained = sum(shape.numel() for shape in shapes)
    else:
        trained = sum(shape[:-2].numel() * options.rank * sum(shape[-2:]) for shape in shapes if len(shape) > 1)
    pairs = [(len(each), judges) for each, judges in zip(batches.sequences, held_out, strict=True)]
    lengths = [length for length, judges in pairs if not judges]
    learnt, judged = sum(lengths), sum(length for length, judges in pairs if judges)
    # Forward through everything, back to the first drop, and the gradients of what is trained.
    step = 2.0 * (2 * whole - (model.num_parameters(exclude_embeddings=True) - behind) + trained)
    checks = 2.0 * whole * judged * options.checks
    teacher = 2.0 * whole * (learnt + judged)
    itemsize = 2 if multiplies_in_bfloat16(stream.device) else 4
    outputs = (NUMBERS_PER_OUTPUT if options.rank is None else WITH_ADAPTERS) * behind // stream.hidden_size
    at_once = sum(sorted(lengths)[-sequences_per_step(lengths, options) :])  # the longest are together
    vocabulary = model.get_output_embeddings().weight.shape[0]
    memory = whole * itemsize + trained * TRAINED_BYTES
    memory += at_once * (outputs + LOGIT_COPIES * vocabulary) * itemsize
    return TrainingCost(
        teacher + options.epochs * (learnt * step + checks), int(memory), stream.hidden_size, stream.device
    )
