"""Where a wrapper's mask may stand, what of the model it may touch, and what vLLM does with it beside serving."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from vllm.config import ModelConfig
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.registry import ModelRegistry

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.architectures.names import layer_in
from llmdrop_vllm.architectures.wrappers import WRAPPERS
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.errors import CheckpointError, MaskError
from llmdrop_vllm.masks.stretches import STRETCH
from llmdrop_vllm.serving.passthrough import DroppedNorm, DroppedPostNorm, DroppedSublayer
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint
from tests.architectures.bare_wrappers import made_up_weights, write
from tests.architectures.cases import LAYERS
from tests.architectures.wrapper_cases import WRAPPER_CASES
from tests.engines import engine, greedy

pytest.importorskip("torchvision", reason="vLLM's multimodal models import it")
PROMPT = [*range(3, 43)]
MASK = DropMask(LAYERS, attention=(4, 0, 2), mlp=(4, 1))
OTHER = DropMask(LAYERS, attention=(3,))
# A tower through the registry by its config's word, one that is given the outer config, and a class of its own.
THREE = ("LlavaForConditionalGeneration-llama", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")


@pytest.fixture(autouse=True)
def text_only(monkeypatch):
    monkeypatch.setattr(ModelConfig, "_supports_multimodal_inputs", lambda self: False)


@pytest.fixture(scope="module", params=THREE)
def full(request, tmp_path_factory):
    return WRAPPER_CASES[request.param].write(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def dropped(full, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dropped") / "it"
    write_checkpoint(plan_surgery(full, MASK), directory)
    return directory


def outputs(directory, **options):
    with engine(directory, **options) as llm:
        return greedy(llm, PROMPT)


def test_a_mask_on_top_goes_to_the_tower(full, dropped):
    expected = outputs(dropped)
    assert outputs(full, hf_overrides=MASK.to_config("runtime")) == expected
    assert outputs(full, hf_overrides={"text_config": MASK.to_config("runtime")}) == expected
    assert outputs(dropped, hf_overrides=MASK.to_config("runtime")) == expected


def test_two_masks_that_differ_are_refused(dropped):
    with pytest.raises(ValueError, match="drop masks disagree: on top it says attention dropped in 1 of 5 layers"):
        outputs(dropped, hf_overrides=OTHER.to_config("runtime"))


def test_what_the_toolkit_overrides_goes_over_any_mask(full, dropped, tmp_path):
    write_checkpoint(plan_surgery(full, OTHER, config_only=True), tmp_path / "other")
    override = Checkpoint.open(tmp_path / "other").decoder.override(MASK)
    assert outputs(tmp_path / "other", hf_overrides=override) == outputs(dropped)


def test_a_mask_that_drops_nothing_is_none(full):
    expected = outputs(full)
    for nothing in ({"drop_attn_list": []}, {"text_config": {"drop_attn_list": []}}):
        assert outputs(full, hf_overrides=nothing) == expected


def test_blocks_of_vision_are_not_touched(full):
    """They have `self_attn` or `attn` and `mlp` too, and there are as many."""
    with engine(full, hf_overrides=MASK.to_config()) as llm:
        (found,) = llm.apply_model(stand_ins)
        assert llm.apply_model(vision_blocks) == [LAYERS]
    assert {layer_in(name) for name in found} == {*MASK.attention, *MASK.mlp}
    assert len(found) == 2 * (len(MASK.attention) + len(MASK.mlp))  # the module and its norm


def stand_ins(model):
    kinds = (DroppedSublayer, DroppedNorm, DroppedPostNorm)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def vision_blocks(model):
    vision = getattr(model, "vision_tower", None) or model.visual
    lists = [each for each in vision.modules() if isinstance(each, torch.nn.ModuleList)]
    (blocks,) = [each for each in lists if len(each) >= LAYERS - 1 and hasattr(each[0], "mlp")]
    return len(blocks) + (LAYERS - len(blocks)) * (len(blocks) == LAYERS - 1)  # LLaVA leaves out the last


def test_a_weight_that_a_kept_sublayer_lacks_is_named(full, tmp_path):
    for path in full.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    (gone,) = [name for name in tensors if name.endswith("layers.1.self_attn.k_proj.weight") and layer_in(name)]
    save_file({name: each for name, each in tensors.items() if name != gone}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks weights of sublayers that the mask keeps.*layers\.1\.self_attn\.k_proj"
    ):
        outputs(tmp_path, hf_overrides=MASK.to_config())


def test_an_adapter_for_what_was_dropped_is_refused(full, tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    decoder = Checkpoint.open(full).decoder
    prefix = next(name for name in Checkpoint.open(full).tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
    name = f"base_model.model.{prefix.removesuffix('.weight')}"
    hidden = decoder.config["hidden_size"]
    save_file(
        {f"{name}.lora_A.weight": torch.zeros(4, hidden), f"{name}.lora_B.weight": torch.zeros(hidden, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    with (
        engine(full, hf_overrides=MASK.to_config(), enable_lora=True, max_lora_rank=8) as llm,
        pytest.raises(ValueError, match=r"adapter carries .*layers\.0\.self_attn.*but the drop mask removed"),
    ):
        llm.llm_engine.add_lora(LoRARequest("adapter", 1, str(tmp_path)))


def test_a_mask_under_a_name_that_the_config_class_does_not_read_is_refused(tmp_path):
    """vLLM's config of Ovis reads `llm_config` when it is made, and keeps it under another name."""
    nested = {"llm_config": MASK.to_config()}
    with (
        made_up_weights(),
        pytest.raises(ValueError, match=r"llm_config has a drop mask that OvisConfig does not read"),
    ):
        outputs(write("Ovis", tmp_path), load_format="dummy", hf_overrides=nested)


