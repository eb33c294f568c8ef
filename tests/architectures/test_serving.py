"""Every architecture with a tiny model: served by vLLM with a mask, it computes what Transformers computes without
the dropped sublayers and with its windows, and its KV cache has room for the remaining attention only.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomGelu
from vllm import LLM

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer
from llmdrop_vllm.evaluation.engine import SWITCHING
from llmdrop_vllm.masks.stretches import STRETCH
from tests.architectures.cases import CASES, LAYERS, model_of
from tests.architectures.kernels import kernels
from tests.architectures.reference import fitting, skipping, windowed
from tests.engines import KV_CACHE_BYTES, engine, greedy

PROMPT = [*range(3, 43)]
LONG = [3 + 7 * place % 251 for place in range(2 * STRETCH + 20)]  # with tokens that a window does not see
MASKS = {
    "attention": DropMask(LAYERS, attention=(3, 1)),
    "MLP": DropMask(LAYERS, mlp=(0, 2)),
    "blocks, first and last layer": DropMask(LAYERS, attention=(4, 0, 2), mlp=(4, 0, 2)),
    "all attention but one": DropMask(LAYERS, attention=(4, 2, 1, 0), mlp=(3,)),
}
BUILT = ("blocks, first and last layer", "all attention but one")
NATS = {"Gemma4ForCausalLM": 2e-4}  # how far float32 may lead apart; for all others 1e-4
# On a CPU with AMX vLLM would take a backend for MLA that knows no float32.
FLOAT32 = {"attention_backend": "CPU_MLA"}


@contextmanager
def undecorated(cls: type) -> Iterator[None]:
    """Take back what vLLM's Transformers backend does to Transformers' classes: it works once per process and class."""
    bases, attributes = cls.__bases__, dict(vars(cls))
    try:
        yield
    finally:
        cls.__bases__ = bases
        for name in set(vars(cls)) - set(attributes):
            delattr(cls, name)
        for name, value in attributes.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)


def write(architecture: str, mask: DropMask, directory: Path) -> Path:
    """Without the weights that the mask drops."""
    CASES[architecture].save(model_of(architecture), directory)
    path, weights = directory / "config.json", directory / "model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | mask.to_config()))
    family = CASES[architecture].family
    tensors = load_file(weights)
    kept = {name: each for name, each in tensors.items() if not in_dropped_sublayer(name, family, mask)}
    assert len(kept) < len(tensors)
    save_file(kept, weights, metadata={"format": "pt"})
    return directory


@contextmanager
def exact_gelu(model: nn.Module) -> Iterator[None]:
    """Bloom's activation as vLLM computes it: Transformers' approximation is 4e-4 away, with or without a mask."""
    children = ((part, name, child) for part in model.modules() for name, child in part.named_children())
    parts = [(part, name) for part, name, child in children if type(child) is BloomGelu]
    approximations = [getattr(part, name) for part, name in parts]
    try:
        for part, name in parts:
            setattr(part, name, nn.GELU())
        yield
    finally:
        for (part, name), approximation in zip(parts, approximations, strict=True):
            setattr(part, name, approximation)


@contextmanager
def as_in_vllm(model: nn.Module) -> Iterator[None]:
    """Gemma 3n without what a token's number gives each layer, which vLLM leaves out in its class for text alone."""
    decoder: Any = model.get_decoder()
    if model.config.model_type == "gemma3n_text":
        decoder.get_per_layer_inputs = lambda *_: None
    try:
        yield
    finally:
        vars(decoder).pop("get_per_layer_inputs", None)


@cache
def reference(architecture: str, mask: DropMask, prompt: tuple[int, ...] = tuple(PROMPT)) -> list[float]:
    """Log-probability of each prompt token after the first."""
    model = model_of(architecture)
    family, windows = CASES[architecture].family, DropMask(LAYERS, windows=mask.windows)
    skipped = skipping(model, family, mask), hf.dropped(model, family, windows), exact_gelu(model), as_in_vllm(model)
    with torch.no_grad(), ExitStack() as contexts:
        for each in skipped:
            contexts.enter_context(each)
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return logprobs[range(len(prompt) - 1), prompt[1:]].tolist()


@contextmanager
def running(directory: Path, architecture: str, **options: Any) -> Iterator[LLM]:
    if (package := CASES[architecture].needs) is not None:
        pytest.importorskip(package)
    decoder = type(model_of(architecture).get_decoder())
    options = FLOAT32 | options
    with undecorated(decoder), kernels(), engine(directory, **options) as llm:
        yield llm


def served(directory: Path, architecture: str, prompt: tuple[int, ...]) -> tuple[list[float], tuple[int, int]]:
    with running(directory, architecture, max_model_len=len(LONG) + 2) as llm:
        _, _, logprobs = greedy(llm, [*prompt], tokens=2)
        cache = llm.llm_engine.vllm_config.cache_config
        return logprobs, (cache.num_gpu_blocks, cache.block_size)


@pytest.mark.parametrize("architecture", CASES)
def test_under_masks_that_are_switched_it_computes_what_transformers_does_without_the_sublayers(architecture, tmp_path):
    directory = CASES[architecture].save(model_of(architecture), tmp_path)
    masks = [fitting(architecture, each) for each in (*MASKS.values(), DropMask(LAYERS), DropMask(LAYERS, mlp=(4,)))]
    expected = [reference(architecture, mask) for mask in masks]
    with running(directory, architecture, **SWITCHING) as llm:
        found = [switched(llm, mask) for mask in masks]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=NATS.get(architecture, 1e-4))
    assert all(one != pytest.approx(other, abs=1e-2) for one, other in combinations(expected, 2))


def switched(llm: LLM, mask: DropMask) -> list[float]:
    llm.collective_rpc("llmdrop_put_on", args=(list(mask.attention), list(mask.mlp)))
    llm.reset_prefix_cache()
    return greedy(llm, PROMPT, tokens=2)[2]


@pytest.mark.parametrize("mask", BUILT)
@pytest.mark.parametrize("architecture", CASES)
def test_served_with_a_mask_it_computes_what_transformers_does_without_the_sublayers(architecture, mask, tmp_path):
    whole = fitting(architecture, MASKS[mask])
    mask = windowed(architecture, whole)
    directory = write(architecture, mask, tmp_path)
    prompt = tuple(LONG if mask.windows else PROMPT)
    logprobs, (blocks, block_tokens) = served(directory, architecture, prompt)
    expected = reference(architecture, mask, prompt)
    assert logprobs == pytest.approx(expected, abs=NATS.get(architecture, 1e-4))
    config = json.loads((directory / "config.json").read_bytes())
    decoder = Decoder.of(config, config["architectures"][0])
    assert blocks == KV_CACHE_BYTES // (4 * block_tokens * decoder.layout().block_values)
    # The comparison can fail: without the mask the numbers are others, and where something is out of sight without it.
    assert reference(architecture, DropMask(LAYERS), prompt) != pytest.approx(expected, abs=1e-2)
    for layer, _ in mask.windows:
        without, seen = reference(architecture, whole, prompt), decoder.kinds[layer].seen_in_full
        assert expected[: seen - 1] == pytest.approx(without[: seen - 1], abs=1e-5)
        assert expected[seen:] != pytest.approx(without[seen:], abs=1e-3)
