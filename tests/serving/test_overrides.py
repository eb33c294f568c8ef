"""Other overrides beside a mask: a model of fewer layers than its checkpoint has."""

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from llmdrop_vllm.masks.mask import has_layer_count
from llmdrop_vllm.serving.overrides import may_say
from tests.engines import engine, greedy
from tests.tiny import TINY_LLAMA, write_checkpoint

load_general_plugins()

PROMPT = [*range(3, 103)]
FEWER = {"num_hidden_layers": 4}
MASK = {"drop_attn_list": [1], "drop_mlp_list": [2]}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """8 layers."""
    return write_checkpoint(tmp_path_factory.mktemp("full"), TINY_LLAMA)


def answered(path, **options):
    """(log-probabilities of the prompt, layers that have parameters)."""
    with engine(path, **options) as llm:
        (names,) = llm.apply_model(lambda model: [name for name, _ in model.named_parameters()])
        return greedy(llm, PROMPT)[2], {int(name.split(".")[2]) for name in names if ".layers." in name}


def fewer(config):
    """As overrides may be in Python."""
    config.update(FEWER)
    return config


def test_a_masked_model_of_fewer_layers_leaves_the_others_weights_alone(full, tmp_path):
    short = write_checkpoint(tmp_path / "short", TINY_LLAMA | FEWER | MASK)
    expected = answered(short)
    assert expected[1] == {0, 1, 2, 3}
    assert answered(full, hf_overrides=FEWER | MASK) == expected
    # Neither is a layer that is not loaded looked for, nor its mask read.
    lacking = write_checkpoint(tmp_path / "lacking", TINY_LLAMA | MASK, without=("model.layers.6.mlp.",))
    assert answered(lacking, hf_overrides=fewer) == expected


def test_a_mask_is_judged_by_the_number_of_layers_that_is_served(full, tmp_path):
    config = write_checkpoint(tmp_path, TINY_LLAMA | {"drop_attn_list": [1, 6]})
    for path, overrides in ((full, FEWER | {"drop_attn_list": [1, 6]}), (config, FEWER)):
        with pytest.raises(ValueError, match="drop_attn_list names layer 6; the model's 4 layers are 0 to 3"):
            EngineArgs(str(path), skip_tokenizer_init=True, hf_overrides=overrides).create_engine_config()
    overrides = {"num_hidden_layers": 9} | MASK
    with pytest.raises(ValueError, match="that the mask keeps: model.layers.8.input_layernorm.weight"):
        EngineArgs(str(full), skip_tokenizer_init=True, hf_overrides=overrides).create_engine_config()


def test_a_checkpoint_with_more_layers_than_its_config_says_is_no_override(tmp_path):
    """Which of the two is wrong nobody knows; vLLM refuses it."""
    write_checkpoint(tmp_path, TINY_LLAMA)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('layers": 8', 'layers": 4'))
    with (
        pytest.raises(ValueError, match=r"no module or parameter named 'layers.4"),
        engine(tmp_path, hf_overrides=MASK),
    ):
        pass


@pytest.mark.parametrize(
    ("overrides", "says"),
    [({}, False), (MASK, False), (FEWER, True), ({"text_config": {"n_layer": 4}}, True), (fewer, True), (None, False)],
)
def test_what_overrides_say_may_stand_in_any_part_of_them(overrides, says):
    assert may_say(overrides, has_layer_count) == says
