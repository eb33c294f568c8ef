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
BUFFER_BYTES, NUM_BUFFERS = 1 << 19, 8  # the size is a multiple of every type's
# Bits of infinity and its type as a signed integer: what is above it is NaN. With the sign bit, the same as unsigned.
INFINITY = {
    "F64": (np.int64, 0x7FF0_0000_0000_0000),
    "F32": (np.int32, 0x7F80_0000),
    "F16": (np.int16, 0x7C00),
    "BF16": (np.int16, 0x7F80),
    "F8_E5M2": (np.int8, 0x7C),
    "F8_E4M3": (np.int8, 0x7E),  # it has no infinity; this is its largest number
}

Progress = Callable[[int], None]
Piece = tuple[StoredTensor, int, int]  # a tensor, where in it, and how many bytes
Sources = Mapping[Path, BufferedReader]


def write_shard(shard: OutputShard, path: Path, zeroed: Set[str], progress: Progress) -> None:
    """Write a weight file whose tensors have the bytes that they have where they are stored, `zeroed` ones zeros.

    Raises CheckpointError naming the first tensor that holds NaN.
    """
    # Large types first, as the safetensors library does: every tensor is aligned to its type, and no buffer ends inside
    # a number. Among equals the order stays, so that long runs are read at once.
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
    if dtype not in INFINITY or not view.nbytes:
        return False
    signed, infinity = INFINITY[dtype]
    values = np.frombuffer(view, dtype=signed)
    sign_bit = 1 << (8 * values.itemsize - 1)
    # Two maxima of integers: no temporary array, and faster than the memory.
    return bool(values.max() > infinity or values.view(f"u{values.itemsize}").max() > sign_bit + infinity)


def _contents(
    tensors: Iterable[StoredTensor], zeroed: Set[str], sources: Sources, reader: Executor
) -> Iterator[memoryview]:
    """The tensors' bytes in order, in parts; while one is in use, the next ones are read and looked at."""
    buffers = cycle(bytearray(BUFFER_BYTES) for _ in range(NUM_BUFFERS))
    ahead: deque[Future[memoryview]] = deque()
    for chunk in (chunk for run in _runs(tensors, zeroed) for chunk in _chunks(run)):
        if len(ahead) == NUM_BUFFERS:
            yield ahead.popleft().result()
        load = _fill_zeros if chunk[0][0].name in zeroed else _read_checked
        ahead.append(reader.submit(load, sources, chunk, next(buffers)))
    while ahead:
        yield ahead.popleft().result()


def _runs(tensors: Iterable[StoredTensor], zeroed: Set[str]) -> Iterator[list[StoredTensor]]:
    """Tensors that lie one after the other in a file, to be read as one; zeroed ones are by themselves."""
    run: list[StoredTensor] = []
    for tensor in tensors:
        follows = run and (tensor.path, tensor.start) == (run[-1].path, run[-1].stop)
        if run and not (follows and not {tensor.name, run[-1].name} & zeroed):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _chunks(run: Iterable[StoredTensor]) -> Iterator[list[Piece]]:
    """The run cut to the buffer's size; no value is cut, for whatever comes before has values at least as large."""
    chunk: list[Piece] = []
    room = BUFFER_BYTES
    for tensor in run:
        done = 0
        while done < tensor.num_bytes:
            taken = min(tensor.num_bytes - done, room)
            chunk.append((tensor, done, taken))
            done, room = done + taken, room - taken
            if done < tensor.num_bytes:
                yield chunk
                chunk, room = [], BUFFER_BYTES
    if chunk:
        yield chunk


def _read_checked(sources: Sources, chunk: list[Piece], buffer: bytearray) -> memoryview:
    first, done, _ = chunk[0]
    view = _view(chunk, buffer)
    read_exactly(sources[first.path], first.start + done, view)
    start = 0
    for tensor, _, taken in chunk:
        if holds_nan(tensor.dtype, view[start : start + taken]):
            raise CheckpointError(f"{tensor.name} in {tensor.path} holds NaN; the model cannot compute with it")
        start += taken
    return view


def _fill_zeros(_: Sources, chunk: list[Piece], buffer: bytearray) -> memoryview:
    view = _view(chunk, buffer)
    view[:] = bytes(len(view))
    return view


def _view(chunk: list[Piece], buffer: bytearray) -> memoryview:
    return memoryview(buffer)[: sum(taken for _, _, taken in chunk)]
