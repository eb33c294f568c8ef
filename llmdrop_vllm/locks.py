"""Directories that one process at a time may work in."""

import fcntl
import os
from pathlib import Path

from llmdrop_vllm.errors import OutputError


def hold(directory: Path, use: str) -> int:
    """A descriptor that keeps other processes out while it is open, whatever becomes of this one.

    Raises OutputError, saying that another process is `use`, where the directory is held already.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"{directory} is in use: another process is {use}") from None
    return descriptor
