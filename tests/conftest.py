"""Test processes that run side by side get a core each: threads that share a core wait for each other."""

import os

import hypothesis

# What an example takes is the machine's and its neighbours' business.
hypothesis.settings.register_profile("without a deadline", deadline=None)
hypothesis.settings.load_profile("without a deadline")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    import torch

    torch.set_num_threads(1)
    core = int(worker.removeprefix("gw")) % (os.cpu_count() or 1)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


def pytest_collection_modifyitems(items):
    """What waits for processes of its own goes first, with the file it is in, so that little is left to one core."""
    slow = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in slow)
