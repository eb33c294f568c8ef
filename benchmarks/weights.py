"""Random checkpoints that contenders share: one for a shape, and beside it what each contender reads."""

import json
import math
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from benchmarks.shapes import Shape
from llmdrop_vllm import DropMask, InputError
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint

SHARD_BYTES = 2 * 10**9
# A prime, so that tensors, which are cut from it one after the other, do not repeat each other.
BLOCK_VALUES = 15_485_863


def write_random(directory: Path, shape: Shape, dtype: str, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the full model, a shard at a time; weights keep the size of what passes through them."""
    directory.mkdir()
    kind = getattr(torch, dtype)
    (directory / "config.json").write_text(json.dumps({**shape.config, "dtype": dtype}))
    block = torch.randn(BLOCK_VALUES, generator=torch.Generator().manual_seed(seed))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in shape.tensors().items():
        if sum(map(math.prod, shards[-1].values())) * kind.itemsize > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    weight_map, start = {}, 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name, size in names.items():
            tensors[name] = _cut(block, start, size).to(kind)
            start += math.prod(size)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_random_apart(directory: Path, shape: Shape, dtype: str, shard_bytes: int = SHARD_BYTES) -> Path:
    """The same by a process of its own: memory that it leaves behind in this one would hide what is measured next.

    Raises InputError where it fails, which it has said why.
    """
    options = {"shard_bytes": shard_bytes}
    child = multiprocessing.get_context("fork").Process(
        target=write_random, args=(directory, shape, dtype), kwargs=options
    )
    child.start()
    child.join()
    if child.exitcode:
        raise InputError(f"the checkpoint could not be written to {directory}")
    return directory


def write_tokens(path: Path, vocab_size: int, samples: int, seq_len: int) -> Path:
    """Calibration data: `samples` random sequences of `seq_len` token ids."""
    path.write_text(json.dumps(np.random.default_rng(0).integers(0, vocab_size, (samples, seq_len)).tolist()))
    return path


def _cut(block: torch.Tensor, start: int, size: tuple[int, ...]) -> torch.Tensor:
    """The next values of the endlessly repeated block; ones for a norm."""
    if len(size) == 1:
        return torch.ones(size)
    values, start = math.prod(size), start % len(block)
    repeats = -(-(start + values) // len(block))
    return (block.repeat(repeats)[start : start + values] / math.sqrt(size[-1])).view(size)


def with_mask(full: Path, directory: Path, mask: DropMask, dialect: str) -> Path:
    """A checkpoint that says a mask: links to the weights, or for Nemotron-NAS a copy without the dropped ones.

    Raises MaskError where the dialect cannot express the model.
    """
    if not mask:
        return full
    if not directory.exists():
        write_checkpoint(plan_surgery(full, mask, dialect=dialect, config_only=dialect == "llm-drop"), directory)
    return directory


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A word for each token, so that text has as many tokens as it has words, there and back.

    Nothing stands between the words: vLLM refuses text with more characters than the longest words could have.
    """
    words = {f"w{token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Split(Regex(r"w\d+"), "isolated")
    tokenizer.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
