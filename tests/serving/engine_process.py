"""Engines that need processes of their own, each run in a child and ended with everything it started.

Run as a script: reads a job as JSON from its argument and prints one line `RESULT {...}`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARK = "RESULT "


def run_job(env: dict[str, str] | None = None, timeout_s: float = 240, **job: Any) -> dict[str, Any]:
    """Generate in a child process: `model`, `prompt`, `tokens` and LLM options. Returns the result and the child's log.

    vLLM engines of several processes may hang at exit, so the whole process group is ended once the result is there.
    """
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.engine_process", json.dumps(job, default=str)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}),
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + timeout_s
            while True:
                ended = child.poll() is not None or time.monotonic() > deadline
                log.seek(0)
                text = log.read()
                for line in text.splitlines():
                    if line.startswith(MARK):
                        return json.loads(line.removeprefix(MARK)) | {"log": text}
                if ended:
                    raise AssertionError(f"no result from the engine process:\n{text[-5000:]}")
                time.sleep(0.2)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(sys.argv[1])
    model, prompt, tokens = job.pop("model"), job.pop("prompt"), job.pop("tokens", 12)
    llm = LLM(model, dtype="float32", skip_tokenizer_init=True, max_model_len=256, **job)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    (request,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    cache = llm.llm_engine.vllm_config.cache_config
    result = {"tokens": list(request.outputs[0].token_ids), "kv_tokens": cache.num_gpu_blocks * cache.block_size}
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
