"""Test processes that run side by side get a core each: threads that share a core wait for each other."""

import os

import torch

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)
    core = int(worker.removeprefix("gw")) % (os.cpu_count() or 1)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))
