"""Whole reads and writes of raw bytes, where the system may do less at once."""

import os
from pathlib import Path

from llmdrop_vllm.errors import CheckpointError


def read_at(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill the buffer from this place in an open file. Raises CheckpointError naming the path if it ends early."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise CheckpointError(f"{path} ended early: it has been cut while it was read")
        buffer, offset = buffer[count:], offset + count


def write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write the whole buffer at this place in an open file."""
    while buffer:
        count = os.pwritev(descriptor, [buffer], offset)
        buffer, offset = buffer[count:], offset + count
