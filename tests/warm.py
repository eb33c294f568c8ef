"""Servers and engines of the tests that start in two seconds instead of half a minute.

`vllm serve` is three processes one after the other, and each imports vLLM for ten seconds. Here they are forked from a
zygote: a process that has imported vLLM and done nothing since, so it has one thread, no plugin and no engine. Each
process that was forked keeps a zygote of its own for those it spawns. All else is as ever: command line, environment,
descriptors, session, parent and exit status. Where modules read an environment while they are imported, it has a zygote
of its own. Warm are the commands of this environment, what begins with `PYTHON`, and all that these spawn; what stands
within `cold()` is started as ever.
"""

import _posixsubprocess
import atexit
import ctypes
import gc
import importlib
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType

IMPORTED = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
)
COMMANDS = {str(Path(sys.executable).with_name(name)) for name in ("vllm", "llmdrop")}
# For `-m` or `-c`: to Python itself `-X warm` means nothing.
PYTHON = [sys.executable, "-X", "warm"]
SPAWNED = re.compile(r"from multiprocessing.spawn import spawn_main; spawn_main\((.*)\)")
READ_AT_IMPORT = re.compile("PYTHON(?!PATH)|HF_HOME|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE|VLLM_(CONFIGURE_)?LOGGING")
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: an orphan below goes to this process and not to the machine's first
MESSAGE_BYTES, DESCRIPTORS = 1 << 20, 250
fork_exec = _posixsubprocess.fork_exec


@dataclass
class Job:
    """What a process is started with, beside its descriptors."""

    words: list[str]
    directory: str
    environment: dict[bytes, bytes]
    cores: set[int]
    session: bool
    group: int
    numbers: list[int]  # of the descriptors in the new process


