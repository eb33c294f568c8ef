"""Every vLLM internal that this package touches, one test each: what fails here is what a new vLLM changed."""

import inspect
from dataclasses import fields

import pytest
import torch
from vllm import LLM
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, ModelConfig, ParallelConfig, VllmConfig
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.attention import Attention, chunked_local_attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.transformers.base import Base
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer, WeightsMapper, is_pp_missing_parameter
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

from llmdrop_vllm.architectures.families import BY_ARCHITECTURE
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.serving import plugin
from llmdrop_vllm.serving.config_hook import ConfigHook
from llmdrop_vllm.serving.models import Droppable
from llmdrop_vllm.serving.passthrough import DroppedNorm, DroppedSublayer
from llmdrop_vllm.serving.peers import ENGINE
from llmdrop_vllm.serving.plugin import register_with_vllm
from llmdrop_vllm.serving.stages import PARTITION
from llmdrop_vllm.serving.weights import forget_missing_layers
from llmdrop_vllm.serving.window_cache import WindowManager, WindowSpec

load_general_plugins()


def test_general_plugins_have_registered_every_architecture_of_the_table():
    for architecture in BY_ARCHITECTURE:
        for name in (architecture, f"Dropped{architecture}"):
            model = ModelRegistry.models[name].load_model_cls()
            assert issubclass(model, Droppable)


def test_registering_again_changes_nothing():
    models, hooks = dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)
    register_with_vllm()
    assert (ModelRegistry.models, MODELS_CONFIG_MAP) == (models, hooks)


def test_registry_entries_name_module_and_class():
    entry = ModelRegistry.models["MambaForCausalLM"]
    assert (entry.module_name, entry.class_name) == ("vllm.model_executor.models.mamba", "MambaForCausalLM")


def test_every_architecture_has_our_config_hook_before_its_own():
    assert all(isinstance(MODELS_CONFIG_MAP[name], ConfigHook) for name in ModelRegistry.get_supported_archs())
    assert issubclass(MODELS_CONFIG_MAP["Gemma3TextModel"].inner, VerifyAndUpdateConfig)


@pytest.mark.parametrize("hook", ["verify_and_update_config", "verify_and_update_model_config"])
def test_config_hooks_are_called_by_their_names(hook):
    assert hasattr(VerifyAndUpdateConfig, hook)
    caller = VllmConfig if hook == "verify_and_update_config" else ModelConfig
    assert f".{hook}(self)" in inspect.getsource(caller)


def test_what_a_model_lacks_is_remembered_by_its_id():
    """A model at the address of one that is gone lost its weights by this."""
    layer = torch.nn.Module()
    layer.attn = DroppedSublayer()
    assert is_pp_missing_parameter("attn.weight", layer)
    layer.attn = torch.nn.Linear(1, 1)
    assert is_pp_missing_parameter("attn.weight", layer)
    forget_missing_layers(layer)
    assert not is_pp_missing_parameter("attn.weight", layer)


def test_attention_registers_itself_for_kv_cache_in_the_static_forward_context():
    assert CompilationConfig().static_forward_context == {}
    source = inspect.getsource(Attention.__init__)
    assert "static_forward_context[prefix] = self" in source
    assert "self.layer_name = prefix" in source


def test_linear_layers_carry_their_dotted_name():
    assert "self.prefix = prefix" in inspect.getsource(LinearBase.__init__)


def test_kv_cache_specs_tell_bytes_and_tokens_of_a_page():
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    assert spec.page_size_bytes // spec.block_size == 2 * 2 * 32 * 4


def test_pipeline_stages_follow_the_environment(monkeypatch):
    monkeypatch.setenv(PARTITION, "2,6")
    assert [get_pp_indices(8, rank, 2) for rank in range(2)] == [(0, 2), (2, 8)]


def test_ranks_have_met_before_a_model_is_built_and_stages_may_be_set_until_then():
    built = inspect.getsource(WorkerProc.__init__)
    assert built.index("init_device()") < built.index("load_model()") < built.index("enable_envs_cache()")
    assert "local_rank" in inspect.signature(GroupCoordinator).parameters
    assert {"nnodes", "node_rank", "master_addr"} <= {field.name for field in fields(ParallelConfig)}


def test_engines_are_processes_of_a_known_name():
    assert f'else "{ENGINE}"' in inspect.getsource(CoreEngineProcManager.__init__)


