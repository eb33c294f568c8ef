"""Recurrent mixers on a CPU: plain PyTorch for kernels that vLLM's build for CPUs lacks or has in bfloat16 only.

Each replaces a kernel, and nothing of how a layer calls it or keeps its states.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import normalize, silu, softplus
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba import mamba_mixer
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.utils.torch_utils import _resolve_layer_name


@contextmanager
def kernels() -> Iterator[None]:
    """Within this context all hybrids compute what they would on a GPU, in float32."""
    gdn_attention.register_cpu_gdn_attention_ops()
    with ExitStack() as patches:
        enter = patches.enter_context
        enter(patch.object(torch.ops.vllm, "cpu_gdn_attention_core", gated_delta_net))
        enter(
            patch.multiple(mamba_mixer, selective_scan_fn=selective_scan, selective_state_update=selective_state_update)
        )
        # The one for CPUs takes [tokens, heads, size], as LFM2 calls it, for one head.
        enter(patch.object(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native))
        yield


def gated_delta_net(qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor, layer_name: Any) -> None:
    """qkv: [tokens, channels]; b, a: [tokens, value heads]; out: [tokens, value heads, size] (arXiv 2412.06464)."""
    context = get_forward_context()
    if context.attn_metadata is None:
        return
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    metadata: Any = context.attn_metadata[layer.prefix]
    begins = metadata.non_spec_query_start_loc.tolist()
    known = metadata.has_initial_state
    for request, (begin, end) in enumerate(pairwise(begins)):
        slot = int(metadata.non_spec_state_indices_tensor[request])
        past, state = layer.kv_cache[0][slot], layer.kv_cache[1][slot]  # [kernel - 1, channels], [heads, value, key]
        if known is not None and not known[request]:
            past.zero_()
            state.zero_()
        q, k, v = (each[0] for each in layer.rearrange_mixed_qkv(_convolved(layer.conv1d, qkv[begin:end], past)))
        q, k = (normalize(each, dim=-1).repeat_interleave(v.shape[1] // q.shape[1], 1) for each in (q, k))
        decay = (-layer.A_log.exp() * softplus(a[begin:end] + layer.dt_bias)).exp()
        for token in range(end - begin):
            state *= decay[token, :, None, None]
            error = v[token] - torch.einsum("hvk,hk->hv", state, k[token])
            state += torch.einsum("hv,hk->hvk", error * b[begin + token].sigmoid()[:, None], k[token])
            out[begin + token] = torch.einsum("hvk,hk->hv", state, q[token]) * q.shape[-1] ** -0.5


gated_delta_net._qualified_op_name = "vllm::cpu_gdn_attention_core"  # as vLLM's compilation knows operators


def _convolved(convolution: nn.Module, tokens: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """Causal, over each channel alone; `past` becomes what the next tokens will need."""
    weight = convolution.weight.flatten(1)
    inputs = torch.cat([past, tokens])
    past.copy_(inputs[len(inputs) - len(past) :])
    return silu((inputs.unfold(0, weight.shape[1], 1) * weight).sum(-1))


def selective_scan(
    u: torch.Tensor,
    states: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Mamba's (arXiv 2312.00752). u, delta, gate: [channels, tokens]; b, c: [state, tokens]; a: [channels, state]."""
    out = torch.empty_like(u)
    for request, (begin, end) in enumerate(pairwise(options["query_start_loc"].tolist())):
        state = states[int(options["cache_indices"].flatten()[request])]
        if not options["has_initial_state"][request]:
            state.zero_()
        for token in range(begin, end):
            out[:, token] = _scanned(state, u[:, token], softplus(delta[:, token] + bias), a, b[:, token], c[:, token])
    return (out + u * d[:, None]) * silu(gate)


def selective_state_update(
    states: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    bias: torch.Tensor,
    **options: Any,
) -> None:
    """The same for one token of each request. u, delta: [requests, channels]; b, c: [requests, state]."""
    for request, slot in enumerate(options["state_batch_indices"].flatten().tolist()):
        scanned = _scanned(states[slot], u[request], softplus(delta[request] + bias), a, b[request], c[request])
        options["out"][request] = (scanned + u[request] * d) * silu(options["z"][request])


def _scanned(
    state: torch.Tensor, u: torch.Tensor, step: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """What comes of one token, [channels]; `state` becomes the next one's."""
    state.copy_(state * (step[:, None] * a).exp() + (step * u)[:, None] * b)
    return state @ c
