"""Checkpoints in several files, and what is in a directory byte for byte."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.masks.mask import DropMask
from tests.tiny import TINY_LLAMA

# The mask and the smallest model of most tests here.
MASK = DropMask(8, attention=(6, 5, 2), mlp=(7,))
SMALL = TINY_LLAMA | {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
SMALL |= {"num_key_value_heads": 1, "head_dim": 8}
COMPANIONS = {
    "tokenizer.json": "{}",
    "generation_config.json": '{"eos_token_id": 2}',
    "chat_template.jinja": "{{ messages }}",
    "modeling_own.py": "raise SystemExit\n",
    "1_Pooling/config.json": "{}",
}
OTHER_WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "model.gguf",
    "adapter.safetensors",
    "onnx/model.onnx",
)
LEFT_OUT_DIRECTORIES = ("original", ".git", ".cache")


def split(directory: Path, groups: tuple[tuple[str, ...], ...]) -> Path:
    """Put the tensors of model.safetensors into one shard per group of name prefixes, the rest into the last, and list
    them in an index.
    """
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    (directory / "model.safetensors").unlink()
    parts: list[dict[str, Any]] = [{} for _ in range(len(groups) + 1)]
    for name, value in tensors.items():
        parts[next((i for i, prefixes in enumerate(groups) if name.startswith(prefixes)), len(groups))][name] = value
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, directory / file_name, metadata={"format": "pt", "part": str(number)})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def add_companions(directory: Path) -> Path:
    """Files that surgery copies and files that it leaves out."""
    for name, text in COMPANIONS.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    for name in (*OTHER_WEIGHTS, *(f"{each}/file" for each in LEFT_OUT_DIRECTORIES)):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"\x80undropped")
    return directory


def stored(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) of every tensor, from the headers."""
    found = {}
    for name, tensor in Checkpoint.open(directory).tensors.items():
        tensor.read_into(content := bytearray(tensor.num_bytes))
        found[name] = tensor.dtype, tensor.shape, bytes(content)
    return found


def content(directory: Path) -> dict[str, bytes | str | None]:
    """Every file's bytes, every link's target, by relative name."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def put_nan(directory: Path, name: str = "model.layers.1.mlp.up_proj.weight", value: float = np.nan) -> None:
    """Make the last number of a tensor a NaN."""
    path = next(path for path in directory.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name].flat[-1] = value
    save_file(tensors, path)


def truncate(directory: Path) -> None:
    """Cut the last byte off the first shard."""
    path = directory / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def token_file(path: Path, lengths: Sequence[int], vocab_size: int = 256) -> str:
    """Random token ids, the same each time, in sequences of these lengths."""
    rng = np.random.default_rng(0)
    path.write_text(json.dumps([rng.integers(0, vocab_size, length).tolist() for length in lengths]))
    return str(path)
