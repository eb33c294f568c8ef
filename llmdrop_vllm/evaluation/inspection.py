"""What a mask saves in a checkpoint: parameters, bytes of weights, KV cache and the requests that fit."""

from collections.abc import Collection, Mapping

from transformers import PreTrainedModel

from llmdrop_vllm.architectures.names import layer_in
from llmdrop_vllm.artifacts import Record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint, MaskedCheckpoint
from llmdrop_vllm.checkpoints.hf_weights import checkpoint_tensors, read_tensor
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.healing.records import Healing, healing_of
from llmdrop_vllm.hf import on_meta, transformers_config
from llmdrop_vllm.kv_cache.kinds import dtype_bytes
from llmdrop_vllm.kv_cache.layout import KVLayout
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing.validation import checked_config

LONGEST_REQUEST = 8192
# vLLM computes so many tokens of prompts together, and a window keeps them until they are done; and so many may do.
IN_FLIGHT_TOKENS, SMALL_CHUNK_TOKENS = 2048, 512
# Beyond it 8-bit floats (E4M3) are 8 and more apart. In Qwen2.5-Coder-1.5B, whose layers 0 and 1 have such biases, keys
# rounded there take perplexity from 13.2 to 34; of the layers that stay below, from 13.23 to 13.24.
COARSE = 64.0


class Footprint(Record):
    """A model's size. `attention_layers` are what a mask calls so, `recurrent_layers` those of them that keep a state.
    `kv_bytes_per_token` is as vLLM stores it, padding included, before a window has passed a token; tokens are what
    fits beside the weights in `Inspection.memory_bytes`, in whole blocks. `request_bytes` is what vLLM keeps ready for
    a request of `Inspection.context` tokens; of those, `requests` fit.
    """

    parameters: int
    weight_bytes: int
    attention_layers: int
    recurrent_layers: int
    kv_bytes_per_token: int
    kv_tokens: int
    request_bytes: int
    requests: int


