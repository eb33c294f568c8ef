"""Memory as the system counts it: what this process has and has had, and what is free."""

import subprocess
import sys
from pathlib import Path

from llmdrop_vllm import InputError


def kernel_bytes(key: str, file: str = "/proc/self/status") -> int:
    """An entry of a file of the kernel's in bytes: of this process VmRSS, its resident set, or VmHWM, the peak of that.

    The peak that getrusage knows may be that of the process that started this one.
    """
    (line,) = (line for line in Path(file).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def peak_bytes() -> int:
    """The most memory that this process has had: on the GPU, where it uses one, else its resident set."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return kernel_bytes("VmHWM")


def free_bytes(device: str) -> int:
    """Memory that is free now on a device, `cpu` or `cuda`. Raises InputError where the GPU's cannot be read."""
    if device == "cpu":
        return kernel_bytes("MemAvailable", "/proc/meminfo")
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"the GPU's free memory cannot be read: {error}") from None
