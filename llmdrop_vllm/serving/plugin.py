"""Where this package meets vLLM's registries: model classes by architecture, and hooks that see a config first."""

import multiprocessing

import torch
import vllm
from transformers import AutoConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from llmdrop_vllm.architectures.families import BY_ARCHITECTURE, EXPLICIT_PREFIX
from llmdrop_vllm.architectures.wrappers import WRAPPERS
from llmdrop_vllm.checkpoints.configuration_nemotron_nas import NemotronNasConfig
from llmdrop_vllm.serving.config_hook import MODELS_MODULE, ConfigHook
from llmdrop_vllm.serving.drafts import draft_config
from llmdrop_vllm.versions import TESTED_VLLM, was_tested

logger = init_logger("vllm.llmdrop")


def register_with_vllm() -> None:
    """Replace the supported architectures' entries by droppable ones, and put a config hook before all of them.

    The hook sees every architecture, because a mask on one that cannot drop must be refused, not ignored.
    """
    if current_platform.is_cpu():
        # vLLM's attention for CPUs uses AMX tiles without having asked Linux for them. A first prompt that is so short
        # that nothing else has asked before would end the engine with an illegal instruction.
        torch.cpu._init_amx()
    warn_if_untested(vllm.__version__)
    # Checkpoints of Nemotron-NAS bring a config class as remote code otherwise.
    AutoConfig.register(NemotronNasConfig.model_type, NemotronNasConfig, exist_ok=True)
    SpeculativeConfig.hf_config_override = staticmethod(draft_config)
    for architecture in (*BY_ARCHITECTURE, *WRAPPERS):
        entry = ModelRegistry.models.get(architecture)
        stock = getattr(entry, "module_name", MODELS_MODULE)
        if stock == MODELS_MODULE:  # this vLLM lacks the architecture, or it is registered already
            continue
        target = f"{MODELS_MODULE}:{architecture}@{stock}.{entry.class_name}"
        ModelRegistry.register_model(architecture, target)
        ModelRegistry.register_model(EXPLICIT_PREFIX + architecture, target)
    for architecture in [*ModelRegistry.get_supported_archs()]:
        if not isinstance(MODELS_CONFIG_MAP.get(architecture), ConfigHook):
            # What vLLM has for an architecture is for it under our name as well.
            inner = MODELS_CONFIG_MAP.get(architecture.removeprefix(EXPLICIT_PREFIX))
            inner = inner.inner if isinstance(inner, ConfigHook) else inner
            MODELS_CONFIG_MAP[architecture] = ConfigHook(architecture, inner)


def warn_if_untested(version: str) -> None:
    """One line, by the process that starts the others, for a vLLM whose internals may have moved."""
    if not was_tested(version) and multiprocessing.parent_process() is None:
        logger.warning_once(
            "llmdrop-vllm was tested with vLLM %s, and this is %s: `llmdrop doctor` says whether what it touches is "
            "still there, and `make canary` in its sources runs the tests of that",
            " and ".join(TESTED_VLLM),
            version,
        )