class Inspection(Record):
    """A checkpoint with and without its mask. `stripped`: the dropped weights are gone from the files; `healing`: what
    was done to those that are left. `coarse_keys`: layers whose keys have a bias beyond COARSE, and how large it is,
    where they are stored in 8-bit floats. Requests are those that fit while `chunk` tokens of prompts are computed
    together; `requests_in_small_chunks`, with SMALL_CHUNK_TOKENS.
    """

    model: str
    architecture: str
    dialects: tuple[str, ...]
    mask: DropMask
    summary: str
    stripped: bool
    disk_bytes: int
    memory_bytes: int
    context: int
    chunk: int
    requests_in_small_chunks: int
    kv_dtype: str
    kv_layout: str
    coarse_keys: dict[int, float]
    full: Footprint
    dropped: Footprint
    healing: Healing | None

    @property
    def notes(self) -> list[str]:
        """For people: that vLLM does not serve float32 by itself, which keys 8-bit floats are too coarse for, and what
        windows hold beside their own tokens.
        """
        said = []
        if self.kv_dtype == "float32":
            half = "without it vLLM holds weights and KV cache in half the bytes"
            said.append(f"counted in float32, for --dtype float32; {half}")
        if self.coarse_keys:
            layers, most = " ".join(map(str, self.coarse_keys)), max(self.coarse_keys.values())
            told = f"keys of layers {layers} have biases of up to {most:.0f}, which 8-bit floats are too coarse for"
            said.append(f"{told}: serve with --kv-cache-dtype-skip-layers {layers}")
        if self.mask.windows:
            said.append(f"counted with chunks of {self.chunk:,} tokens of prompts, which windows hold too")
            if self.requests_in_small_chunks > self.dropped.requests:
                fewer = f"with --max-num-batched-tokens {SMALL_CHUNK_TOKENS}, which prefills more slowly"
                said[-1] += f"; {fewer}, {self.requests_in_small_chunks:,} requests fit"
        return said

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: what, full, dropped, dropped as a share of full."""
        states = self.full.recurrent_layers > 0
        names = {
            "parameters": "parameters",
            "weight_bytes": "weights, bytes",
            "attention_layers": "mixers, attention or recurrent" if states else "attention layers",
            **({"recurrent_layers": "recurrent mixers"} if states else {}),
            "kv_bytes_per_token": f"KV cache, bytes per token ({self.kv_dtype})",
            "request_bytes": f"KV cache{' and states' * states}, bytes of a request of {self.context:,} tokens",
            "kv_tokens": f"tokens in {self.memory_bytes / 2**30:g} GiB beside the weights",
            "requests": f"requests of {self.context:,} tokens there",
        }
        table = []
        for name, title in names.items():
            full, dropped = getattr(self.full, name), getattr(self.dropped, name)
            table.append((title, f"{full:,}", f"{dropped:,}", f"{dropped / full:.0%}" if full else "-"))
        return table


def inspect_checkpoint(
    checkpoint: Checkpoint,
    mask: DropMask | None = None,
    *,
    memory_bytes: int,
    kv_dtype: str | None = None,
    kv_wide: Collection[int] = (),
    context: int | None = None,
    chunk: int | None = None,
) -> Inspection:
    """Account for a checkpoint and a mask, by default its own; keys and values have vLLM's dtype for them unless one is
    asked, and in the layers of `kv_wide` the model's own in any case (vLLM's `--kv-cache-dtype-skip-layers`).

    `context` is how long the requests are that should fit: by default as long as the model takes, up to 8,192 tokens.
    Raises InputError for longer ones, CheckpointError for what cannot be served: of that no figures are given.
    """
    masked, whole = (checkpoint.under(each) for each in (mask or checkpoint.mask, checkpoint.decoder.whole))
    context, chunk = request_context(checkpoint, context), chunk or IN_FLIGHT_TOKENS
    masked.check_complete()
    checked_config(masked)
    value_bytes = dtype_bytes(kv_dtype := kv_dtype or checkpoint.kv_dtype)
    both = {each.mask: each for each in (whole, masked)}
    layouts = {mask: _layout(each, kv_wide, value_bytes) for mask, each in both.items()}
    models = {mask: on_meta(transformers_config(each)) for mask, each in both.items()}
    parameters = {mask: int(model.num_parameters()) for mask, model in models.items()}
    gone = _weight_of_gone(checkpoint, models[whole.mask], parameters[masked.mask]) if checkpoint.is_stripped else 0
    weights = {masked.mask: masked.weight_bytes, whole.mask: whole.weight_bytes + gone}

    def footprint(mask: DropMask, chunk: int = chunk) -> Footprint:
        return _footprint(layouts[mask], parameters[mask], weights[mask], memory_bytes, value_bytes, context, chunk)

    return Inspection(
        model=str(checkpoint.directory),
        architecture=checkpoint.architecture,
        dialects=checkpoint.decoder.dialects,
        mask=masked.mask,
        summary=masked.mask.summary(),
        stripped=checkpoint.is_stripped,
        disk_bytes=sum(tensor.num_bytes for tensor in checkpoint.tensors.values()),
        memory_bytes=memory_bytes,
        context=context,
        chunk=chunk,
        requests_in_small_chunks=footprint(masked.mask, SMALL_CHUNK_TOKENS).requests,
        kv_dtype=kv_dtype,
        kv_layout=layouts[masked.mask].describe(),
        coarse_keys=_coarse_keys(masked, kv_wide) if kv_dtype == "fp8" else {},
        full=footprint(whole.mask),
        dropped=footprint(masked.mask),
        healing=healing_of(checkpoint.directory),
    )


def _layout(masked: MaskedCheckpoint, wide: Collection[int], value_bytes: int) -> KVLayout:
    """In numbers of so many bytes, of the model's own dtype in the layers that are stored `wide`."""
    if beyond := [layer for layer in wide if layer >= masked.mask.num_hidden_layers]:
        raise InputError(f"no layer {beyond[0]}: the model has {masked.mask.num_hidden_layers}")
    times = max(1, dtype_bytes(masked.checkpoint.dtype) // value_bytes) if wide else 1
    return masked.checkpoint.decoder.layout(masked.mask, dict.fromkeys(wide, times))


def _coarse_keys(masked: MaskedCheckpoint, wide: Collection[int]) -> dict[int, float]:
    """Biases of keys beyond COARSE, by layer, but for the layers that are stored `wide`."""
    checkpoint, mask = masked.checkpoint, masked.mask
    kept = DropMask(mask.num_hidden_layers, attention=tuple({*mask.kept_attention}.difference(wide)))
    found = {
        layer: read_tensor(stored).abs().max().item()
        for name, stored in checkpoint.tensors.items()
        if name.endswith("k_proj.bias")
        and in_dropped_sublayer(name, checkpoint.family, kept)
        and (layer := layer_in(name)) is not None
    }
    return {layer: size for layer, size in sorted(found.items()) if size > COARSE}


def _weight_of_gone(checkpoint: Checkpoint, whole: PreTrainedModel, all_left: int) -> int:
    """Bytes of what a stripped checkpoint lacks: parameter for parameter as the sublayers of the same kind that are
    left, which may be packed where embeddings are not; where none is, as all parameters that are left.
    """
    own, family = checkpoint.mask, checkpoint.family
    depth = own.num_hidden_layers
    every, found = tuple(range(depth)), 0.0
    parameters = {name: each.numel() for name, each in checkpoint_tensors(whole).items()}
    num_bytes = {name: each.num_bytes for name, each in checkpoint.tensors.items()}

    def total(sizes: Mapping[str, int], mask: DropMask) -> int:
        return sum(size for name, size in sizes.items() if in_dropped_sublayer(name, family, mask))

    for kind, gone in (
        (DropMask(depth, attention=every), DropMask(depth, attention=own.attention)),
        (DropMask(depth, mlp=every), DropMask(depth, mlp=own.mlp)),
    ):
        lost, stored = total(parameters, gone), total(num_bytes, kind)
        left = total(parameters, kind) - lost
        found += lost * (stored / left if left else sum(num_bytes.values()) / all_left)
    return round(found)


def _footprint(
    layout: KVLayout, parameters: int, weights: int, memory_bytes: int, value_bytes: int, context: int, chunk: int
) -> Footprint:
    free_bytes, request_bytes = max(0, memory_bytes - weights), layout.request_bytes(context, chunk, value_bytes)
    block_bytes = layout.token_values * value_bytes * layout.block_tokens
    return Footprint(
        parameters=parameters,
        weight_bytes=weights,
        attention_layers=layout.layers,
        recurrent_layers=layout.recurrent_layers,
        kv_bytes_per_token=layout.token_bytes(value_bytes),
        kv_tokens=int(free_bytes // block_bytes) * layout.block_tokens,
        request_bytes=request_bytes,
        requests=free_bytes // request_bytes,
    )


def request_context(checkpoint: Checkpoint, asked: int | None) -> int:
    """How long requests are: as asked, or as long as the model takes, up to 8,192 tokens. Raises InputError for longer
    ones.
    """
    most = checkpoint.context
    if asked is None:
        return min(most or LONGEST_REQUEST, LONGEST_REQUEST)
    if asked < 1 or (most is not None and asked > most):
        raise InputError(f"requests of {asked} tokens asked; expected 1 to {most or 'any number'}, the model's context")
    return asked
