"""Weight files written from others', a small buffer at a time, looking for NaN in what passes through."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import BufferedReader
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from llmdrop_vllm.checkpoints.shards import StoredTensor, dtype_bits, read_exactly
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.writing.plan import OutputShard

# Small enough to stay in a processor's cache between reading, looking and writing; enough of them that neither the
# reader nor the writer waits for the other when the system lets one of them pause.
BUFFER_BYTES, NUM_BUFFERS = 1 << 19, 8  # a multiple of every type's size: no part ends inside a number
# Bits of infinity, or of the largest number where there is none: what is above it as a signed integer is NaN. With the
# sign bit, the same as unsigned.
INFINITY = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
INFINITY |= {"F8_E5M2": 0x7C, "F8_E4M3": 0x7E}

Progress = Callable[[int], None]


def write_shard(shard: OutputShard, path: Path, zeroed: Set[str], progress: Progress) -> None:
    """Write a weight file whose tensors have the bytes that they have where they are stored, `zeroed` ones zeros.

    Raises CheckpointError naming the first tensor that holds NaN.
    """
    # Large types first, as the safetensors library does: every tensor is aligned to its type. Among equals the order
    # stays, in which the files are read.
    tensors = sorted(shard.tensors, key=lambda tensor: -dtype_bits(tensor.dtype))
    with ExitStack() as stack, path.open("xb") as out, ThreadPoolExecutor(max_workers=1) as reader:
        sources = {each: stack.enter_context(each.open("rb")) for each in {tensor.path for tensor in tensors}}
        out.write(header(tensors, shard.metadata))
        for view in _contents(tensors, zeroed, sources, reader):
            out.write(view)
            progress(len(view))


def header(tensors: Iterable[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header of these tensors, stored one after the other, with its length before it."""
    # The library gives metadata in an order of its own, each time another; the same plan makes the same bytes.
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def holds_nan(dtype: str, view: memoryview) -> bool:
    """Whether there is a NaN among little-endian values of a safetensors dtype; False for dtypes without NaN."""
    if dtype not in INFINITY:
        return False
    bits, infinity = dtype_bits(dtype), INFINITY[dtype]
    # Two maxima of integers: no temporary array, and faster than the memory.
    signed, unsigned = (np.frombuffer(view, f"{kind}{bits // 8}").max() for kind in "iu")
    return bool(signed > infinity or unsigned > (1 << (bits - 1)) + infinity)


def _contents(
    tensors: Iterable[StoredTensor], zeroed: Set[str], sources: Mapping[Path, BufferedReader], reader: Executor
) -> Iterator[memoryview]:
    """The tensors' bytes in order, in parts; while one is in use, the next ones are read and looked at."""
    buffers = cycle(bytearray(BUFFER_BYTES) for _ in range(NUM_BUFFERS))
    ahead: deque[Future[memoryview]] = deque()
    for tensor, done in ((each, done) for each in tensors for done in range(0, each.num_bytes, BUFFER_BYTES)):
        if len(ahead) == NUM_BUFFERS:
            yield ahead.popleft().result()
        view = memoryview(next(buffers))[: tensor.num_bytes - done]
        source = None if tensor.name in zeroed else sources[tensor.path]
        ahead.append(reader.submit(_filled, view, tensor, done, source))
    while ahead:
        yield ahead.popleft().result()


def _filled(view: memoryview, tensor: StoredTensor, done: int, source: BufferedReader | None) -> memoryview:
    """The buffer with a tensor's bytes from this place in it on, or with zeros where there is no source."""
    if source is None:
        view[:] = bytes(len(view))
        return view
    read_exactly(source, tensor.start + done, view)
    if holds_nan(tensor.dtype, view):
        raise CheckpointError(f"{tensor.name} in {tensor.path} holds NaN; the model cannot compute with it")
    return view
