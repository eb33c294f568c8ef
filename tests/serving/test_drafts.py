"""What drafts for a model with a mask: heads made for the full one, MTP layers of its own checkpoint, other models."""

import inspect
import json
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from safetensors.numpy import load_file, save_file
from vllm.config.speculative import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.registry import ModelRegistry
from vllm.plugins import load_general_plugins
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.serving.drafts import STOCK_DRAFT_CONFIG, check_what_it_reads, draft_config, is_draft_head
from tests.engines import engine, greedy
from tests.tiny import TINY_LLAMA, shapes, tensor, write_checkpoint

load_general_plugins()

PROMPT = [*range(3, 103)]
MASK = {"drop_attn_list": [0, 2, 5], "drop_mlp_list": [2, 6]}
HIDDEN = TINY_LLAMA["hidden_size"]
# vLLM finds the MTP layers of this one by its architecture's name, with any type of model.
MIMO = TINY_LLAMA | {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "hidden_size": 128}
MTP = {"num_nextn_predict_layers": 1}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("full"), TINY_LLAMA)


@pytest.fixture(scope="module")
def zeroed(tmp_path_factory):
    """The full model with what the mask drops adding nothing: the reference, for stock vLLM."""
    path = write_checkpoint(tmp_path_factory.mktemp("zeroed"), TINY_LLAMA)
    weights = load_file(path / "model.safetensors")
    for layers, output in ((MASK["drop_attn_list"], "self_attn.o_proj"), (MASK["drop_mlp_list"], "mlp.down_proj")):
        for layer in layers:
            weights[f"model.layers.{layer}.{output}.weight"] *= 0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(params=["eagle", "eagle3"])
