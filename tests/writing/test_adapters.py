"""A LoRA of the full model, stripped for the dropped one: it computes what the kept part of it does, and is served."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.architectures.cases import CASES, LAYERS
from tests.architectures.reference import skipping

MASK = DropMask(LAYERS, attention=(3, 0), mlp=(1,))
TOKENS = torch.tensor([[5, 6, 7, 9, 3]])


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "MixtralForCausalLM"])
def adapted(request, tmp_path_factory):
    """(a directory with the full model, the dropped one and an adapter of the full one, what that computes)."""
    directory, case = tmp_path_factory.mktemp("adapted"), CASES[request.param]
    write(plan_surgery(case.write(directory / "full"), MASK), directory / "dropped")
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    if request.param == "MixtralForCausalLM":
        options |= {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}
    model = AutoModelForCausalLM.from_pretrained(directory / "full", attn_implementation="eager")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    adapted.save_pretrained(directory / "lora")
    (directory / "lora" / "tokenizer.json").write_text("{}")
    with torch.no_grad(), skipping(adapted.merge_and_unload(), case.family, MASK):
        return directory, model(TOKENS).logits


def test_it_computes_what_the_full_one_does_without_what_is_dropped(adapted, tmp_path, capsys):
    directory, expected = adapted
    out = tmp_path / "stripped"
    assert main(["adapter", str(directory / "dropped"), str(out), "--lora", str(directory / "lora")]) == 0
    before, after = (load_file(each / "adapter_model.safetensors") for each in (directory / "lora", out))
    gone = before.keys() - after.keys()
    assert {name.split("layers.")[1].rpartition(".lora_")[0].removesuffix(".base_layer") for name in gone} >= {
        "0.self_attn.q_proj",
        "3.self_attn.q_proj",
    }
    assert (
        f"{len(after)} tensors of {directory / 'lora'}, without {len(gone)} for what is gone" in capsys.readouterr().out
    )
    assert {path.name for path in out.iterdir()} == {path.name for path in (directory / "lora").iterdir()}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        directory / "dropped"
    )
    (out / "tokenizer.json").unlink()
    model = peft.PeftModel.from_pretrained(hf.from_pretrained(directory / "dropped", dtype=torch.float32), out)
    assert {name for name in peft.get_peft_model_state_dict(model)} == set(after)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS).logits, expected, rtol=0, atol=1e-4)


def test_what_cannot_be_stripped_is_refused_and_nothing_is_written(adapted, tmp_path, capsys):
    directory, _ = adapted
    dropped, lora, out = directory / "dropped", directory / "lora", tmp_path / "out"
    for model, adapter, message in (
        (directory / "full", lora, "drops nothing"),
        (dropped, dropped, "has no adapter_config.json"),
        (dropped, lora, "exists; choose another place"),
    ):
        if message.startswith("exists"):
            out.mkdir()
        assert main(["adapter", str(model), str(out), "--lora", str(adapter)]) == 1
        assert message in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [out]
    assert not [*out.iterdir()]
    assert Checkpoint.open(dropped).is_stripped
