"""The files that stand beside the weights: which of them belong into a new checkpoint."""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from llmdrop_vllm.artifacts import COMPARISON_FILE, EVALUATION_FILE
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.directory import OTHER_WEIGHTS
from llmdrop_vllm.checkpoints.shards import index_files

# Weights of another form or of the undropped model; next to dropped ones an engine might take them.
LEFT_OUT = (*OTHER_WEIGHTS, "consolidated*", "*.onnx_data", "*.bin.index*.json", "*.safetensors.index*.json")
LEFT_OUT_DIRECTORIES = frozenset({"original", ".git", ".cache"})


def companions(checkpoint: Checkpoint, *, without: frozenset[str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """(files to copy by name, names to leave out) of what is in the directory beside the weights, their index, what was
    measured of them, and `without`.

    Names are relative to the checkpoint; a directory that is left out as a whole ends in a slash.
    """
    weights = {path.name for path in (*checkpoint.metadata, *index_files(checkpoint.directory))}
    known = weights | without | {COMPARISON_FILE, EVALUATION_FILE}
    names = [name for name in _names(checkpoint.directory) if name not in known]
    left_out = [name for name in names if _is_left_out(checkpoint.directory, name)]
    return {name: checkpoint.directory / name for name in names if name not in left_out}, tuple(left_out)


def _names(directory: Path) -> Iterator[str]:
    for parent, directories, files in os.walk(directory):
        where = Path(parent).relative_to(directory)
        # Links to directories are not followed: they may lead back here.
        closed = [name for name in directories if name in LEFT_OUT_DIRECTORIES or (Path(parent) / name).is_symlink()]
        directories[:] = sorted(set(directories) - set(closed))
        yield from (f"{(where / name).as_posix()}/" for name in sorted(closed))
        yield from ((where / name).as_posix() for name in sorted(files))


def _is_left_out(directory: Path, name: str) -> bool:
    path = directory / name
    # vLLM reads every *.safetensors file at the top, listed or not.
    other_weights = path.parent == directory and path.suffix == ".safetensors"
    return other_weights or not path.is_file() or any(fnmatch(path.name, pattern) for pattern in LEFT_OUT)