def head(request, tmp_path):
    """(method, a draft of one layer): EAGLE's goes by the last hidden states, EAGLE-3's by those of three layers."""
    third = request.param == "eagle3"
    layer = {name: shape for name, shape in shapes(TINY_LLAMA | {"num_hidden_layers": 1}).items() if ".0." in name}
    prefix, inputs = ("midlayer", 2 * HIDDEN) if third else ("layers.0", HIDDEN)
    found = {"fc.weight": (HIDDEN, 3 * HIDDEN if third else 2 * HIDDEN)}
    for name, shape in layer.items():
        projects = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
        found[name.replace("model.layers.0", prefix)] = (shape[0], inputs) if projects else shape
    if third:
        found |= {"midlayer.hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,), "lm_head.weight": (256, HIDDEN)}
    else:
        del found["layers.0.input_layernorm.weight"]
    save_file({name: tensor(name, shape, 5) for name, shape in found.items()}, tmp_path / "model.safetensors")
    config = TINY_LLAMA | {"num_hidden_layers": 1, "draft_vocab_size": 256}
    if third:
        config["architectures"] = ["LlamaForCausalLMEagle3"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return request.param, tmp_path


def with_mtp(directory, config, without=()):
    """A MiMo checkpoint with one MTP layer."""
    found = shapes(config)
    width = config["hidden_size"]
    found |= {name.replace("layers.0", "mtp_layers.0"): shape for name, shape in found.items() if "layers.0." in name}
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        found[f"model.mtp_layers.0.{norm}.weight"] = (width,)
    found["model.mtp_layers.0.input_proj.weight"] = (width, 2 * width)
    for name in [name for name in found if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        found[name.replace("weight", "bias")] = found[name][:1]
    kept = {name: tensor(name, shape, 0) for name, shape in found.items() if not name.startswith(without)}
    directory.mkdir()
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@contextmanager
def seen_drafts():
    """The drafts of each step, as token ids."""
    drafts, stock = [], SpecDecodeBaseProposer.propose

    def propose(self, *args, **kwargs):
        found = stock(self, *args, **kwargs)
        drafts.append(found.tolist())
        return found

    with patch.object(SpecDecodeBaseProposer, "propose", propose):
        yield drafts


def drafted(path, speculative, **options):
    """(text, drafts), each as token ids."""
    speculative = {"num_speculative_tokens": 1} | speculative
    with seen_drafts() as drafts, engine(path, speculative_config=speculative, **options) as llm:
        drafts.clear()  # those of a warm-up
        return greedy(llm, PROMPT, tokens=6, prompt_logprobs=None)[0], drafts


def override(config):
    """As an override may be in Python; vLLM applies it to a draft as well."""
    config.update(MASK)
    return config


def test_heads_draft_from_what_the_masked_model_computes(head, full, zeroed, tmp_path):
    method, path = head
    speculative = {"method": method, "model": str(path), "num_speculative_tokens": 2}
    expected = drafted(zeroed, speculative)
    assert drafted(full, speculative)[1] != expected[1]
    assert drafted(full, speculative, hf_overrides=MASK) == expected
    assert drafted(full, speculative, hf_overrides=override) == expected
    # As those who train a head may copy the model's config.
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | MASK))
    assert drafted(full, speculative, hf_overrides=MASK) == expected


def test_mtp_layers_draft_wherever_the_mask_is_said(tmp_path):
    gone = tuple(f"model.layers.{layer}.{part}." for layer in (0, 2, 5) for part in ("self_attn", "input_layernorm"))
    gone += tuple(f"model.layers.{layer}.{part}." for layer in (2, 6) for part in ("mlp", "post_attention_layernorm"))
    mtp = {"method": "mtp"}
    expected = drafted(with_mtp(tmp_path / "full", MIMO | MTP), mtp, hf_overrides=MASK)
    assert len(expected[1]) > 3
    assert drafted(with_mtp(tmp_path / "config", MIMO | MTP | MASK), mtp) == expected
    ours = MIMO | MTP | MASK | {"architectures": ["DroppedMiMoForCausalLM"]}
    assert drafted(with_mtp(tmp_path / "stripped", ours, without=gone), mtp) == expected


def named(name, **entries):
    return SpeculativeConfig.hf_config_override(SimpleConfig(architectures=[name], **entries))


class SimpleConfig(SimpleNamespace):
    model_type = "llama"

    def update(self, entries):
        self.__dict__.update(entries)


def test_a_checkpoint_of_ours_without_mtp_layers_drafts_as_a_whole():
    assert named("DroppedMiMoForCausalLM", num_nextn_predict_layers=1).architectures == ["MiMoMTPModel"]
    assert named("DroppedMiMoForCausalLM").architectures == ["DroppedMiMoForCausalLM"]
    assert named("DroppedLlamaForCausalLM").architectures == ["DroppedLlamaForCausalLM"]
    assert SpeculativeConfig.hf_config_override is draft_config


def test_the_config_of_a_draft_is_asked_for_as_vllm_asks_its_own():
    """vLLM 0.33 hands it what names the MTP layers of the Transformers backend."""
    (_, *theirs), (_, *ours) = (inspect.signature(each).parameters for each in (STOCK_DRAFT_CONFIG, draft_config))
    assert theirs == ours[: len(theirs)]
    if theirs:
        given = {"architectures": ["TransformersForMTP"], "n_predict": 1}
        config = SimpleConfig(architectures=["DroppedLlamaForCausalLM"])
        assert SpeculativeConfig.hf_config_override(config, given).architectures == ["TransformersForMTP"]


def test_a_draft_that_reads_dropped_keys_is_refused():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {"num_hidden_layers": 4, "layer_types": kinds, "model_type": "gemma4_text", "num_kv_shared_layers": 0}
    draft = SimpleNamespace(
        architecture="Gemma4MTPModel", model="draft", hf_text_config=SimpleNamespace(layer_types=kinds[:1])
    )
    assert Decoder.of(config | {"drop_attn_list": [2]}, "Gemma4ForCausalLM").mask
    check_what_it_reads(draft, Decoder.of(config | {"drop_attn_list": [0, 3]}, "Gemma4ForCausalLM"))
    with pytest.raises(MaskError, match=r"reads the keys and values of layers \[2\]; .* in \[2\]"):
        check_what_it_reads(draft, Decoder.of(config | {"drop_attn_list": [2]}, "Gemma4ForCausalLM"))


@pytest.mark.parametrize("key", ["hf_overrides", "drop_attn_list", "llmdrop_windows"])
def test_a_mask_for_the_draft_alone_is_not_lost_on_the_command_line(key, full):
    """vLLM has no entry for it and refuses what it does not know; a checkpoint has to say it."""
    speculative = {"method": "draft_model", "model": str(full), "num_speculative_tokens": 2, key: MASK}
    with pytest.raises(ValueError, match="Unexpected keyword argument"):
        EngineArgs(str(full), skip_tokenizer_init=True, speculative_config=speculative).create_engine_config()


def test_heads_are_told_by_vllms_own_table():
    assert is_draft_head("LlamaForCausalLMEagle3")
    assert is_draft_head("Qwen3NextMTP")
    assert is_draft_head("Gemma4MTPModel")
    assert not any(is_draft_head(name) for name in ("LlamaForCausalLM", "TeleChat2ForCausalLM"))
    assert "LlamaForCausalLMEagle3" in ModelRegistry.models