def test_weight_loaders_skip_what_subclasses_ppmissinglayer():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.input_layernorm, self.mlp = DroppedSublayer(), DroppedNorm(), torch.nn.Linear(2, 2)

    assert issubclass(DroppedSublayer, PPMissingLayer)
    assert issubclass(DroppedNorm, PPMissingLayer)
    layer = Layer()
    weights = {"self_attn.qkv_proj.weight": torch.ones(1), "input_layernorm.weight": torch.ones(1)}
    weights["mlp.weight"] = torch.full((2, 2), 3.0)
    assert AutoWeightsLoader(layer).load_weights(weights.items()) == {"mlp.weight"}
    assert layer.mlp.weight.sum() == 12
    assert is_pp_missing_parameter("self_attn.o_proj.weight", layer)


def test_attention_is_told_of_its_window_and_its_place():
    parameters = inspect.signature(Attention.__init__).parameters
    assert parameters["per_layer_sliding_window"].default is None
    assert parameters["prefix"].default == ""
    made = inspect.getsource(Attention.__init__)
    assert made.index("self.attn_backend = ") < made.index("self.impl = ")  # the kernels' own, not asked for again


def test_the_scheduler_asks_a_windows_manager_where_blocks_go_and_which_prefixes_are_there():
    asked = inspect.getsource(SlidingWindowManager.remove_skipped_blocks)
    assert "_remove_blocks_in_range(request_id, 0, num_skipped_blocks)" in asked
    parameters = [*inspect.signature(SlidingWindowManager.find_longest_cache_hit).parameters]
    assert parameters[:5] == [*inspect.signature(WindowManager.find_longest_cache_hit).parameters][:5]
    window = WindowSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=256, window=64)
    assert KVCacheSpecRegistry.get_manager_class(window) is WindowManager


def test_builders_of_attention_take_a_batch_whose_rows_are_parts_of_requests():
    """As vLLM's own for chunked attention."""
    chunked = inspect.getsource(chunked_local_attention.create_chunked_local_attention_backend)
    assert "def build(" in chunked
    assert "def update_block_table(" in chunked
    assert {field.name for field in fields(CommonAttentionMetadata)} >= {"seq_lens", "block_table_tensor", "num_reqs"}


def test_the_transformers_backend_makes_an_attention_layer_where_its_fusers_say():
    assert AttentionFuser("a dropped sublayer").scale(torch.nn.Module()) is None
    assert AttentionFuser("a dropped sublayer").sinks(torch.nn.Module()) is None
    build = inspect.getsource(Base.__init__)
    assert build.index("self.model: PreTrainedModel = ") < build.index("self.recursive_replace()")
    assert build.index("self.recursive_replace()") < build.index("self._create_attention_instances(prefix)")
    attend = inspect.getsource(Base._create_attention_instances)
    assert "attn_prefix, attn_fuser = self.attention_fusers[i]" in attend
    assert "setattr(attn_module, VLLM_ATTN_ATTR, attn_instance)" in attend


def test_lora_loading_asks_the_models_mapper_for_every_name():
    asked = []

    class Mapper(WeightsMapper):
        def map_name(self, key):
            asked.append(key)
            return super().map_name(key)

    mapper = Mapper().get_rename_mapper()
    assert isinstance(mapper, Mapper)
    parse_fine_tuned_lora_name("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight", mapper)
    assert asked == ["model.layers.1.mlp.up_proj.lora_A.weight"]


def test_a_worker_takes_an_extension_that_finds_the_model_and_can_warm_up():
    assert "worker_extension_cls" in inspect.getsource(WorkerWrapperBase.init_worker)
    assert callable(WorkerBase.get_model)
    assert callable(GPUModelRunner.profile_run)
    assert "self.intermediate_tensors:" in inspect.getsource(GPUModelRunner.__init__)
    assert {"args", "method"} <= inspect.signature(LLM.collective_rpc).parameters.keys()


@pytest.mark.parametrize("eager", [True, False])
def test_a_compiled_model_is_told_from_one_that_is_not(eager):
    args = EngineArgs(model=str(MODEL), skip_tokenizer_init=True, max_model_len=256, enforce_eager=eager)
    compilation = args.create_engine_config().compilation_config
    assert (compilation.mode == CompilationMode.NONE) == eager
    if eager:
        assert compilation.cudagraph_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize(("version", "lines"), [("0.33.1+cpu", 0), ("0.34.0", 1), ("0.3.3", 1)])
def test_a_vllm_that_was_not_tested_is_said_in_one_line(version, lines, monkeypatch):
    said = []
    monkeypatch.setattr(plugin.logger, "warning_once", lambda text, *words: said.append(text % words))
    plugin.warn_if_untested(version)
    assert len(said) == lines
    assert all(f"vLLM 0.32 and 0.33, and this is {version}" in line and "llmdrop doctor" in line for line in said)
