"""What Transformers must do with a dropped checkpoint of any architecture, beyond computing the right logits."""

import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import logging

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.decoder import Decoder
from llmdrop_vllm.checkpoints.hf_weights import checkpoint_tensors
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.hf_passthrough import DroppedSublayer
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint
from tests.architectures.cases import CASES, LAYERS, Case, model_of
from tests.architectures.reference import fitting, skipping

logging.disable_progress_bar()
PROMPT = torch.arange(3, 43)[None]
WINDOW = 8  # tokens, fewer than the prompt's
MASKS = (
    DropMask(LAYERS, attention=(3, 1), mlp=(0,)),
    DropMask(LAYERS, attention=(4, 2, 0), mlp=(3,)),
    DropMask(LAYERS, attention=(0, 1, 2, 3)),
)
# Those whose layers see either a window or everything.
HYBRID = [
    name
    for name, case in CASES.items()
    if set(getattr(case.config(), "layer_types", None) or ()) & {"sliding_attention", "chunked_attention"}
]


def with_windows(architecture: str) -> Case:
    """The case with windows that matter, in every other layer."""
    case = CASES[architecture]
    (narrow,) = set(case.config().layer_types) - {"full_attention"}
    kinds = [narrow if index % 2 else "full_attention" for index in range(LAYERS)]
    size = {"attention_chunk_size" if narrow == "chunked_attention" else "sliding_window": WINDOW}
    return replace(case, overrides=case.overrides | {"layer_types": kinds} | size)


@cache
def windowed_model_of(architecture: str) -> PreTrainedModel:
    return with_windows(architecture).model()


def dropped(case: Case, model: PreTrainedModel, mask: DropMask, directory, **options) -> PreTrainedModel:
    full, out = directory / "full", directory / "dropped"
    if not full.exists():
        case.save(model, full)
    write_checkpoint(plan_surgery(full, mask, **options), out)
    return hf.from_pretrained(out, attn_implementation="eager").eval()


@pytest.mark.parametrize("mask", MASKS, ids=DropMask.summary)
@pytest.mark.parametrize("architecture", HYBRID)
def test_windows_stay_with_their_layers_with_and_without_a_cache(architecture, mask, tmp_path):
    whole, mask = windowed_model_of(architecture), fitting(architecture, mask)
    model = dropped(with_windows(architecture), whole, mask, tmp_path)
    with torch.no_grad(), skipping(whole, CASES[architecture].family, mask):
        expected = whole(PROMPT).logits
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=0, atol=1e-4)
    cached, plain = (
        model.generate(
            PROMPT, max_new_tokens=12, do_sample=False, use_cache=use, eos_token_id=None, return_dict_in_generate=True
        )
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    kinds = Decoder.of(whole.config, CASES[architecture].architecture).kinds
    assert len(cached.past_key_values.layers) == sum(kinds[layer].values > 0 for layer in mask.kept_attention)


@pytest.mark.parametrize("architecture", HYBRID)
def test_the_windows_of_these_tests_matter(architecture):
    """Else windows that went astray would not show."""
    with torch.no_grad():
        unlike = windowed_model_of(architecture)(PROMPT).logits - model_of(architecture)(PROMPT).logits
    assert unlike[:, WINDOW + 1 :].abs().max() > 1e-2


@pytest.mark.parametrize("architecture", CASES)
def test_weights_of_dropped_sublayers_may_be_in_the_files(architecture, tmp_path):
    whole, mask = model_of(architecture), fitting(architecture, MASKS[0])
    model = dropped(CASES[architecture], whole, mask, tmp_path, config_only=True)
    with torch.no_grad(), skipping(whole, CASES[architecture].family, mask):
        expected = whole(PROMPT).logits
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=0, atol=1e-4)
    assert sum(map(torch.numel, model.parameters())) < sum(map(torch.numel, whole.parameters()))


@pytest.mark.parametrize("architecture", CASES)
def test_what_is_loaded_is_what_the_files_hold(architecture, tmp_path):
    """In bfloat16, built without memory first: a parameter that Transformers then set by itself would differ."""
    case, whole = CASES[architecture], model_of(architecture)
    write_checkpoint(
        plan_surgery(case.save(whole, tmp_path / "full"), fitting(architecture, MASKS[0])), tmp_path / "dropped"
    )
    files = [*(tmp_path / "dropped").glob("*.safetensors")]
    stored = {name: tensor.bfloat16() for path in files for name, tensor in load_file(path).items()}
    model = hf.from_pretrained(tmp_path / "dropped", dtype=torch.bfloat16, device_map={"": "cpu"})
    found = checkpoint_tensors(model)
    assert found.keys() - stored.keys() <= {*(model._tied_weights_keys or ())}
    for name, tensor in stored.items():
        assert found[name].dtype in (torch.bfloat16, torch.float32), name  # as routers stay
        assert torch.equal(found[name].bfloat16(), tensor), name
    tables = dict(whole.named_buffers())
    for name, table in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name in tables and not isinstance(owner, DroppedSublayer):  # what stands in for one computes nothing by it
            assert torch.equal(table, tables[name].to(table.dtype)), name


def test_an_architecture_that_transformers_spells_otherwise(tmp_path):
    """Its class is called PhimoeForCausalLM, which is no architecture of the table."""
    case, mask = CASES["PhiMoEForCausalLM"], MASKS[0]
    whole = model_of(case.name)
    assert type(whole).__name__ != case.architecture
    model = dropped(case, whole, mask, tmp_path)
    with torch.no_grad(), skipping(whole, case.family, mask):
        expected = whole(PROMPT).logits
    assert pickle.loads(pickle.dumps(type(model))) is type(model)
    model.save_pretrained(tmp_path / "again")
    again = hf.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(again(PROMPT).logits, expected, rtol=0, atol=1e-4)


def test_a_sublayer_that_a_layer_does_not_have_is_not_dropped_in_silence():
    case = CASES["LlamaForCausalLM"]
    model = case.model()
    del model.get_decoder().layers[1].self_attn
    with pytest.raises(MaskError, match="the mask drops self_attn in layer 1, which has none, only: mlp, "):
        hf.drop(model, case.family, DropMask(LAYERS, attention=(1,)))


def test_layers_of_another_layout_are_refused():
    """Both sublayers of these share the norm that dropping attention would take away."""
    case = CASES["StableLmForCausalLM"]
    model = replace(case, overrides={"use_parallel_residual": True}).model()
    with pytest.raises(MaskError, match="layer 1 has no post_attention_layernorm; the family table's row 'stablelm'"):
        hf.drop(model, case.family, DropMask(LAYERS, attention=(1,)))
