"""A model's directory: where it is, its config.json, and which of its files are the weights."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from llmdrop_vllm.checkpoints.shards import INDEX_FILE, VARIANT, read_index
from llmdrop_vllm.errors import CheckpointError, command

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# The same weights in other formats, next to the shards in many repositories; nothing here reads or copies them.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "consolidated*.safetensors")

ADAPTER = "an adapter of PEFT's; merge it into its model first: merge_and_unload(), then save_pretrained()"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is on disk. Raises CheckpointError where there is none."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(f"{directory} is {ADAPTER}") from None
        raise CheckpointError(f"{directory} has no config.json; expected a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}; expected an object")
    return config


def check_model_name(model: str | Path) -> None:
    """Raise CheckpointError for what is neither a directory nor looks like a hub id."""
    path = Path(model)
    if path.is_dir():
        return
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{model} is a GGUF file; make a checkpoint of it first: {command('fetch', model, 'DIR')}"
        )
    if isinstance(model, Path) or path.exists() or not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} is not a directory; expected a checkpoint directory or a hub id like org/name")


def local_directory(model: str | Path) -> Path:
    check_model_name(model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=[*OTHER_WEIGHTS, "original/*"]))
    except (OSError, ValueError) as error:
        message = f"{model} is neither a directory nor a hub repository that can be read: {error}"
        raise CheckpointError(message) from None


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and what the index says is in them; without an index, every safetensors file of its kind.

    Shards that an index does not list are left over from another time, and no engine reads them.
    """
    index_file, index = read_index(directory)
    if listed := sorted({directory / file for file in index.values()}):
        if missing := [path for path in listed if not path.is_file()]:
            raise CheckpointError(f"{missing[0]} is missing; {index_file} lists it")
        return listed, index
    if numbered := sorted(directory.glob("model*-of-*.safetensors")):
        counts = {path.stem.rpartition("-of-")[2] for path in numbered}
        if counts == {f"{len(numbered):05}"}:  # all of them, which vLLM reads as they are
            return numbered, {}
        raise CheckpointError(f"{directory} has shards like {numbered[0].name} and no {INDEX_FILE}")
    for name in ("model.safetensors", f"model.{VARIANT}.safetensors"):
        if (directory / name).is_file():
            return [directory / name], {}
    if gguf := sorted(directory.glob("*.gguf")):
        raise CheckpointError(f"{directory} has its weights as GGUF; convert them: {command('fetch', gguf[0], 'DIR')}")
    if others := [path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern)]:
        here, there = json.dumps(str(directory)), json.dumps(f"{directory}-safetensors")
        convert = f'M.from_pretrained({here}, dtype="auto").save_pretrained({there})'
        raise CheckpointError(
            f"{directory} has its weights as {min(others)}; only safetensors are read, for pickle files can run code. "
            f"Convert: python -c {shlex.quote(f'from transformers import AutoModelForCausalLM as M; {convert}')}"
        )
    raise CheckpointError(
        f"{directory} has no model.safetensors and no {INDEX_FILE}; weights in other formats (.bin, .gguf) are not read"
    )
