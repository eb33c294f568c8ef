"""Who is measured: engines with checkpoints, each in a child process that waits for its turn without using a core."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdrop_vllm import DropMask, InputError

ROOT = Path(__file__).parents[1]
# The largest and the mean difference of log-probabilities between engines that compute the same function.
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
MEAN_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


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

    def __init__(self, name: str, child: subprocess.Popen[str], log: Path) -> None:
        self.name, self.child, self.log = name, child, log
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
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        line = ""
        with suppress(BrokenPipeError):  # it has ended; its log says why
            print(json.dumps(command), file=self.child.stdin, flush=True)
            line = self.child.stdout.readline()
        if not line:
            tail = " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])
            raise ContenderError(f"{self.name} ended with status {self.child.wait()}: {tail}")
        reply = json.loads(line)
        if "error" in reply:
            raise ContenderError(f"{self.name}: {reply['error']}")
        return reply


@contextmanager
def running(name: str, directory: Path, *, plugin: bool, device: str) -> Iterator[Process]:
    """A child that has loaded nothing yet; ended with all it started."""
    log = directory / f"{name.replace(' ', '-').replace(',', '')}.log"
    with log.open("a") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contender_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=environment(plugin=plugin, device=device),
            start_new_session=True,
        )
    try:
        yield Process(name, child, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with suppress(BrokenPipeError):
                pipe.close()


def environment(*, plugin: bool, device: str) -> dict[str, str]:
    """The same for every contender, but that stock vLLM is not to load plugins."""
    cores = sorted(os.sched_getaffinity(0))
    # It would win over the size that we ask for.
    found = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    found |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Those who wait for their turn must not spin.
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }
    if not plugin:
        found["VLLM_PLUGINS"] = ""
    if device == "cpu":
        found.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        found |= {"OMP_NUM_THREADS": str(len(cores)), "LD_PRELOAD": ":".join(preloads())}
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


def check_agreement(name: str, reference: Mapping[str, list], found: Mapping[str, list], dtype: str) -> float:
    """The largest difference. Raises ContenderError for a contender that computes something else."""
    largest, mean = difference(reference, found)
    # Written so that a NaN is refused too.
    if not (largest <= MAX_DIFFERENCE[dtype] and mean <= MEAN_DIFFERENCE[dtype]):
        raise ContenderError(
            f"{name} computes another function than the others with its mask: log-probabilities differ by up to "
            f"{largest:.3g}, by {mean:.3g} on average; {MAX_DIFFERENCE[dtype]:g} and {MEAN_DIFFERENCE[dtype]:g} are "
            f"expected in {dtype}. Nothing was timed"
        )
    return largest
