"""What vLLM does for any model it still does for a dropped one."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.writing.adapters import strip_adapter
from tests.architectures.cases import CASES, model_of
from tests.engines import engine, greedy, kv_tokens
from tests.tiny import TINY_LLAMA, tensor, write_checkpoint

PROMPT = [*range(3, 203)]
MASK = DropMask(8, attention=(6, 5, 2), mlp=(7,))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("full"), TINY_LLAMA)


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("dropped"), TINY_LLAMA | MASK.to_config(), strip=True)


@pytest.fixture(scope="module")
def eager(dropped):
    """(tokens, log-probabilities, prompt log-probabilities) of the dropped model in one prefill, nothing cached."""
    with engine(dropped, enable_prefix_caching=False) as llm:
        return greedy(llm, PROMPT)


def assert_same(ours, expected, tolerance=1e-4):
    assert ours[0] == expected[0]
    for mine, theirs in zip(ours[1:], expected[1:], strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance)


def test_compiled_agrees_with_eager_and_masks_share_no_artefact(tmp_path, monkeypatch):
    """A second mask of the same size finds the first one's cache directory and must not use what is in it."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    # What compiling takes is the layers'.
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA | {"num_hidden_layers": 4})
    one, other = ({"hf_overrides": DropMask(4, attention=gone, mlp=(3,)).to_config()} for gone in ((0, 1), (0, 2)))
    expected = []
    for mask in (one, other):
        with engine(model, **mask, enable_prefix_caching=False) as llm:
            expected.append(greedy(llm, PROMPT))
    assert max(abs(a - b) for a, b in zip(expected[0][2], expected[1][2], strict=True)) > 0.1
    for mask, eager in zip((one, other), expected, strict=True):
        with engine(model, **mask, enforce_eager=False, enable_prefix_caching=False) as llm:
            assert_same(greedy(llm, PROMPT), eager)
    assert len([*(tmp_path / "torch_compile_cache" / "torch_aot_compile").iterdir()]) == 2


def test_prefix_caching(dropped, eager):
    with engine(dropped, enable_prefix_caching=True) as llm:
        first = greedy(llm, PROMPT)
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=0)
        (again,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    assert_same(first, eager)
    assert again.num_cached_tokens == 128  # the one full block of the prompt
    assert list(again.outputs[0].token_ids) == eager[0]


def test_chunked_prefill(dropped, eager):
    with engine(dropped, max_num_batched_tokens=64, max_num_seqs=2, enable_prefix_caching=False) as llm:
        assert_same(greedy(llm, PROMPT), eager)


def test_dropped_checkpoint_as_draft_model_of_its_own_full_model(full, dropped):
    with engine(full) as llm:
        expected = greedy(llm, PROMPT, prompt_logprobs=None)
    speculative = {"method": "draft_model", "model": str(dropped), "num_speculative_tokens": 3}
    with engine(full, speculative_config=speculative) as llm:
        ours = greedy(llm, PROMPT, prompt_logprobs=None)
        layers = {
            name for name in llm.llm_engine.vllm_config.compilation_config.static_forward_context if "draft" in name
        }
    assert_same(ours, expected)
    assert len(layers) == len(MASK.kept_attention)


def test_naming_a_dropped_layer_among_those_of_full_precision_changes_nothing(full):
    """`--kv-cache-dtype-skip-layers`: the kept layers' KV cache is as small as without it."""
    options = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "hf_overrides": {"drop_attn_list": [2]}}
    found = {}
    for skipped in ("", "2", "3"):
        with engine(full, **options, kv_cache_dtype_skip_layers=[skipped] if skipped else []) as llm:
            found[skipped] = (greedy(llm, PROMPT)[2], kv_tokens(llm))
    assert found["2"] == found[""]
    assert found["3"] != found[""]


def test_experts_that_are_gone_are_not_counted(tmp_path):
    """By their number in this list vLLM may find the experts whose turn it is."""
    case = CASES["Qwen3MoeForCausalLM"]
    case.save(model_of(case.name), tmp_path)
    with engine(tmp_path, hf_overrides={"drop_mlp_list": [0, 3]}) as llm:
        compilation = llm.llm_engine.vllm_config.compilation_config
        experts = [f"model.layers.{layer}.mlp.experts" for layer in (1, 2, 4)]
        assert compilation.static_all_moe_layers == experts
        assert {*experts} <= compilation.static_forward_context.keys()


def test_weights_of_a_running_model_can_be_updated_in_parts(dropped, eager):
    name = "model.layers.0.input_layernorm.weight"  # on CPU, vLLM repacks linear weights for good
    weight = torch.from_numpy(load_file(dropped / "model.safetensors")[name])
    with engine(dropped, enable_prefix_caching=False) as llm:
        (loaded,) = llm.apply_model(lambda model: model.load_weights([(name, weight)]))
        assert loaded == {name}
        assert_same(greedy(llm, PROMPT), eager)
        llm.apply_model(lambda model: model.load_weights([(name, 2 * weight)]))
        changed = greedy(llm, PROMPT)
    assert max(abs(a - b) for a, b in zip(changed[2], eager[2], strict=True)) > 0.1


