"""A mask that cannot be served ends in a clear error while vLLM reads the config, before any weight is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.plugins import load_general_plugins

from llmdrop_vllm import DropMask, family_of
from llmdrop_vllm.checkpoints.checkpoint import check_complete
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.serving.config_hook import checked_decoder
from llmdrop_vllm.serving.stages import OUR_PARTITION, PARTITION
from tests.engines import quick
from tests.tiny import TINY_LLAMA, shapes, write_checkpoint

load_general_plugins()


@pytest.fixture(scope="module", autouse=True)
def looks_at_models_in_this_process():
    with quick():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untouched checkpoint of 8 layers."""
    return write_checkpoint(tmp_path_factory.mktemp("full"), TINY_LLAMA)


def engine_config(path, **options):
    return EngineArgs(model=str(path), skip_tokenizer_init=True, max_model_len=256, **options).create_engine_config()


TELECHAT2 = {"architectures": ["TeleChat2ForCausalLM"], "model_type": "llama"}  # an architecture without a row
NO_BLOCK = {"attention": {"no_op": True}, "ffn": {"no_op": False}}
REFUSED = {
    "index out of range": ({"drop_attn_list": [3, 9]}, "drop_attn_list names layer 9; the model's 8 layers are 0 to 7"),
    "negative": ({"drop_attn_list": [-1]}, "drop_attn_list names layer -1"),
    "duplicated": ({"drop_attn_list": [1, 1]}, "drop_attn_list names layer 1 twice"),
    "string": ({"drop_attn_list": "3"}, "drop_attn_list is '3'; expected a list"),
    "floats": ({"drop_mlp_list": [0.5]}, "drop_mlp_list holds 0.5"),
    "nested": ({"drop_attn_list": [[1, 2]]}, r"drop_attn_list holds \[1, 2\]"),
    "null": ({"drop_attn_list": None}, "drop_attn_list is None; expected a list"),
    "boolean length": ({"drop_attn_list": [True] * 7}, "holds 7 booleans; expected one for each of the 8 layers"),
    "mixed": ({"drop_attn_list": [True, 1]}, "mixes booleans with 1"),
    "another depth": ({"block_configs": [NO_BLOCK] * 7}, "block_configs describes 7 layers; the model has 8"),
    "all attention": ({"drop_attn_list": list(range(8))}, "every one of the 8 attention sublayers is dropped"),
    "unsupported architecture": (
        TELECHAT2 | {"drop_attn_list": [1]},
        r"drop mask \(llm-drop\), and the model would be served undropped: TeleChat2ForCausalLM has no row in the "
        'family table; to add one, see "Adding an architecture" in docs/families.md of llmdrop-vllm; '
        "supported: .*LlamaForCausalLM",
    ),
    "unsupported architecture, another dialect": (
        TELECHAT2 | {"block_configs": [NO_BLOCK] * 8},
        r"drop mask \(nemotron-nas\)",
    ),
    "a layout that has no row": (
        {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "use_parallel_residual": True}
        | {"drop_attn_list": [1]},
        "StableLmForCausalLM has no row .* for layers as this config has them, only for: use_parallel_residual false",
    ),
    "an attention-free model": (
        {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "drop_attn_list": [1]},
        "would be served undropped: FalconMambaForCausalLM has no row in the family table",
    ),
    "a hybrid without its last attention": (
        {"architectures": ["JambaForCausalLM"], "model_type": "jamba", "drop_attn_list": [4]}
        | {"num_hidden_layers": 8, "mamba_dt_rank": 4},
        "leaves no attention beside recurrent mixers; .* at least one must remain",
    ),
    "a window beside recurrent mixers": (
        {"architectures": ["JambaForCausalLM"], "model_type": "jamba", "llmdrop_windows": {"4": 64}}
        | {"mamba_dt_rank": 4},
        "windows are not served beside recurrent mixers",
    ),
    "an MLP of a layer that has none": (
        {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "drop_mlp_list": [0, 1]}
        | {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4},
        r"the mask drops the MLP of layers \[0\], which have none",
    ),
    "explicit name of a layout that has no row": (
        {"architectures": ["DroppedStableLmForCausalLM"], "model_type": "stablelm", "use_parallel_residual": True},
        "DroppedStableLmForCausalLM promises a drop mask, and the config has none",
    ),
    "dialects disagree": (
        {"drop_attn_list": [1], "block_configs": [NO_BLOCK] * 8},
        r"masks disagree: llm-drop says .*\[1\].*nemotron-nas says .*\[0-7\]",
    ),
    "explicit name without a mask": (
        {"architectures": ["DroppedLlamaForCausalLM"]},
        "DroppedLlamaForCausalLM promises a drop mask, and the config has none",
    ),
    "sublayers of different widths": (
        {
            "block_configs": [NO_BLOCK]
            + [{"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": False}}]
            + [{"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": False}}] * 6
        },
        r"block_configs\[1\].attention.n_heads_in_group is 4, the config's is 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_cannot_be_served_are_refused(name, tmp_path):
    entries, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | entries))
    with pytest.raises(ValueError, match=message):
        engine_config(tmp_path)