def test_a_config_that_says_little_is_completed():
    """LLaVA's published config tells of its Llama only in what it differs from Vicuna's."""
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    decoder = Decoder.of(config, "LlavaForConditionalGeneration")
    assert decoder.mask == DropMask(CONFIG_MAPPING["llama"]().num_hidden_layers)
    assert decoder.family.name == "llama"


def test_a_published_flat_config_keeps_its_mask_where_its_layers_are_counted():
    flat = {"model_type": "qwen2_vl", "hidden_size": 64, "num_hidden_layers": 5, "vision_config": {"depth": 2}}
    decoder = Decoder.of(flat, "Qwen2VLForConditionalGeneration")
    config = decoder.config_with(MASK.to_config())
    assert (config["drop_attn_list"], config["vision_config"]) == ([4, 0, 2], {"depth": 2})
    assert Decoder.of(config, "Qwen2VLForConditionalGeneration").mask == MASK
    loaded = CONFIG_MAPPING["qwen2_vl"].from_dict(config)
    assert Decoder.of(loaded, "Qwen2VLForConditionalGeneration").mask == MASK


def test_layers_that_a_tower_has_no_row_for_are_named(tmp_path):
    after = {"do_layer_norm_before": False}
    case = WRAPPER_CASES["Blip2ForConditionalGeneration-opt"]
    directory = replace(case, text=case.text | after).write(tmp_path)
    message = "OPTForCausalLM has no row in the family table for layers as this config has them, only for: do_layer_nor"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)
    with pytest.raises(ValueError, match=message):
        outputs(directory, hf_overrides=MASK.to_config("runtime"))


def test_attention_whose_keys_and_values_other_layers_read_is_not_dropped(tmp_path):
    """Layer 4 reads layer 2's."""
    directory = WRAPPER_CASES["Gemma4ForConditionalGeneration-shared keys and a mixture"].write(tmp_path)
    message = (
        "the mask drops the attention of layer 2, whose keys and values layers 4 read; keep it, or drop theirs too"
    )
    with pytest.raises(MaskError, match=message):
        plan_surgery(directory, DropMask(LAYERS, attention=(2,)))
    with pytest.raises(MaskError, match="layer 2 takes no window: layers 4 read its keys and values"):
        plan_surgery(directory, DropMask(LAYERS, windows=((2, 8),)))
    with pytest.raises(ValueError, match=message):
        outputs(directory, hf_overrides={"drop_attn_list": [0, 2]})
    with pytest.raises(ValueError, match="layers 4 read the keys and values of layer 2, and vLLM hands none from one"):
        outputs(directory, hf_overrides={"drop_attn_list": [1, 3]}, pipeline_parallel_size=2)


def test_a_tower_that_transformers_would_build_is_refused(tmp_path):
    case = replace(WRAPPER_CASES["LlavaForConditionalGeneration-llama"], tower="glm")
    message = "LlavaForConditionalGeneration has vLLM's Transformers backend build its GlmForCausalLM"
    with pytest.raises(ValueError, match=message):
        outputs(case.write(tmp_path), hf_overrides=MASK.to_config("runtime"))


def test_every_wrapper_of_the_table_is_one_of_vllm_and_droppable():
    for name in WRAPPERS:
        assert ModelRegistry.models[name].module_name == "llmdrop_vllm.serving.models", name


def test_windows_beside_the_tower(full, tmp_path):
    """A window of 24 tokens shows the first 384 of a text all that was before them."""
    seen, ids = 3 * STRETCH, [3 + 7 * place % 251 for place in range(3 * STRETCH + 90)]
    found = []
    for name, windows in {"whole": (), "windowed": ((2, 24), (3, 24))}.items():
        out = tmp_path / name
        write_checkpoint(plan_surgery(full, DropMask(LAYERS, attention=(0,), mlp=(1,), windows=windows)), out)
        model = hf.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        with engine(out, max_model_len=len(ids) + 8) as llm:
            tokens, _, served = greedy(llm, ids, tokens=8)
        assert tokens == made[0, len(ids) :].tolist()
        assert served == pytest.approx(logprobs[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
        found.append(served)
    whole, windowed = found
    assert windowed[: seen - 1] == pytest.approx(whole[: seen - 1], abs=1e-5)
    assert windowed[seen:] != pytest.approx(whole[seen:], abs=1e-3)


def test_compiled_agrees_with_eager(full, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    tokens, *logprobs = outputs(full, hf_overrides=MASK.to_config())
    compiled, *others = outputs(full, hf_overrides=MASK.to_config(), enforce_eager=False)
    assert compiled == tokens
    for eager, other in zip(logprobs, others, strict=True):
        assert other == pytest.approx(eager, abs=1e-4)
