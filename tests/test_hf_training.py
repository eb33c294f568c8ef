"""Dropped models under what others wrote to train them: Trainer, PEFT, and whatever finds a class by its name."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import CheckpointError, InputError
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write_dropped
from tests.architectures.cases import CASES
from tests.tiny import TINY_LLAMA, write_checkpoint

MASK = DropMask(5, attention=(3, 0), mlp=(1,))
TOKENS = torch.tensor([[5, 6, 7, 9, 3]])


class Texts(Dataset):
    """Eight texts of random tokens, the same each time."""

    rows = torch.randint(3, 250, (8, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return {"input_ids": self.rows[place], "labels": self.rows[place]}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """A stripped Llama, as `llmdrop apply` writes it."""
    directory = tmp_path_factory.mktemp("llama")
    write_checkpoint(directory / "full", TINY_LLAMA | {"num_hidden_layers": 5})
    write_dropped(plan_surgery(directory / "full", MASK), directory / "dropped")
    return directory / "dropped"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A stripped Mixtral, whose experts Transformers puts together when it loads them."""
    directory = tmp_path_factory.mktemp("mixtral")
    CASES["MixtralForCausalLM"].write(directory / "full")
    write_dropped(plan_surgery(directory / "full", MASK), directory / "dropped")
    return directory / "dropped"


def trainer(model, directory, **options):
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts())


def same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("which", ["dropped", "mixture"])
def test_trainer_goes_on_where_it_was_and_ends_with_the_best(which, request, tmp_path):
    checkpoint = request.getfixturevalue(which)
    whole, resumed, best = (hf.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(3))
    trainer(whole, tmp_path).train()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(resumed, whole)
    # The loss falls, so the best by this measure is not the last.
    trainer(best, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True).train()
    assert not same(best, whole)
    assert same(best, hf.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32))


def test_what_trainer_saved_is_a_checkpoint_for_us_and_an_error_for_others(dropped, tmp_path):
    model = hf.from_pretrained(dropped, dtype=torch.float32)
    model.save_pretrained(tmp_path / "checkpoint-7", max_shard_size="100KB")
    assert len([*(tmp_path / "checkpoint-7").glob("model.dropped-*.safetensors")]) > 2
    assert Checkpoint.open(tmp_path / "checkpoint-7").is_stripped
    assert same(hf.from_pretrained(tmp_path / "checkpoint-7"), model)
    with pytest.raises(TypeError, match="'str' object does not support item assignment"):
        LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-7")


def test_a_mixture_that_trainer_saves_is_one_file(mixture, tmp_path, monkeypatch):
    """Its files are read one by one, and a layer's experts are one parameter; Transformers would part them at 50 GB."""
    model, asked = hf.from_pretrained(mixture), []
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda *_, **options: asked.append(options))
    (tmp_path / "checkpoint-3").mkdir()
    model.save_pretrained(tmp_path / "checkpoint-3")
    model.save_pretrained(tmp_path / "saved")
    assert asked == [{"variant": "dropped", "max_shard_size": 1 << 60}, {"variant": "dropped"}]


def test_tensors_that_a_model_does_not_have_are_not_lost_in_silence(mixture):
    model = hf.from_pretrained(mixture, dtype=torch.float32)
    stored = load_file(mixture / "model.dropped.safetensors")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    model.load_state_dict(stored)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.self_attn\.q_proj\.weight: not a parameter"):
        model.load_state_dict(stored | {"model.layers.9.self_attn.q_proj.weight": torch.zeros(1)}, strict=False)


def test_auto_classes_and_names_find_the_dropped_model(dropped):
    """TRL makes GRPO's reference model of what the policy's config names; PEFT makes base models by an Auto class."""
    model = hf.from_pretrained(dropped, dtype=torch.float32)
    named = getattr(transformers, json.loads((dropped / "config.json").read_text())["architectures"][0])
    found = (
        named.from_pretrained(model.config._name_or_path, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(
            dropped, dtype=torch.float32, attn_implementation="eager", use_cache=False, revision=None
        ),
    )
    for each in found:
        assert type(each) is type(model)
        assert same(each, model)
    assert (found[1].config._attn_implementation, found[1].config.use_cache) == ("eager", False)
    assert found[1].generate(TOKENS, use_cache=True, return_dict_in_generate=True).past_key_values.layers[2:]
    with pytest.raises(InputError, match="revision cannot be given here"):
        AutoModelForCausalLM.from_pretrained(dropped, revision="v2")


def test_stock_models_stay_stock_beside_it(dropped, tmp_path):
    hf.register(dropped)
    full = write_checkpoint(tmp_path, TINY_LLAMA)
    assert type(AutoModelForCausalLM.from_pretrained(full)) is LlamaForCausalLM
    assert type(hf.from_pretrained(full)) is LlamaForCausalLM
    unnamed = LlamaConfig(**{key: TINY_LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")})
    assert type(AutoModelForCausalLM.from_config(unnamed)) is LlamaForCausalLM
    assert type(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[LlamaConfig](unnamed)) is LlamaForCausalLM


def test_a_registered_checkpoint_needs_no_loading_first(tmp_path):
    case = CASES["SeedOssForCausalLM"]
    write_dropped(plan_surgery(case.write(tmp_path / "full"), MASK), tmp_path / "dropped")
    made = hf.register(tmp_path / "dropped")
    assert made.__name__ == "DroppedSeedOssForCausalLM"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dropped")) is made


def test_an_adapter_finds_its_base_again_and_is_merged_into_a_dropped_checkpoint(dropped, tmp_path):
    model = hf.from_pretrained(dropped, dtype=torch.float32)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    expected = adapted(TOKENS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert type(again.get_base_model()) is type(model)
    assert torch.equal(again(TOKENS).logits, expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = hf.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=0, atol=1e-4)
    assert Checkpoint.open(tmp_path / "merged").is_stripped
