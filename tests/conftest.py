"""Test processes that run side by side get a core each: threads that share a core wait for each other.

What vLLM lacks on CPUs without AVX-512 is skipped there.
"""

import gc
import os
import re

import hypothesis
import pytest
import torch
from transformers import PreTrainedConfig

from tests import warm

LACKING = re.compile("has no attribute 'cpu_gemm_wna16'|FP8 KV cache on CPU requires x86 with AVX-512")

# What an example takes is the machine's and its neighbours' business.
hypothesis.settings.register_profile("without a deadline", deadline=None)
hypothesis.settings.load_profile("without a deadline")

warm.install()

# Transformers writes out a config whenever it reads one or sets one in another, for messages that are not shown.
PreTrainedConfig.__repr__ = object.__repr__

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.sched_setaffinity(0, {core})  # what it starts takes no other core either, but for engines that ask for two
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


def pytest_collection_modifyitems(items):
    """What waits for processes of its own goes first, with the file it is in, so that little is left to one core."""
    slow = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What was imported stays, and no search for garbage goes through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    try:
        return (yield)
    except (AttributeError, NotImplementedError) as error:
        if LACKING.search(str(error)) and torch.backends.cpu.get_cpu_capability() != "AVX512":
            pytest.skip(f"this CPU has no AVX-512: {error}")
        raise