@pytest.mark.parametrize("missing", ["self_attn.v_proj", "mlp.down_proj", "input_layernorm"])
def test_weights_missing_from_a_pickled_checkpoint_are_found_after_loading(missing, dropped, tmp_path):
    """Its tensors' names cannot be read beforehand, and vLLM's own check exempts linear layers."""
    weights = {name: torch.from_numpy(tensor) for name, tensor in load_file(dropped / "model.safetensors").items()}
    name = f"model.layers.1.{missing}.weight"
    del weights[name]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((dropped / "config.json").read_text())
    with pytest.raises(ValueError, match=f"that the mask keeps: {name}"), engine(tmp_path):
        pass


class TestLoRA:
    """An adapter changes the sublayers that were kept, and is refused where it names one that was dropped."""

    RANK, ALPHA = 4, 8

    def adapter(self, directory, layers):
        tensors = {}
        for layer in layers:
            for target, out_features in (("q_proj", 128), ("o_proj", 64)):
                in_features = 64 if target == "q_proj" else 128
                name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                tensors[f"{name}.lora_A.weight"] = tensor(name + "A", (self.RANK, in_features), 1)
                tensors[f"{name}.lora_B.weight"] = tensor(name + "B", (out_features, self.RANK), 2)
        config = {"peft_type": "LORA", "r": self.RANK, "lora_alpha": self.ALPHA, "target_modules": ["q_proj", "o_proj"]}
        (directory / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, directory / "adapter_model.safetensors")
        return tensors

    def test_adapter_on_kept_sublayers_equals_merged_weights(self, dropped, eager, tmp_path):
        merged_path = tmp_path / "merged"
        merged_path.mkdir()
        weights = load_file(dropped / "model.safetensors")
        for name, lora_a in self.adapter(tmp_path, [0, 4]).items():
            if name.endswith("lora_A.weight"):
                lora_b = load_file(tmp_path / "adapter_model.safetensors")[name.replace("lora_A", "lora_B")]
                module = name.removeprefix("base_model.model.").replace("lora_A.", "")
                weights[module] = weights[module] + np.float32(self.ALPHA / self.RANK) * (lora_b @ lora_a)
        save_file(weights, merged_path / "model.safetensors", metadata={"format": "pt"})
        (merged_path / "config.json").write_text((dropped / "config.json").read_text())
        with engine(merged_path, enable_prefix_caching=False) as llm:
            merged = greedy(llm, PROMPT)
        with engine(dropped, enable_lora=True, max_lora_rank=8, enable_prefix_caching=False) as llm:
            without = greedy(llm, PROMPT)
            sampling = SamplingParams(
                temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
            )
            request = LoRARequest("adapter", 1, str(tmp_path))
            (result,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, lora_request=request, use_tqdm=False)
        assert_same(without, eager)
        ours = [entry[token].logprob for token, entry in zip(PROMPT[1:], result.prompt_logprobs[1:], strict=True)]
        assert ours == pytest.approx(merged[2], abs=1e-3)
        assert max(abs(a - b) for a, b in zip(ours, eager[2], strict=True)) > 0.1

    def test_adapter_on_a_dropped_sublayer_is_refused_by_name_until_it_is_stripped(self, dropped, tmp_path):
        (tmp_path / "full").mkdir()
        self.adapter(tmp_path / "full", [4, 5])
        checkpoint = Checkpoint.open(dropped)
        assert strip_adapter(checkpoint.under(checkpoint.mask), tmp_path / "full", tmp_path / "stripped") == (4, 4)
        with engine(dropped, enable_lora=True, max_lora_rank=8) as llm:
            with pytest.raises(
                ValueError, match=r"carries model.layers.5.self_attn.\w+.lora_\w.weight, but the drop mask removed"
            ):
                llm.llm_engine.add_lora(LoRARequest("full", 1, str(tmp_path / "full")))
            assert llm.llm_engine.add_lora(LoRARequest("stripped", 2, str(tmp_path / "stripped")))

    def test_merged_and_saved_in_transformers_it_is_served(self, dropped, tmp_path):
        self.adapter(tmp_path, [0, 4])
        adapted = peft.PeftModel.from_pretrained(hf.from_pretrained(dropped, dtype=torch.float32), tmp_path).eval()
        with torch.no_grad():
            logprobs = adapted(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        with engine(tmp_path / "merged") as llm:
            served = greedy(llm, PROMPT, tokens=1)[2]
        expected = [logprobs[place, token].item() for place, token in enumerate(PROMPT[1:])]
        assert served == pytest.approx(expected, abs=1e-4)
