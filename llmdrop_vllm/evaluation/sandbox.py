"""Programs that a model has written, run where they can do no harm: `confined.py` says how."""

import importlib.util
import secrets
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from llmdrop_vllm.errors import InputError

CONFINED = Path(__file__).with_name("confined.py")
SECONDS, MEMORY_BYTES = 5, 1 << 30
# Beyond twice its CPU time a program waits for something, or the machine is very busy.
GRACE_S = 5


def ends_well(program: str, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether a Python program comes to its end without an error, within so much CPU and wall time and memory.

    One that leaves by itself before its end (`sys.exit`, `os._exit`) does not. Raises InputError where programs cannot
    be confined.
    """
    check_confinement()
    return _run(program, seconds, memory_bytes)


@cache
def check_confinement() -> None:
    """Raise InputError where this system cannot keep a program from writing files and reaching others."""
    remedy = "running code that a model writes needs Linux, libseccomp and pyseccomp (pip install 'llmdrop-vllm[eval]')"
    if importlib.util.find_spec("pyseccomp") is None or not _run("pass", SECONDS, MEMORY_BYTES):
        raise InputError(f"a harmless program cannot be run in confinement here; {remedy}")
    for what, program in {
        "write a file": "open('written', 'w')",
        "start a process": "import os; os.fork()",
        "open a socket": "import socket; socket.socket()",
        "send a signal": "import os; os.kill(os.getpid(), 0)",
    }.items():
        if _run(program, SECONDS, MEMORY_BYTES):
            raise InputError(f"a confined program can {what} here; {remedy}")


def _run(program: str, seconds: int, memory_bytes: int) -> bool:
    secret = secrets.token_hex()
    command = [sys.executable, "-I", str(CONFINED), str(seconds), str(memory_bytes)]
    with tempfile.TemporaryDirectory() as nothing:
        try:
            done = subprocess.run(
                command,
                input=f"{secret}\n{program}",
                capture_output=True,
                errors="replace",
                timeout=2 * seconds + GRACE_S,
                cwd=nothing,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.stdout.strip() == secret
