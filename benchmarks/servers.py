"""Servers as processes of their own, for benchmarks and tests."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmdrop_vllm import InputError
from llmdrop_vllm.embedded import MODEL

MASK = "11,7,8,10"
SUMMARY = "attention dropped in 4 of 12 layers [7-8,10-11], MLP in 0"
BIN = Path(sys.executable).parent
EMBEDDED = [str(MODEL), "--served-model-name", "embedded", "--enforce-eager", "--gpu-memory-utilization", "0.3"]


@dataclass
class Served:
    """A server that answers."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def engine_pid(self) -> int:
        """The engine's own process."""
        found = re.findall(r"\(EngineCore pid=(\d+)\)", self.log.read_text(errors="replace"))
        assert found, self.log.read_text(errors="replace")
        return int(found[0])

    def cpu_s(self) -> float:
        """CPU time of the process that speaks HTTP, without the engine's, which are processes of their own."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident memory of the server and all processes that it started."""
        parents = {pid: parent for pid, parent, _ in _processes()}
        family, grown = {self.process.pid}, True
        while grown:
            children = {pid for pid, parent in parents.items() if parent in family}
            grown = not children <= family
            family |= children
        return sum(rss for pid, _, rss in _processes() if pid in family)


def _processes() -> Iterator[tuple[int, int, int]]:
    """(process, its parent, resident bytes) of every process on this machine."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            yield int(path.parent.name), int(fields[1]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def engine_cores() -> list[int]:
    """All but the first, which is for HTTP and clients.

    OpenMP threads that share their cores wait for each other at every step, so the busiest thread sets the pace.
    """
    cores = sorted(os.sched_getaffinity(0))
    return cores[1:] or cores


def leave_a_core() -> dict[str, str]:
    """Environment for an engine on a CPU that keeps to its cores, unless the user has chosen other ones."""
    name = "VLLM_CPU_OMP_THREADS_BIND"
    return {name: os.environ.get(name) or ",".join(map(str, engine_cores()))}


@contextmanager
def serving(
    directory: Path,
    *arguments: str,
    command: tuple[str, ...] = ("llmdrop", "serve"),
    model: Sequence[str] = EMBEDDED,
    env: Mapping[str, str | None] = {},
    port: int | None = None,
) -> Iterator[Served]:
    """A model behind `llmdrop serve`, or another command of this environment; ended with all it started.

    `env` is added to this process's environment; what is None there is taken out of it. Raises InputError with what the
    server said last, where it ends or does not answer.
    """
    port, log = port or free_port(), directory / "log"
    program, *words = command
    line = [str(BIN / program), *words, *model, "--host", "127.0.0.1", "--port", str(port), *arguments]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | dict(env)
    with log.open("w") as stdout:
        process = subprocess.Popen(
            line,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in environment.items() if value is not None},
            start_new_session=True,
        )
    try:
        _wait_for_health(f"http://127.0.0.1:{port}", log, process)
        yield Served(f"http://127.0.0.1:{port}", log, process)
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself, and so has all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_health(url: str, log: Path, process: subprocess.Popen[bytes], timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        time.sleep(0.3)
    found = "is not healthy yet" if process.poll() is None else f"has ended with status {process.returncode}"
    # The log itself may be gone when this is read. Why an engine died stands a traceback above its end.
    end = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
    raise InputError(f"{shlex.join(map(str, process.args))} {found}; its log ends:\n{end}")
