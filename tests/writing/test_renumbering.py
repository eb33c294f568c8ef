"""Layers of which nothing is left go, and what remains is an ordinary model that any engine loads."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmdrop_vllm import hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.cli import main
from llmdrop_vllm.errors import CheckpointError, InputError, MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.renumbering import RENUMBERED_FILE, Renumbering
from llmdrop_vllm.writing.write import write_checkpoint as write
from tests.architectures.cases import CASES, LAYERS, MLA, YARN, Case
from tests.architectures.reference import skipping
from tests.checkpoints.files import content, stored
from tests.engines import engine, greedy
from tests.tiny import TINY_LLAMA, write_checkpoint

PROMPT = torch.arange(3, 43)[None]
WHOLE = DropMask(8, attention=(5, 2), mlp=(2, 5))
PARTLY = DropMask(8, attention=(6, 5, 2, 0), mlp=(7, 2), windows=((3, 128),))


def logits(model):
    with torch.no_grad():
        return model.eval()(PROMPT).logits


@pytest.mark.parametrize("options", [{}, {"portable": True}])
def test_stock_transformers_loads_what_is_left_of_whole_layers(options, tmp_path):
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    write(plan_surgery(model, WHOLE, renumber=True, **options), tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(found), logits(hf.load(Checkpoint.open(model).under(WHOLE))))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == TINY_LLAMA | {"num_hidden_layers": 6}
    assert json.loads((tmp_path / "out" / RENUMBERED_FILE).read_text())["layers"] == [0, 1, 3, 4, 6, 7]


def test_what_else_is_dropped_stays_a_mask_with_new_numbers(tmp_path):
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    write(plan_surgery(model, PARTLY, renumber=True), tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.mask == DropMask(7, attention=(5, 4, 0), mlp=(6,), windows=((2, 128),))
    assert checkpoint.is_stripped
    assert checkpoint.config["architectures"] == ["DroppedLlamaForCausalLM"]
    expected = logits(hf.load(Checkpoint.open(model).under(PARTLY)))
    assert torch.equal(logits(hf.from_pretrained(tmp_path / "out")), expected)


def test_a_stripped_checkpoint_is_renumbered_by_its_own_mask_bit_for_bit(tmp_path):
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA | WHOLE.to_config("transformers"), strip=True)
    write(plan_surgery(model, keep_dropped=True, renumber=True), tmp_path / "out")
    before, after = stored(model), stored(tmp_path / "out")
    new = {2: None, 5: None} | {old: number for number, old in enumerate((0, 1, 3, 4, 6, 7))}
    for layer, number in new.items():
        old = {name: value for name, value in before.items() if name.startswith(f"model.layers.{layer}.")}
        assert bool(old) == (number is not None)
        for name, value in old.items():
            assert after[name.replace(f".{layer}.", f".{number}.")] == value
    assert len(before) == len(after)


TOLD_APART = (
    # Every second layer's window, which published configs leave to the architecture.
    Case("Gemma2ForCausalLM", "gemma2", {"sliding_window": 16}),
    Case("Qwen3MoeForCausalLM", "qwen3_moe", {"mlp_only_layers": [0, 3]}),
    Case("DeepseekV2ForCausalLM", "deepseek_v2", MLA | YARN | {"head_dim": 64, "first_k_dense_replace": 3}),
)


@pytest.mark.parametrize("case", TOLD_APART, ids=lambda case: case.architecture)
def test_stock_vllm_serves_what_is_left_where_layers_differ(case, tmp_path):
    model, mask = case.model(), DropMask(LAYERS, attention=(1, 2), mlp=(1, 2))
    full = case.save(model, tmp_path / "full")
    if case.model_type == "gemma2":
        path = full / "config.json"
        entries = json.loads(path.read_bytes())
        del entries["layer_types"]
        path.write_text(json.dumps(entries))
    with skipping(model, case.family, mask):
        expected = logits(model)[0].log_softmax(-1)
    write(plan_surgery(full, mask, renumber=True), tmp_path / "out")
    prompt = PROMPT[0].tolist()
    with engine(tmp_path / "out") as llm:
        served = greedy(llm, prompt, tokens=1)[2]
    assert served == pytest.approx([expected[i, token].item() for i, token in enumerate(prompt[1:])], abs=1e-4)


def test_layers_that_the_config_tells_apart_by_their_number_are_refused(tmp_path):
    case = Case("Qwen3MoeForCausalLM", "qwen3_moe", {"decoder_sparse_step": 2})
    full = case.save(case.model(), tmp_path / "full")
    with pytest.raises(
        CheckpointError, match=r"decoder_sparse_step is 2: .* layer 2 would become 1; a mask that takes 2"
    ):
        plan_surgery(full, DropMask(LAYERS, attention=(1,), mlp=(1,)), renumber=True)
    plan_surgery(full, DropMask(LAYERS, attention=(1, 2), mlp=(1, 2)), renumber=True)


def test_a_layer_that_would_compute_otherwise_is_refused(tmp_path):
    case = Case("GPT2LMHeadModel", "gpt2", {"scale_attn_by_inverse_layer_idx": True})
    full = case.save(case.model(), tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"layer 2 as layer 1 would not be the same: attn\.scaling is"):
        plan_surgery(full, DropMask(LAYERS, attention=(1,), mlp=(1,)), renumber=True)


def test_a_layer_that_does_more_than_its_sublayers_is_refused(tmp_path):
    case = CASES["Gemma4ForCausalLM"]
    full = case.save(case.model(), tmp_path / "full")
    with pytest.raises(MaskError, match=r"model\.layers\.1\.layer_scalar belongs to does more than"):
        plan_surgery(full, DropMask(LAYERS, attention=(1,), mlp=(1,)), renumber=True)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (DropMask(8, attention=(1,), mlp=(2,)), {}, "no layer goes as a whole"),
        (WHOLE, {"config_only": True}, "config_only links to those that there are"),
    ],
)
def test_what_cannot_be_renumbered_is_refused(mask, options, message, tmp_path):
    model = write_checkpoint(tmp_path, TINY_LLAMA)
    with pytest.raises(InputError, match=message):
        plan_surgery(model, mask, renumber=True, **options)


RENUMBERING = Renumbering(depth=8, kept=(0, 1, 3, 4, 6, 7))


def test_names_that_a_quantizer_wrote_get_new_numbers():
    settings = {
        "ignore": ["lm_head", "model.layers.2.mlp.gate", "model.layers.3.mlp.gate", r"re:.*layers\.6\.self_attn.*"],
        "config_groups": {"group_0": {"targets": [r"re:.*layers\.\d+\.mlp.*", "re:model.layers.[0-9]+.mlp"]}},
        "quantized_layers": {"model.layers.5.mlp": {"bits": 4}, "model.layers.7.mlp": {"bits": 8}},
        "dynamic": {r"+:.*\.4\.down_proj.*": {}},
        "drafts": ["model.layers.8.eh_proj"],
    }
    assert RENUMBERING.names_in(settings) == {
        "ignore": ["lm_head", "model.layers.2.mlp.gate", r"re:.*layers\.4\.self_attn.*"],
        "config_groups": settings["config_groups"],
        "quantized_layers": {"model.layers.5.mlp": {"bits": 8}},
        "dynamic": settings["dynamic"],
        "drafts": ["model.layers.6.eh_proj"],
    }


@pytest.mark.parametrize("name", [r"re:.*layers\.(0|2)\.mlp", "re:model.layers.[2-5].mlp", "layers.1?.mlp"])
def test_a_pattern_of_layers_that_cannot_be_renumbered_is_named(name):
    with pytest.raises(CheckpointError, match="names layers in a way that cannot be renumbered"):
        RENUMBERING.names_in({"ignore": [name]})


def test_quantizers_files_are_renumbered_and_records_of_old_numbers_stay_behind(tmp_path):
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    names = {"quantization": {"exclude_modules": ["model.layers.2.mlp", "model.layers.3.mlp", "lm_head"]}}
    (model / "hf_quant_config.json").write_text(json.dumps(names))
    for record in ("llmdrop_scores.json", "llmdrop_heal.json", "llmdrop_fetch.json"):
        (model / record).write_text("{}")
    write(plan_surgery(model, WHOLE, renumber=True), tmp_path / "out")
    found = content(tmp_path / "out")
    said = json.loads(found["hf_quant_config.json"])["quantization"]["exclude_modules"]
    assert said == ["model.layers.2.mlp", "lm_head"]
    assert {name for name in found if name.startswith("llmdrop")} == {RENUMBERED_FILE, "llmdrop_fetch.json"}


def test_the_commands_renumber(tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model", TINY_LLAMA)
    main(["apply", str(model), str(tmp_path / "masked"), "--attention", "2,5", "--mlp", "2,5"])
    main(["convert", str(tmp_path / "masked"), str(tmp_path / "converted"), "--renumber"])
    main(["apply", str(model), str(tmp_path / "applied"), "--attention", "2,5", "--mlp", "2,5", "--renumber"])
    converted, applied = (stored(tmp_path / name) for name in ("converted", "applied"))
    assert converted == applied
    assert len(converted) == 3 + 9 * 6
    assert not (tmp_path / "applied" / "llmdrop_mask.json").exists()
    assert "attention dropped in 0 of 6 layers" in capsys.readouterr().out
    assert main(["convert", str(model), str(tmp_path / "nothing")]) == 1
    assert "nothing to convert: give --dialect, --renumber or both" in capsys.readouterr().err
