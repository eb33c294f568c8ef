"""Every name of vLLM's that this package imports or calls by its parameters, in one list: does this vLLM have it?

Whether it still does the same is what the tests named `test_contact.py` ask.
"""

import inspect
from collections.abc import Iterator
from pkgutil import resolve_name

# By module: names, and after a name in parentheses the parameters that are relied on.
CONTACTS = {
    "vllm": "LLM LLM.collective_rpc(method,args) SamplingParams(max_tokens,temperature,seed,prompt_logprobs) envs",
    "vllm.config": "CacheConfig CompilationMode CUDAGraphMode ModelConfig VllmConfig",
    "vllm.config.speculative": "SpeculativeConfig.hf_config_override",
    "vllm.distributed": "cleanup_dist_env_and_memory",
    "vllm.distributed.parallel_state": "get_pp_group get_tp_group",
    "vllm.distributed.utils": "get_pp_indices(num_hidden_layers,pp_rank,pp_size)",
    "vllm.engine.arg_utils": "EngineArgs(hf_overrides,worker_extension_cls,enforce_eager)",
    "vllm.engine.protocol": "EngineClient.errored",
    "vllm.entrypoints.cli.main": "main",
    "vllm.entrypoints.cli.serve": "ServeSubcommand.subparser_init",
    "vllm.entrypoints.launchers.app": "build_app",
    "vllm.entrypoints.launchers.launcher": "serve_http terminate_if_errored",
    "vllm.entrypoints.openai.models.api_router": "show_available_models(raw_request)",
    "vllm.exceptions": "MaxQueuedTokensError QueueOverflowError",
    "vllm.logger": "init_logger",
    "vllm.model_executor.layers.attention": "Attention(per_layer_sliding_window,prefix)",
    "vllm.model_executor.layers.attention_layer_base": "AttentionLayerBase.get_kv_cache_spec(vllm_config)",
    "vllm.model_executor.model_loader.reload": "finalize_layerwise_reload",
    "vllm.model_executor.models.config": "MODELS_CONFIG_MAP VerifyAndUpdateConfig.verify_and_update_config(vllm_config)"
    " VerifyAndUpdateConfig.verify_and_update_model_config(model_config)",
    "vllm.model_executor.models.registry": "ModelRegistry.models ModelRegistry.register_model(model_arch,model_cls)"
    " ModelRegistry.get_supported_archs ModelRegistry _SPECULATIVE_DECODING_MODELS",
    "vllm.model_executor.models.transformers.base": "Base.recursive_replace Base._create_attention_instances(prefix)",
    "vllm.model_executor.models.transformers.fusers": "AttentionFuser",
    "vllm.model_executor.models.utils": "PPMissingLayer WeightsMapper.map_name(key) WeightsMapper.get_rename_mapper"
    " _model_to_pp_missing_layer_names",
    "vllm.platforms": "current_platform",
    "vllm.plugins": "load_general_plugins",
    "vllm.plugins.endpoint_plugins.interface": "EndpointPlugin attach_endpoint_plugins",
    "vllm.sampling_params": "RequestOutputKind",
    "vllm.utils.argparse_utils": "FlexibleArgumentParser",
    "vllm.v1.attention.backend": "AttentionBackend AttentionCGSupport CommonAttentionMetadata(seq_lens,num_reqs)"
    " subclass_attention_backend",
    "vllm.v1.core.kv_cache_utils": "resolve_block_hashes",
    "vllm.v1.core.single_type_kv_cache_manager": "SlidingWindowManager._remove_blocks_in_range"
    " SlidingWindowManager.find_longest_cache_hit(block_hashes,max_length,kv_cache_group_ids,block_pool,kv_cache_spec)",
    "vllm.v1.engine.exceptions": "EngineDeadError",
    "vllm.v1.kv_cache_interface": "AttentionSpec FullAttentionSpec KVCacheSpec MambaSpec.state_content_size_bytes"
    " SlidingWindowSpec(sliding_window)",
    "vllm.v1.kv_cache_spec_registry": "KVCacheSpecRegistry",
    "vllm.v1.metrics.prometheus": "get_prometheus_registry",
    "vllm.v1.worker.gpu_model_runner": "GPUModelRunner.profile_run",
    "vllm.v1.worker.worker_base": "WorkerBase.get_model",
}


def contacts() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Module, name in it and parameters that it must have, of each."""
    for module, names in CONTACTS.items():
        for said in names.split():
            name, _, parameters = said.rstrip(")").partition("(")
            yield module, name, tuple(filter(None, parameters.split(",")))


def not_held() -> list[str]:
    """For people, what this vLLM has no longer: `module:name`, and the parameters that are gone. Imports vLLM."""
    return [found for contact in contacts() if (found := lacking(*contact))]


def lacking(module: str, name: str, parameters: tuple[str, ...] = ()) -> str:
    """What is missing of a contact; empty where it holds."""
    try:
        there = resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError) as error:
        return f"{module}:{name} ({type(error).__name__})"
    # Of a class its constructor's.
    gone = set(parameters) - (inspect.signature(there).parameters.keys() if parameters else set())
    return f"{module}:{name} without {', '.join(sorted(gone))}" if gone else ""
