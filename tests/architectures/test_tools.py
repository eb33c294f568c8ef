"""Every architecture with a tiny model: stripped, made portable, and loaded into Transformers."""

import pytest
import torch
from compressed_tensors.utils.match import match_modules_set
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.sublayer_tensors import in_dropped_sublayer
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.writing.plan import plan_surgery
from llmdrop_vllm.writing.write import write_checkpoint
from tests.architectures.cases import CASES, LAYERS, model_of
from tests.architectures.reference import fitting, skipping

logging.disable_progress_bar()
PROMPT = torch.arange(3, 43)[None]
FULL = DropMask(LAYERS)
MASKS = (
    DropMask(LAYERS, attention=(3, 1)),
    DropMask(LAYERS, mlp=(0, 2)),
    DropMask(LAYERS, attention=(4, 0, 2), mlp=(4, 0, 2)),
    DropMask(LAYERS, attention=(4, 2, 1, 0), mlp=(1,)),
)
BLOCKS = MASKS[2]


@pytest.fixture(params=CASES)
def architecture(request):
    return request.param


@pytest.fixture
def full(architecture, tmp_path):
    return CASES[architecture].save(model_of(architecture), tmp_path / "full")


def surgery(full, mask, out, **options):
    write_checkpoint(plan_surgery(full, mask, **options), out)
    return out


def logits(model, family, mask):
    with torch.no_grad(), skipping(model, family, mask):
        return model(PROMPT).logits


def test_a_stripped_checkpoint_computes_what_the_full_one_does_with_sublayers_skipped(architecture, full, tmp_path):
    family = CASES[architecture].family
    without = logits(model_of(architecture), family, FULL)
    for number, mask in enumerate(fitting(architecture, each) for each in MASKS):
        expected = logits(model_of(architecture), family, mask)
        assert (expected - without).abs().max() > 1e-2
        out = surgery(full, mask, tmp_path / f"stripped{number}")
        model = hf.from_pretrained(out, attn_implementation="eager").eval()
        with torch.no_grad():
            torch.testing.assert_close(model(PROMPT).logits, expected, rtol=0, atol=1e-4)
    cached, plain = (
        model.generate(PROMPT, max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_stripping_takes_the_dropped_tensors_and_leaves_the_others_as_they_were(architecture, full, tmp_path):
    mask = fitting(architecture, BLOCKS)
    out = surgery(full, mask, tmp_path / "stripped")
    before = load_file(full / "model.safetensors")
    after = load_file(out / "model.dropped.safetensors")
    gone = {name for name in before if in_dropped_sublayer(name, CASES[architecture].family, mask)}
    assert gone
    assert before.keys() - after.keys() == gone
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_portable_checkpoint_computes_the_same_in_stock_transformers(architecture, full, tmp_path):
    mask = fitting(architecture, BLOCKS)
    out = surgery(full, mask, tmp_path / "portable", portable=True)
    config = CASES[architecture].config()
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(out, attn_implementation="eager").eval()
    expected = logits(model_of(architecture), CASES[architecture].family, mask)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=0, atol=1e-4)


# Jamba's layers differ by their numbers, and Gemma 4's have a factor of their own, or inputs.
NOT_RENUMBERED = {
    "JambaForCausalLM": "attn_layer_period is 3",
    "Gemma4ForCausalLM": "layer_scalar belongs to",
    "Gemma4ForCausalLM-mixture": "layer_scalar belongs to",
    "Gemma4ForCausalLM-shared keys": r"model.layers.1.(layer_scalar|per_layer_\w+)\S* belongs to",
    "Gemma3nForCausalLM": r"model.layers.1.(altup|laurel|per_layer_)\S+ belongs to",
}


def test_whole_layers_go_and_stock_transformers_loads_the_rest(architecture, full, tmp_path):
    mask = fitting(architecture, DropMask(LAYERS, attention=(1, 3), mlp=(3, 1)))
    if message := NOT_RENUMBERED.get(architecture):
        with pytest.raises(InputError, match=message):
            plan_surgery(full, mask, renumber=True)
        return
    out = surgery(full, mask, tmp_path / "smaller", renumber=True)
    config = CASES[architecture].config()
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(out, attn_implementation="eager").eval()
    assert model.config.num_hidden_layers < LAYERS
    expected = logits(model_of(architecture), CASES[architecture].family, mask)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=0, atol=1e-4)


def test_what_moves_scales_from_norms_to_weights_finds_those_that_are_left(architecture):
    """Quantizers match modules by name, layer after layer: one that is named like a norm and has no weights behind it
    would be put together with the next layer's.
    """
    model, family = model_of(architecture), CASES[architecture].family
    modules = [*model.named_modules()]
    mask = fitting(architecture, DropMask(LAYERS, attention=(0, 4), mlp=(2, 4)))
    for sublayer, gone in ((family.attention, mask.attention), (family.mlp, mask.mlp)):
        last = rf"re:.*\.{sublayer.transformers_module}\.(?:.*\.)?(?:{sublayer.output})$"
        names = rf"re:.*\.{sublayer.pre_norm}$", last
        try:
            whole = [*match_modules_set(model, names)]
        except ValueError:  # experts that are one parameter, for one, are no modules
            continue
        if [len(norms) for norms, _ in whole] != [1] * LAYERS:  # nor are all layers alike, or one norm is before both
            continue
        with hf.dropped(model, family, mask):
            left = [norm for (norm,), _ in match_modules_set(model, names)]
        kept = [norm for layer, ((norm,), _) in enumerate(whole) if layer not in gone]
        assert [*map(id, left)] == [*map(id, kept)]
    assert [*model.named_modules()] == modules
