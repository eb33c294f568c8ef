"""Importance of every sublayer and block, in one pass over the calibration data.

Importance is 1 - mean over tokens of cos(X, Y): X the residual stream before the sublayer's norm, Y after its output
was added (arXiv 2406.15786). One decoder layer is in memory at a time; all sequences go through it before the next.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from llmdrop_vllm.artifacts import Diagnostics, Provenance, Scores, Similarities, sha256
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.checkpoints.dequantizing import dequantized
from llmdrop_vllm.checkpoints.hf_weights import TORCH_DTYPES
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.errors import CheckpointError, InputError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.attention_probe import PROBED_ATTENTION, AttentionProbe, probing
from llmdrop_vllm.scoring.batches import Batches
from llmdrop_vllm.scoring.layers import LayerStream, first_of
from llmdrop_vllm.scoring.scratch import GapHistory, HiddenStates, Scratch
from llmdrop_vllm.scoring.similarity import ResidualSums

# Similarities across gaps compare every pair of depths, so they are measured on a sample of tokens whose history at all
# depths stays below this size on disk.
MAX_GAP_TOKENS, MAX_GAP_HISTORY_BYTES = 4096, 2**31
SCRATCH_FILES = ("hidden-?.bin", "gaps.bin")
TOKENS_PER_CHUNK = {"cpu": 2048, "cuda": 16384}  # enough to be bound by compute, at hundreds of MiB per layer


def score(
    checkpoint: Checkpoint,
    calibration: Calibration,
    *,
    mask: DropMask | None = None,
    device: str | None = None,
    dtype: str | None = None,
    scratch: Path | None = None,
    progress: bool = False,
) -> Scores:
    """Score a checkpoint without the sublayers of a mask, by default those that its config drops.

    `device` is a CUDA GPU where there is one, `dtype` the checkpoint's. With `scratch`, a directory for the hidden
    states, an interrupted run goes on at the layer that it reached when the same is asked again. Raises CheckpointError
    for weights that cannot be computed with; those that compressed-tensors has quantized are unpacked for it.
    """
    masked = checkpoint.under(checkpoint.mask if mask is None else mask)
    with tempfile.TemporaryDirectory(prefix="llmdrop-") as temporary:
        directory = scratch or Path(temporary) / "scratch"
        run = _Run(masked, calibration, *precision(checkpoint, device, dtype), directory)
        with run.scratch.in_use():
            return run.scores(progress)


class _Run:
    def __init__(
        self, masked: MaskedCheckpoint, data: Calibration, device: torch.device, dtype: torch.dtype, directory: Path
    ) -> None:
        self.checkpoint, self.mask, self.family = masked.checkpoint, masked.mask, masked.checkpoint.family
        self.data = data.identity
        self.kinds = self.checkpoint.decoder.kinds  # asked first: it refuses a config that contradicts itself
        self.batches = Batches(data, TOKENS_PER_CHUNK[device.type])
        self.stream = LayerStream(masked, device=device, dtype=dtype, attention=PROBED_ATTENTION)
        hidden_size, counted = self.stream.hidden_size, self.batches.counted_positions()
        gap_token_bytes = (self.mask.num_hidden_layers + 1) * hidden_size * 4
        count = min(len(counted), MAX_GAP_TOKENS, MAX_GAP_HISTORY_BYTES // gap_token_bytes)
        self.gap_tokens = counted[np.linspace(0, len(counted) - 1, count).round().astype(np.int64)]
        self.hidden = HiddenStates(directory, hidden_size, dtype)
        self.gaps = GapHistory(directory / "gaps.bin", self.gap_tokens, hidden_size)
        needed_bytes = 2 * self.batches.tokens * self.hidden.token_bytes + count * gap_token_bytes
        asked = sha256([self.data.sha256, *self.stream.identity])
        self.scratch = Scratch(directory, asked, needed_bytes, SCRATCH_FILES)

    def scores(self, progress: bool) -> Scores:
        """One pass, or what is left of it."""
        depth = self.mask.num_hidden_layers
        steps = [(f"layer {index} of {depth}", 1, partial(self._layer, index)) for index in range(depth)]
        with torch.inference_mode():
            return self._scores(self.scratch.go_on(steps, len(self.batches.chunks), self._embed, progress=progress))

    def _scores(self, layers: Sequence[dict[str, Any]]) -> Scores:
        depth, (no_attention, no_mlp) = self.mask.num_hidden_layers, self.family.absent(self.mask)

        def column(name: str, dropped: Collection[int]) -> tuple[float | None, ...]:
            return tuple(None if index in dropped else layer["means"][name] for index, layer in enumerate(layers))

        def sublayer(kind: str, dropped: Collection[int]) -> dict[str, tuple[float | None, ...]]:
            fields = {"magnitude_ratio": "ratio", "token_cosine_before": "before", "token_cosine_after": "after"}
            return {field: column(f"{kind}_{name}", dropped) for field, name in fields.items()}

        probed = [layer["probe"] or (None, None) for layer in layers]
        concentration, first_token = zip(*probed, strict=True)
        attention = sublayer("attention", no_attention) | {"concentration": concentration, "first_token": first_token}
        diagnostics = {"attention": attention, "mlp": sublayer("mlp", no_mlp)}
        by_depth = [history for layer in layers for history in layer["history"]]
        block = tuple(layer["means"]["block"] for layer in layers)
        by_gap = ((block[i], *(by_depth[end][i] for end in range(i + 2, depth + 1))) for i in range(depth))
        dtype, device = self.stream.dtype, self.stream.device
        similarity = Similarities(attention=column("attention", no_attention), mlp=column("mlp", no_mlp), block=block)
        return Scores(
            num_hidden_layers=depth,
            similarity=similarity,
            block_similarity_by_gap=tuple(by_gap),
            gap_tokens=len(self.gap_tokens),
            diagnostics=Diagnostics.model_validate(diagnostics, strict=False),
            kv_groups=tuple(map(str, self.kinds)),
            kv_values=tuple(kind.values for kind in self.kinds),
            dropped=self.mask,
            provenance=Provenance.of(self.checkpoint, data=self.data, dtype=dtype, device=device),
        )

    def _embed(self, begins: bool) -> None:
        self.stream.embed(self.batches, self.hidden if begins else None)

    def _layer(self, index: int, bar: "tqdm[Any]") -> dict[str, Any]:
        sums, last = ResidualSums(), index == self.mask.num_hidden_layers - 1
        with (
            self.stream.layer(index) as layer,
            probing(AttentionProbe()) as probe,
            self._inside(layer, index) as inside,
        ):
            for chunk in self.batches.chunks:
                x = self.hidden.read(index, chunk).to(self.stream.device)
                spans = self.batches.spans(chunk)
                probe.tokens = min(span.stop for span in spans)
                z = self.stream.through(layer, index, chunk, x)
                sums.add([x, *inside(x, z)], spans)
                self.gaps.put(index, chunk.first_token, x.flatten(0, 1))
                if last:
                    self.gaps.put(index + 1, chunk.first_token, z.flatten(0, 1))
                else:
                    self.hidden.write(index + 1, chunk, z)
                bar.update()
        means = sums.means()
        if not all(map(math.isfinite, means.values())):
            raise CheckpointError(
                f"layer {index} of {self.checkpoint.directory} gives hidden states that are not finite in "
                f"{self.stream.dtype}; its weights are damaged or need a wider dtype"
            )
        # The similarity to depths before this one; the last layer also stands for the depth after it.
        history = [self.gaps.similarities(depth) for depth in (index, index + 1)[: 1 + last]]
        return {"means": means, "probe": probe.means(), "history": history}

    @contextmanager
    def _inside(
        self, layer: nn.Module, index: int
    ) -> Iterator[Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]]:
        """Within this context, the function given tells the streams inside the layer that just made its output of an
        input, and behind its sublayers.

        They are the stream between attention and MLP, which the MLP's norm or the MLP itself is called with; where both
        run side by side, the input with what each of them adds. Behind them is the output, or what there was of it
        before the layer added something else.
        """
        added: list[torch.Tensor] = []
        attention, mlp = self.family.mixer(index), self.family.mlp_of(index)
        if attention is None or mlp is None:  # the stream is the same before what the layer lacks and behind it
            yield lambda x, z: [x if attention is None else z, z]
            return

        def add_output(_: nn.Module, args: Any, output: Any) -> None:
            added.append(first_of(output).clone())  # for Falcon's layer adds attention's output to the MLP's in place

        if self.family.parallel:
            modules = [getattr(layer, each.transformers_module) for each in (attention, mlp)]
            handles = [each.register_forward_hook(add_output) for each in modules]
        else:
            module = getattr(layer, name := mlp.pre_norm or mlp.transformers_module)
            if module is None:
                raise CheckpointError(f"{self.checkpoint.directory}: its layers have no {name}; it cannot be scored")
            then = getattr(layer, self.family.then or "", None)
            ends = [module] if then is None else [module, then]
            handles = [each.register_forward_pre_hook(lambda _m, args: added.append(args[0])) for each in ends]

        def streams(x: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
            # OPT's layer gives the MLP's norm all tokens in one row.
            found = [x + each if self.family.parallel else each.view_as(x) for each in added]
            added.clear()
            return found if len(found) == 2 and not self.family.parallel else [*found, z]

        try:
            yield streams
        finally:
            for handle in handles:
                handle.remove()


def precision(checkpoint: Checkpoint, device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """What `score` computes on and in. Raises InputError for what cannot be had here."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    here = ["cuda", *gpus, "cpu"] if torch.cuda.is_available() else ["cpu"]
    if device is not None and device not in here:
        raise InputError(f"device is {device!r}; here is {', '.join(here)}")
    where = torch.device(device or here[0])
    return where, _dtype(dtype, checkpoint, where)


def _dtype(name: str | None, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if name is not None:
        dtype = getattr(torch, name, None)
        if dtype not in TORCH_DTYPES.values():
            raise InputError(f"dtype is {name!r}; expected float32, bfloat16 or float16")
        return dtype
    largest = max(dequantized(checkpoint).tensors.values(), key=lambda tensor: tensor.num_bytes, default=None)
    if largest is None or largest.dtype not in TORCH_DTYPES:
        found = f"{largest.name} of dtype {largest.dtype}" if largest else "no tensors"
        raise CheckpointError(f"{checkpoint.directory} holds {found}; expected {', '.join(TORCH_DTYPES)}")
    stored = TORCH_DTYPES[largest.dtype]
    # CPUs compute float16 no faster than float32.
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored
