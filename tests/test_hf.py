"""A dropped checkpoint in Transformers: the reference's numbers, a smaller cache, gradients, and nothing invented."""

import copy
import json
import logging
import pickle
import subprocess

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from llmdrop_vllm import hf
from llmdrop_vllm.errors import CheckpointError, InputError, MaskError
from tests.tiny import PARITY_CASES, TINY_LLAMA, golden, write_checkpoint
from tests.warm import PYTHON

MASK = {"drop_attn_list": [6, 0, 3], "drop_mlp_list": [6]}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """A stripped checkpoint: no attention in layers 0, 3 and 6, no MLP in layer 6."""
    return write_checkpoint(tmp_path_factory.mktemp("dropped"), TINY_LLAMA | MASK, strip=True)


@pytest.fixture(scope="module")
def model(dropped):
    return hf.from_pretrained(dropped, dtype=torch.float32).eval()


@pytest.mark.parametrize("strip", [False, True], ids=["all weights in the files", "stripped"])
@pytest.mark.parametrize("case", PARITY_CASES)
def test_log_probabilities_and_greedy_tokens_are_the_references(case, strip, tmp_path):
    expected = golden(case)
    model = hf.from_pretrained(write_checkpoint(tmp_path, expected["config"], seed=expected["seed"], strip=strip))
    prompt = torch.tensor([expected["prompt_token_ids"]])
    with torch.no_grad():
        logprobs = model.eval()(prompt).logits.log_softmax(-1)[0]
    found = [logprobs[place, token].item() for place, token in enumerate(expected["prompt_token_ids"][1:])]
    assert found == pytest.approx(expected["prompt_logprobs"][1:], abs=1e-4)
    count = len(expected["greedy_token_ids"])
    output = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None)
    assert output[0, prompt.shape[1] :].tolist() == expected["greedy_token_ids"]


def test_the_cache_has_the_remaining_layers_only(model):
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    layers = output.past_key_values.layers
    assert len(layers) == 5
    assert {layer.keys.shape[-2] for layer in layers} == {6}


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}])
def test_every_way_to_generate_agrees_with_no_cache_at_all(model, options):
    prompt = torch.tensor([[5, 6, 7, 9], [1, 8, 2, 4]])
    plain = {key: value for key, value in options.items() if key == "num_beams"} | {"use_cache": False}
    run = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **run, **options), model.generate(prompt, **run, **plain))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "cache",
    [
        lambda _: DynamicCache(),
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=16),
    ],
    ids=["bare", "dynamic", "static"],
)
def test_a_cache_of_the_users_own_is_filled_for_the_remaining_layers(dropped, cache, implementation):
    """In two steps, as by hand: the first attention is dropped, and a cache's length is asked of its first entry."""
    model = hf.from_pretrained(dropped, dtype=torch.float32, attn_implementation=implementation).eval()
    prompt, own = torch.tensor([[5, 6, 7, 9, 3, 8]]), cache(model.config)
    with torch.no_grad():
        model(prompt[:, :4], past_key_values=own)
        logits = model(prompt[:, 4:], past_key_values=own).logits
        expected = model(prompt, use_cache=False).logits[:, 4:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (int(own.get_seq_length()), len(own.layers)) == (6, 5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_at_the_left_changes_nothing(dropped, implementation):
    model = hf.from_pretrained(dropped, dtype=torch.float32, attn_implementation=implementation).eval()
    prompt, run = torch.tensor([[5, 6, 7, 9]]), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    padded, seen = (torch.nn.functional.pad(each, (3, 0)) for each in (prompt, torch.ones_like(prompt)))
    with torch.no_grad():
        logits = model(padded, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0)).logits[:, 3:]
        torch.testing.assert_close(logits, model(prompt).logits, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(padded, attention_mask=seen, **run)[:, 3:], model.generate(prompt, **run))


def test_attention_weights_are_those_of_the_remaining_layers(dropped):
    """One entry for each attention that is left, in their order, and all hidden states."""
    model = hf.from_pretrained(dropped, dtype=torch.float32, attn_implementation="eager").eval()
    prompt, found = torch.tensor([[5, 6, 7, 9]]), {}
    handles = [
        layer.self_attn.register_forward_hook(lambda _module, _args, output, index=index: found.update({index: output}))
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        output = model(prompt, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    kept = (1, 2, 4, 5, 7)
    assert len(output.attentions) == len(kept)
    assert all(torch.equal(each, found[index][1]) for each, index in zip(output.attentions, kept, strict=True))
    assert all(found[index][1] is None and not found[index][0].any() for index in (0, 3, 6))
    assert len(output.hidden_states) == 9


def test_sliding_windows_stay_with_their_layers(tmp_path):
    """The cache's entries follow the remaining layers: entry 0 here is layer 1, which has a window of 8 tokens."""
    kinds = ["full_attention", "sliding_attention"] * 4
    config = TINY_LLAMA | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 8,
        "drop_attn_list": [0, 5],
        "layer_types": kinds,
    }
    model = hf.from_pretrained(write_checkpoint(tmp_path, config, strip=True), dtype=torch.float32).eval()
    cached = model.config.get_text_config(decoder=True)
    assert (cached.num_hidden_layers, cached.layer_types) == (6, [kinds[layer] for layer in (1, 2, 3, 4, 6, 7)])
    assert model.config.get_text_config().num_hidden_layers == 8


def test_dropped_sublayers_are_not_built_and_the_rest_is_bit_identical(model, dropped):
    stored = load_file(dropped / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_gradients_flow_to_every_parameter(model):
    trained = copy.deepcopy(model).train()
    trained.gradient_checkpointing_enable()
    tokens = torch.tensor([[5, 6, 7, 9, 3]])
    trained(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.parameters())


def test_a_lora_adapter_finds_the_remaining_sublayers_only(model):
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    layers = {
        name.split("layers.")[1].split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    assert layers == {
        *(f"{layer}.self_attn.q_proj" for layer in (1, 2, 4, 5, 7)),
        *(f"{layer}.mlp.down_proj" for layer in (0, 1, 2, 3, 4, 5, 7)),
    }


def test_saved_again_it_loads_again_and_plain_transformers_refuses_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["DroppedLlamaForCausalLM"]
    again = hf.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_what_is_dropped_is_said_once_at_a_level_that_is_shown(dropped, caplog):
    with caplog.at_level(logging.WARNING):
        hf.from_pretrained(dropped)
    lines = [record.getMessage() for record in caplog.records if "dropped in" in record.getMessage()]
    assert lines == [f"{dropped}: attention dropped in 3 of 8 layers [0,3,6], MLP in 1 [6]"]


def test_a_checkpoint_without_a_mask_is_loaded_in_full(tmp_path, caplog):
    model = hf.from_pretrained(write_checkpoint(tmp_path, TINY_LLAMA))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.get_text_config(decoder=True).num_hidden_layers == 8
    assert "dropped" not in caplog.text


def test_a_missing_weight_of_a_kept_sublayer_is_an_error(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | MASK, strip=True, without=("model.layers.5.mlp.up_proj",))
    with pytest.raises(CheckpointError, match=r"lacks .*model\.layers\.5\.mlp\.up_proj\.weight"):
        hf.from_pretrained(tmp_path)


def test_another_revision_is_never_read_in_silence(dropped):
    with pytest.raises(InputError, match="revision cannot be given here"):
        hf.from_pretrained(dropped, revision="v2")


def test_a_model_without_any_attention_is_refused(tmp_path):
    write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [True] * 8})
    with pytest.raises(MaskError, match="every one of the 8 attention sublayers is dropped"):
        hf.from_pretrained(tmp_path)


def test_classes_travel_to_other_processes(model, tmp_path):
    """They are made when they are asked for, so a process that unpickles one must be able to ask."""
    ids = torch.arange(3, 40)[None]
    expected = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
    torch.save({"model": model, "expected": expected}, tmp_path / "saved.pt")
    code = (
        f"import torch; saved = torch.load({str(tmp_path / 'saved.pt')!r}, weights_only=False);"
        "found = saved['model'](torch.arange(3, 40)[None]).logits;"
        "print(torch.equal(found, saved['expected']), type(saved['model']).__name__)"
    )
    done = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", type(model).__name__]
    with pytest.raises(AttributeError, match="has no attribute 'DroppedNothing'"):
        hf.DroppedNothing  # noqa: B018
