"""Who is measured: engines with checkpoints, each in a child process that waits for its turn without using a core."""

import importlib.util
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from benchmarks.contender_process import serve
from llmdrop_vllm import DropMask, InputError

ROOT = Path(__file__).parents[1]
# The largest and the mean difference of log-probabilities between engines that compute the same function.
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
MEAN_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
# So many times as much with real weights, whose streams are larger: in bfloat16 engines of SmolLM2 and the coder are
# apart by 0.05 on average and 0.75 at most, masks of SmolLM2 that differ by one attention by 0.2 and 1.4 at least.
OF_REAL_WEIGHTS = 2


class ContenderError(InputError):
    """A contender that cannot be measured, with the reason for people."""


@dataclass(frozen=True)
class Contender:
    """One way to serve a mask; contenders with the same mask must compute the same function."""

    engine: str
    variant: str
    mask: DropMask
    label: str

    @property
    def name(self) -> str:
        """For tables: `llmdrop, attention 4`."""
        return f"{self.variant}, {self.label}"

    def record(self) -> dict[str, Any]:
        """For the lines of a result."""
        return {
            "contender": self.name,
            "variant": self.variant,
            "attention_dropped": len(self.mask.attention),
            "mlp_dropped": len(self.mask.mlp),
        }


@dataclass(frozen=True)
class Settings:
    """What all contenders have in common."""

    dtype: str
    device: str
    kv_bytes: int
    max_step_tokens: int
    compiled: bool

    def options(self, engine: str, model: Path) -> dict[str, Any]:
        """Arguments of the engine's class."""
        if engine == "transformers":
            return {"model": str(model), "dtype": self.dtype, "device": self.device}
        return {
            "model": str(model),
            "dtype": self.dtype,
            # As long as the KV cache allows, up to what the model can count.
            "max_model_len": -1,
            "max_num_batched_tokens": self.max_step_tokens,
            "max_num_seqs": 256,
            "kv_cache_memory_bytes": self.kv_bytes,
            "enforce_eager": not self.compiled,
        }


class Process:
    """A contender that runs. Raises ContenderError with what it said last, if it fails or ends."""

    def __init__(self, name: str, connection: Connection, log: Path) -> None:
        self.name, self.connection, self.log = name, connection, log
        self.load_s, self.kv_tokens, self.kv_sequences, self.block_tokens, self.peak_bytes = 0.0, 0.0, 0, 1, 0

    def load(self, engine: str, options: Mapping[str, Any]) -> None:
        """Load a model, in place of the one before."""
        reply = self._ask({"do": "load", "engine": engine, "options": dict(options)})
        for name, value in reply.items():
            setattr(self, name, value)

    def ask(self, do: str, **arguments: Any) -> Any:
        """The result of one of the engine's methods."""
        reply = self._ask({"do": do, **arguments})
        self.peak_bytes = reply["peak_bytes"]
        return reply["result"]

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self.connection.send_bytes(json.dumps(command).encode())
            reply: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            tail = " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])
            raise ContenderError(f"{self.name} has ended: {tail}") from None
        if "error" in reply:
            raise ContenderError(f"{self.name}: {reply['error']}")
        return reply


@contextmanager
def running(name: str, directory: Path, *, plugin: bool, device: str) -> Iterator[Process]:
    """A child that has loaded nothing yet; ended with all it started."""
    log = directory / f"{name.replace(' ', '-').replace(',', '')}.log"
    context = nursery(device)
    ours, its = context.Pipe()
    child = context.Process(target=serve, args=(its, str(log)), kwargs={"plugin": plugin}, daemon=False)
    child.start()
    its.close()
    try:
        yield Process(name, ours, log)
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself, and so has all that it started
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
        ours.close()


@cache
def nursery(device: str) -> ForkServerContext:
    """Children are forked from a process that has imported the engines once, for that takes longer than most loads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.contender_process", "benchmarks.engines", "vllm.entrypoints.llm"])
    before = dict(os.environ)
    os.environ |= environment(device)
    # It would win over the size that we ask for.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def environment(device: str) -> dict[str, str]:
    """What every contender has in its environment."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    found = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server"), os.environ.get("PYTHONPATH", "")]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Those who wait for their turn must not spin.
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }
    if device == "cpu":
        bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", cores)
        found |= {"VLLM_CPU_OMP_THREADS_BIND": bound, "OMP_NUM_THREADS": str(len(cores.split(",")))}
        found["LD_PRELOAD"] = ":".join(preloads())
    return found


def preloads() -> list[str]:
    """What `vllm serve` gives the processes that it starts on a CPU, for an engine in a process of ours."""
    found = [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    for package, patterns in {
        "torch": ("../torch.libs/libgomp*.so*", "lib/libgomp*.so*"),
        "vllm": ("libs/libtcmalloc_minimal*.so*",),
    }.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += [str(path) for pattern in patterns for path in Path(spec.origin).parent.glob(pattern)][:1]
    return found


def difference(reference: Mapping[str, list], found: Mapping[str, list]) -> tuple[float, float]:
    """Largest and mean difference of log-probabilities: of the prompt, and of greedy tokens up to the first other one.

    The first other one counts: where two tokens tie, both engines give theirs the same log-probability.
    """
    same = [a == b for a, b in zip(reference["tokens"], found["tokens"], strict=True)]
    until = same.index(False) + 1 if False in same else len(same)
    pairs = [
        *zip(reference["prompt_logprobs"], found["prompt_logprobs"], strict=True),
        *zip(reference["logprobs"][:until], found["logprobs"][:until], strict=True),
    ]
    differences = [abs(a - b) for a, b in pairs]
    return max(differences), sum(differences) / len(differences)


def check_agreement(
    name: str, reference: Mapping[str, list], found: Mapping[str, list], dtype: str, times: int = 1
) -> float:
    """The largest difference. Raises ContenderError for a contender that computes something else: beyond so many times
    what random weights are allowed.
    """
    largest, mean = difference(reference, found)
    most, most_on_average = times * MAX_DIFFERENCE[dtype], times * MEAN_DIFFERENCE[dtype]
    # Written so that a NaN is refused too.
    if not (largest <= most and mean <= most_on_average):
        raise ContenderError(
            f"{name} computes another function than the others with its mask: log-probabilities differ by up to "
            f"{largest:.3g}, by {mean:.3g} on average; {most:g} and {most_on_average:g} are expected in {dtype}. "
            "Nothing was timed"
        )
    return largest