class Zygote:
    """This process's end of one: `fork` starts a process as a child of this one."""

    def __init__(self, channel: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self.channel, self.process = channel, process
        self.lock = threading.Lock()

    @classmethod
    def new(cls, environment: dict[bytes, bytes]) -> "Zygote":
        """One that imports under an environment, in a process of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", f"from tests.warm import main; main({theirs.fileno()})"]
        # Threads of numpy and Arrow would not be there after a fork.
        single = {b"OPENBLAS_NUM_THREADS": b"1", b"JE_ARROW_MALLOC_CONF": b"background_thread:false"}
        with theirs:
            root, kept = Path(__file__).parents[1], [theirs.fileno()]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, env=environment | single, cwd=root, pass_fds=kept
            )
        return cls(ours, process)

    def fork(self, job: Job, descriptors: Sequence[int]) -> int:
        """The new process's id."""
        prctl = ctypes.CDLL(None).prctl
        with self.lock:
            prctl(SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self.channel, [pickle.dumps(job)], descriptors)
                pid = self.channel.recv(MESSAGE_BYTES)
            finally:
                prctl(SUBREAPER, 0, 0, 0, 0)
        assert pid, "the zygote has ended; what it said stands above"
        return int(pid)


_own: Zygote | None = None  # of a process that was forked itself
_zygotes: dict[tuple[tuple[bytes, bytes], ...], Zygote] = {}
_zygotes_lock = threading.Lock()


def _zygote(environment: dict[bytes, bytes]) -> Zygote:
    """This process's own, or the one whose modules have read the same of an environment."""
    if _own is not None:
        return _own
    with _zygotes_lock:
        read = tuple(sorted(item for item in environment.items() if READ_AT_IMPORT.match(os.fsdecode(item[0]))))
        if read not in _zygotes:
            _zygotes[read] = Zygote.new(environment)
        return _zygotes[read]


def install() -> None:
    """From now on this process starts its servers warm."""
    _posixsubprocess.fork_exec = subprocess._fork_exec = _fork_exec


@contextmanager
def cold() -> Iterator[None]:
    """Processes start as users start them."""
    _posixsubprocess.fork_exec = subprocess._fork_exec = fork_exec
    try:
        yield
    finally:
        install()


def _fork_exec(args, executables, close_fds, pass_fds, cwd, env, *rest):
    """For CPython's function of this name, which is what `subprocess` and `multiprocessing` start a process by."""
    stdin, _, _, stdout, _, stderr, _, errors, _, session, group, gid, gids, uid, umask, preexec, *_ = rest
    words = [os.fsdecode(word) for word in args]
    environment = dict(os.environb) if env is None else dict(entry.split(b"=", 1) for entry in env)
    plain = close_fds and (gid, gids, uid, umask, preexec) == (None, None, None, -1, None)
    spawned = SPAWNED.fullmatch(words[-2:][0])
    asked = words[0] in COMMANDS or words[: len(PYTHON)] == PYTHON
    if not (plain and (spawned or asked)):
        return fork_exec(args, executables, close_fds, pass_fds, cwd, env, *rest)
    kept = [descriptor for descriptor in pass_fds if descriptor != errors]
    standard = [number if given == -1 else given for number, given in enumerate((stdin, stdout, stderr))]
    directory = str(Path.cwd()) if cwd is None else os.fsdecode(cwd)
    job = Job(words, directory, environment, os.sched_getaffinity(0), session, group, [0, 1, 2, *kept])
    return _zygote(environment).fork(job, [*standard, *kept])


def _close_all_but(kept: set[int]) -> None:
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number not in kept:
            with suppress(OSError):  # the listing's own
                os.close(number)


def _wait_for_job(channel: socket.socket) -> tuple[Job, list[int]]:
    """In a zygote, for as long as it lives. Returns in a process that was forked, as its parent's child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, DESCRIPTORS)
        if not message:  # who would ask has ended
            os._exit(0)
        told, tells = os.pipe()
        if between := os.fork():
            for descriptor in (*descriptors, tells):
                os.close(descriptor)
            pid = os.read(told, MESSAGE_BYTES)
            os.close(told)
            os.waitpid(between, 0)  # and with it the new process is an orphan, and the asking one's child
            channel.send(pid)
        elif pid := os.fork():
            os.write(tells, str(pid).encode())
            os._exit(0)
        else:
            channel.close()
            return pickle.loads(message), descriptors


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _become(job: Job, descriptors: list[int]) -> None:
    if job.session:
        os.setsid()
    elif job.group >= 0:
        os.setpgid(0, job.group)
    free = max(*job.numbers, *descriptors) + 1
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, free + place)
    for place, number in enumerate(job.numbers):
        os.dup2(free + place, number)
    _close_all_but(set(job.numbers))
    os.sched_setaffinity(0, job.cores)
    os.chdir(job.directory)
    ours = _paths()
    os.environb.clear()
    os.environb.update(job.environment)
    sys.path[1:] = [*_paths(), *(path for path in sys.path[1:] if path not in ours)]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(words: list[str]) -> None:
    """Do what a command line says, as the main program."""
    if spawned := SPAWNED.fullmatch(words[-2:][0]):
        sys.argv = ["-c", words[-1]]
        arguments = (argument.split("=") for argument in spawned[1].split(", "))
        spawn.spawn_main(**{name: int(value) for name, value in arguments})
    elif words[0] == sys.executable:
        _, _, _, how, what, *sys.argv[1:] = words
        if how == "-m":
            sys.path[0] = str(Path.cwd())
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0], sys.path[0] = "-c", ""
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(what, main.__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def main(descriptor: int) -> None:
    """A zygote; what is forked of it becomes its job in here."""
    global _own
    channel = socket.socket(fileno=descriptor)
    for name in IMPORTED:
        with suppress(ModuleNotFoundError):  # what another vLLM has elsewhere is imported when it is wanted
            importlib.import_module(name)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork would lose the other threads"
    gc.collect()
    gc.freeze()  # or the first collection in each process would copy all pages
    while True:
        job, descriptors = _wait_for_job(channel)
        _become(job, descriptors)
        ours, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            break
        ours.close()
    channel.close()
    _own = Zygote(ours)
    install()
    atexit.register(gc.unfreeze)
    _run(job.words)