def test_runtime_masks_are_checked_too(checkpoint):
    with pytest.raises(ValueError, match="drop_attn_list names layer 8"):
        engine_config(checkpoint, hf_overrides={"drop_attn_list": [8]})


def test_a_model_that_vllm_would_run_through_transformers_is_refused(checkpoint):
    with pytest.raises(ValueError, match="TransformersForCausalLM has no row"):
        engine_config(checkpoint, hf_overrides={"drop_attn_list": [1]}, model_impl="transformers")


def test_a_mask_that_another_config_file_hides_is_refused(tmp_path):
    """vLLM prefers params.json where the weights are in Mistral's own format."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"drop_attn_list": [1]}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(TINY_LLAMA))
    model_config = engine_config(other).model_config
    model_config.model = str(tmp_path)
    with pytest.raises(ValueError, match=r"config.json has a drop mask \(llm-drop\) that vLLM does not see"):
        checked_decoder("LlamaForCausalLM", model_config)


def test_null_in_the_transformers_dialect_is_refused(tmp_path):
    """Transformers reads it as no entry at all."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"per_layer_config": None}))
    with pytest.raises(ValueError, match="per_layer_config is None; expected an object"):
        engine_config(tmp_path)


def test_an_architecture_that_another_plugin_took_is_refused(checkpoint, monkeypatch):
    entry = ModelRegistry.models["TeleChat2ForCausalLM"]
    monkeypatch.setitem(ModelRegistry.models, "LlamaForCausalLM", entry)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is registered as .*telechat2.*, which would ignore it"):
        engine_config(checkpoint, hf_overrides={"drop_attn_list": [1]})


def test_a_mask_changes_the_key_of_compiled_code_beyond_the_config(checkpoint, monkeypatch):
    """Code compiled by stock vLLM from the same config.json, before this package was installed, is never loaded."""
    options = {"hf_overrides": {"drop_attn_list": [1]}}
    ours = engine_config(checkpoint, **options).compute_hash()
    assert engine_config(checkpoint, **options).compute_hash() == ours
    monkeypatch.delitem(MODELS_CONFIG_MAP, "LlamaForCausalLM")
    assert engine_config(checkpoint, **options).compute_hash() != ours


def test_a_config_without_a_mask_is_left_as_it_is(checkpoint):
    assert engine_config(checkpoint).additional_config == {}


def test_a_draft_model_is_checked_like_any_other(checkpoint, tmp_path):
    draft = write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [77]})
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="drop_attn_list names layer 77"):
        engine_config(checkpoint, speculative_config=speculative)


def test_block_configs_that_drop_nothing_are_left_alone():
    class ModelConfig:
        hf_config = hf_text_config = {"num_hidden_layers": 1, "block_configs": [{"block_type": "moe"}]}
        model, hf_config_path = "nowhere", None

    assert checked_decoder("NemotronHForCausalLM", ModelConfig()) is None


