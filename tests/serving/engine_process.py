"""Engines that need processes of their own, each run in a child and ended with everything it started.

Run as a script: reads a job as JSON from its argument and prints one line `RESULT {...}`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.warm import PYTHON

MARK = "RESULT "


def run_job(env: dict[str, str] | None = None, timeout_s: float = 240, **job: Any) -> dict[str, Any]:
    """Generate in a child process: `model`, `prompt`, `tokens` and LLM options; again with a mask to `put_on`. Returns
    the result and the child's log.

    vLLM engines of several processes may hang at exit, so the whole process group is ended once the result is there.
    """
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("w") as stdout:
            child = subprocess.Popen(
                [*PYTHON, "-m", "tests.serving.engine_process", json.dumps(job, default=str)],
                stdout=stdout,
                stderr=subprocess.STDOUT,
                env=os.environ | (env or {}),
                cwd=Path(__file__).parents[2],
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + timeout_s
            while True:
                ended = child.poll() is not None or time.monotonic() > deadline
                text = log.read_text()
                for line in text.splitlines():
                    if line.startswith(MARK):
                        return json.loads(line.removeprefix(MARK)) | {"log": text}
                if ended:
                    raise AssertionError(f"no result from the engine process:\n{text}")
                time.sleep(0.2)
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself, and so has all that it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


class PeakMemory(threading.Thread):
    """The most anonymous memory this process has had at once; pages of the mapped checkpoint do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.start()

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.peak_bytes = max(self.peak_bytes, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(0.001)


def main() -> None:
    from vllm import LLM, SamplingParams

    memory = PeakMemory()

    job = json.loads(sys.argv[1])
    model, prompt, tokens = job.pop("model"), job.pop("prompt"), job.pop("tokens", 12)
    tell_class, mask = job.pop("tell_class", False), job.pop("put_on", None)
    llm = LLM(
        model,
        **(
            {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256, "gpu_memory_utilization": 0.3} | job
        ),
    )
    if mask:
        assert not any(llm.collective_rpc("llmdrop_refuses"))
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    (request,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    cache = llm.llm_engine.vllm_config.cache_config
    (output,) = request.outputs
    result = {"tokens": list(output.token_ids), "kv_tokens": cache.num_gpu_blocks * cache.block_size}
    entries = [*filter(None, request.prompt_logprobs), *output.logprobs]
    result["peak_bytes"] = memory.peak_bytes
    result["logprobs"] = [[value.logprob for value in entry.values()] for entry in entries]
    if mask:
        llm.collective_rpc("llmdrop_put_on", args=tuple(mask))
        llm.reset_prefix_cache()
        (request,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        result["switched"] = list(request.outputs[0].token_ids)
    if tell_class:
        result["model_class"] = llm.apply_model(lambda model: str(type(model)))[0]
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
