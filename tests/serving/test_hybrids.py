"""What the contract of all architectures leaves out: hybrids compiled or in bfloat16, models without a class."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, PretrainedConfig
from vllm.model_executor.layers.mamba.gdn import olmo_gdn_linear_attn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from llmdrop_vllm import DropMask
from llmdrop_vllm.architectures.families import no_row
from llmdrop_vllm.architectures.refused import REFUSED, UNTRIED
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError
from tests.architectures.cases import CASES, FULL, GATED_DELTA_NET, LAYERS, Case, model_of
from tests.architectures.reference import layers_of, skipping
from tests.engines import engine, greedy
from tests.tiny import tensor

PROMPT = [*range(3, 43)]
# Of each kind one goes and one stays.
MASK = DropMask(LAYERS, attention=(0, 2), mlp=(1,))


def runtime(mask):
    return {"hf_overrides": mask.to_config("runtime")}


@pytest.mark.parametrize("name", ["Lfm2ForCausalLM", "GraniteMoeHybridForCausalLM-dense", "FalconH1ForCausalLM"])
def test_compiled_agrees_with_eager(name, tmp_path, monkeypatch):
    """A short convolution, and Mamba 2 in place of attention and beside it."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)
    directory = CASES[name].save(model_of(name), tmp_path / "model")
    found = []
    for eager in (True, False):
        with engine(directory, **runtime(MASK), enforce_eager=eager) as llm:
            found.append(greedy(llm, PROMPT))
    assert found[0][0] == found[1][0]
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-4)


def test_gated_delta_nets_by_vllms_own_kernels(tmp_path, monkeypatch):
    """In bfloat16: with a mask, eager or compiled, as near to float32 as without one."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    name = "Qwen3NextForCausalLM"
    model = model_of(name)
    directory = CASES[name].save(model, tmp_path / "model")
    errors = []
    for mask, eager in ((DropMask(LAYERS), True), (MASK, True), (MASK, False)):
        with torch.no_grad(), skipping(model, CASES[name].family, mask):
            expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
        with engine(directory, **runtime(mask), dtype="bfloat16", enforce_eager=eager) as llm:
            found = torch.tensor(greedy(llm, PROMPT)[2])
        errors.append((found - expected).abs().mean())
    whole, *masked = errors
    assert max(masked) < 1.5 * whole


@pytest.mark.parametrize("one_kind", [False, True])
@pytest.mark.parametrize("gone", ["sliding_attention", FULL])
def test_all_attention_of_one_kind_may_go(gone, one_kind, tmp_path):
    """With vLLM's manager for both kinds, and without it; what is seen of a window is less than the prompt."""
    case = CASES["GptOssForCausalLM"]
    model = deepcopy(model_of(case.name))
    kinds = model.config.layer_types
    model.config.sliding_window = 16
    for layer in layers_of(model):
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 16
    mask = DropMask(LAYERS, attention=tuple(layer for layer, kind in enumerate(kinds) if kind == gone))
    assert 0 < len(mask.attention) < LAYERS
    with torch.no_grad(), skipping(model, case.family, mask):
        expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
    case.save(model, tmp_path)
    with engine(tmp_path, **runtime(mask), disable_hybrid_kv_cache_manager=one_kind) as llm:
        assert greedy(llm, PROMPT)[2] == pytest.approx(expected.tolist(), abs=1e-4)
        (group,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    assert len(group.layer_names) == len(mask.kept_attention)


class Plamo3Config(PretrainedConfig):
    model_type = "plamo3"


def test_plamo_3_is_built_without_its_norms(tmp_path):
    """Its constructor gives each norm's weight a loader, and that of a dropped one has none to give."""
    AutoConfig.register("plamo3", Plamo3Config, exist_ok=True)
    entries = {"architectures": ["Plamo3ForCausalLM"], "model_type": "plamo3", "num_hidden_layers": LAYERS}
    entries |= {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 256}
    entries |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6}
    entries |= {"layer_types": [FULL] * LAYERS, "interleaved_sliding_window": [None] * LAYERS}
    entries |= {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}}, "window_size": 256}
    entries |= {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(entries))

    with engine(tmp_path, load_format="dummy") as llm:
        (kept,) = llm.apply_model(lambda model: {name: tuple(each.shape) for name, each in model.named_parameters()})
    # vLLM has packed these for the CPU.
    packed = {"qkv_proj": (256, 64), "o_proj": (64, 128), "gate_up_proj": (192, 64), "down_proj": (64, 96)}
    shapes = {name: packed.get(name.split(".")[-2], shape) for name, shape in kept.items()}
    weights = {name: tensor(name, shape, 0) for name, shape in shapes.items()}
    gone = [f".{layer}.mixer.o_proj." for layer in MASK.attention] + [f".{layer}.mlp.down_proj." for layer in MASK.mlp]
    silent = {name: weights[name] * (not any(part in name for part in gone)) for name in weights}

    def served(tensors, **options):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with engine(tmp_path, **options) as llm:
            return greedy(llm, PROMPT)

    whole, expected, found = served(weights), served(silent), served(weights, **runtime(MASK))
    assert expected[2] != pytest.approx(whole[2], abs=1e-2)
    assert found[0] == expected[0]
    assert found[2] == pytest.approx(expected[2], abs=1e-5)


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_no_row_can_be_written_for_is_refused_with_the_reason(architecture):
    assert no_row(architecture) == f"{architecture} cannot go without sublayers: {REFUSED[architecture]}"


@pytest.mark.parametrize("architecture", UNTRIED)
def test_what_has_no_row_yet_is_refused_with_the_reason(architecture, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "num_hidden_layers": LAYERS}))
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2).numpy()}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"{architecture} has no row in the family table yet: {UNTRIED[architecture]}"
    ):
        Checkpoint.open(tmp_path)


# Transformers saves the norms beside a recurrent mixer under other names than published checkpoints and vLLM have.
PUBLISHED = {"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"}


@pytest.mark.parametrize(
    ("renames", "message"),
    [
        (PUBLISHED, "list indices must be integers or slices, not NoneType"),
        ({}, r"no module or parameter named 'layers\.0\.attention_layer_norm'"),
    ],
    ids=["as published", "as Transformers saves it"],
)
def test_vllm_loads_no_checkpoint_of_olmo_hybrid(renames, message, tmp_path, monkeypatch):
    """Once it does, this fails, and OLMo hybrid can have a row: take it out of `UNTRIED`."""
    case = Case("OlmoHybridForCausalLM", "olmo_hybrid", GATED_DELTA_NET | {"linear_num_key_heads": 4})
    weights = case.write(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    for theirs, published in renames.items():
        tensors = {name.replace(theirs, published): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    monkeypatch.setattr(olmo_gdn_linear_attn, "set_triton_allocator", lambda device: None)  # there is none on CPUs
    with pytest.raises((TypeError, ValueError), match=message), engine(tmp_path):
        pass