class TestCheckpoint:
    """Damage is found in the shards' headers."""

    def test_truncated_shard(self, tmp_path):
        write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [3]})
        shard = tmp_path / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=r"model.safetensors \([\d,]+ bytes\) is truncated or damaged"):
            engine_config(tmp_path)

    @pytest.mark.parametrize(
        "name", ["model.layers.2.self_attn.k_proj.", "model.layers.2.mlp.", "model.layers.5.input_"]
    )
    def test_missing_weight_of_a_kept_sublayer(self, name, tmp_path):
        write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [3]}, without=(name,))
        with pytest.raises(ValueError, match=f"lacks weights of sublayers that the mask keeps: {name}"):
            engine_config(tmp_path)

    def test_missing_shard(self, tmp_path):
        write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [3]})
        index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(
            ValueError, match=r"model-00002-of-00002.safetensors is missing; .*index.json says that it holds model.norm"
        ):
            engine_config(tmp_path)

    def test_index_that_names_what_no_shard_holds(self, tmp_path):
        write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [3]})
        index = {"weight_map": {"model.nrom.weight": "model.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"lacks weights .* keeps: model.nrom.weight"):
            engine_config(tmp_path)

    def test_index_may_still_name_what_was_dropped(self, tmp_path):
        write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [3]}, strip=True)
        names = dict.fromkeys(shapes(TINY_LLAMA), "model.safetensors")
        names["model.layers.3.self_attn.o_proj.weight"] = "model-of-dropped.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        assert engine_config(tmp_path).model_config.architecture == "LlamaForCausalLM"

    def test_draft_model(self, checkpoint, tmp_path):
        draft = write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [3]}, without=("model.layers.2.mlp.",))
        speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
        with pytest.raises(ValueError, match=r"lacks weights .* keeps: model.layers.2.mlp.down_proj.weight"):
            engine_config(checkpoint, speculative_config=speculative)

    def test_layers_that_were_left_unquantized_lack_no_scales(self, tmp_path):
        names = [
            f"model.layers.{layer}.mlp.up_proj.{name}" for layer in range(3) for name in ("weight", "weight_scale")
        ]
        names.remove("model.layers.1.mlp.up_proj.weight_scale")
        save_file({name: np.zeros(1) for name in names}, tmp_path / "model.safetensors")
        family, mask = family_of("LlamaForCausalLM"), DropMask(3, attention=(0, 1, 2))
        check_complete(tmp_path, family, mask)
        save_file({name: np.zeros(1) for name in names[1:]}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="model.layers.0.mlp.up_proj.weight"):
            check_complete(tmp_path, family, mask)

    def test_index_that_is_none(self, tmp_path):
        write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [3]})
        (tmp_path / "model.safetensors.index.json").write_text("[]")
        with pytest.raises(ValueError, match="is not a safetensors index"):
            engine_config(tmp_path)


class TestPipeline:
    """The stages of a dropped model are planned before any worker starts."""

    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield
        os.environ.pop(PARTITION, None)
        os.environ.pop(OUR_PARTITION, None)

    def test_stages_are_set_and_do_not_outlive_their_engine(self, checkpoint):
        engine_config(checkpoint, hf_overrides={"drop_attn_list": [4, 5, 6, 7]}, pipeline_parallel_size=2)
        assert os.environ[PARTITION] == "2,6"
        engine_config(checkpoint)
        assert PARTITION not in os.environ

    def test_the_users_partition_stands(self, checkpoint, monkeypatch):
        monkeypatch.setenv(PARTITION, "3,5")
        engine_config(checkpoint, hf_overrides={"drop_attn_list": [4, 5, 6, 7]}, pipeline_parallel_size=2)
        assert os.environ[PARTITION] == "3,5"

    def test_a_stage_without_attention_is_refused(self, checkpoint, monkeypatch):
        monkeypatch.setenv(PARTITION, "4,4")
        with pytest.raises(ValueError, match="4,4 leaves stage 1 without attention.* use 2,6"):
            engine_config(checkpoint, hf_overrides={"drop_attn_list": [4, 5, 6, 7]}, pipeline_parallel_size=2)

    def test_fewer_attention_sublayers_than_stages(self, checkpoint):
        with pytest.raises(ValueError, match="1 attention sublayers remain for 2 pipeline stages"):
            engine_config(checkpoint, hf_overrides={"drop_attn_list": list(range(7))}, pipeline_parallel_size=2)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("mask", "without", "error"),
    [
        ("[99]", (), "drop_attn_list names layer 99; the model's 8 layers are 0 to 7"),
        ("[3]", ("model.layers.2.self_attn.v",), "that the mask keeps: model.layers.2.self_attn.v_proj.weight"),
    ],
)
def test_the_vllm_command_ends_with_one_line_and_not_zero(mask, without, error, tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA, without=without)
    command = [Path(sys.executable).with_name("vllm"), "serve", tmp_path, "--skip-tokenizer-init"]
    overrides = ["--hf-overrides", f'{{"drop_attn_list": {mask}}}', "--gpu-memory-utilization", "0.3"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("llmdrop: error: ")
    assert done.stderr.rstrip().endswith(error)
    assert "Traceback" not in done.stdout + done.stderr
