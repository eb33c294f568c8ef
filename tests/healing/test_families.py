"""One contract for every architecture: where what is gone is linear in what remains, healing finds it."""

import numpy as np
import pytest
import torch

from llmdrop_vllm.architectures.wrappers import WRAPPERS
from llmdrop_vllm.artifacts import DataIdentity
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.tokens import Calibration
from llmdrop_vllm.healing.heal import healed
from llmdrop_vllm.healing.outputs import output_parameters
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.scoring.layers import LayerStream
from tests.architectures.cases import CASES, LAYERS
from tests.architectures.wrapper_cases import WANTS_IMAGES, WRAPPER_CASES

# One whose keys and values no other layer reads.
LAYERS_OF = {
    "Gemma4ForCausalLM-shared keys": 3,
    "Gemma4ForConditionalGeneration-shared keys and a mixture": 3,
}
# Plain, with biases, in parallel, with norms behind, scaled, a mixture, beside and without recurrent mixers.
ONE_OF_EACH = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "GraniteForCausalLM",
    "Qwen3MoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "NemotronHForCausalLM",
)
ONE_STREAM = [name for name, case in CASES.items() if case.family.streams is None]


def data(sequences=32, tokens=32):
    rng = np.random.default_rng(0)
    ids = tuple(rng.integers(3, 256, tokens) for _ in range(sequences))
    identity = DataIdentity(
        source="random", sequences=sequences, tokens=sequences * tokens, seq_len=tokens, seed=0, sha256=""
    )
    return Calibration(ids, identity)


def output_names(checkpoint, layer, sublayer):
    stream = LayerStream(
        checkpoint.under(DropMask(LAYERS)), device=torch.device("cpu"), dtype=torch.float32, attention="sdpa"
    )
    return [f"{stream.layers_prefix}{layer}.{name}" for name in output_parameters(stream, layer, sublayer)]


def pair(case, model, zeroed, moved, directory):
    """A full model in which what goes adds nothing, and one whose other projections are off, which healing undoes."""
    parameters = dict(model.named_parameters())
    assert zeroed
    assert moved
    with torch.no_grad():
        for each in zeroed:
            parameters[each].zero_()
        teacher = Checkpoint.open(case.save(model, directory / "teacher"))
        generator = torch.Generator().manual_seed(1)
        for each in moved:
            noise = torch.randn(parameters[each].shape, generator=generator)
            parameters[each].add_(noise * parameters[each].std() * 0.5)
        return teacher, Checkpoint.open(case.save(model, directory / "student"))


def first_healed(student, mask, teacher):
    with healed(student.under(mask), teacher.under(DropMask(LAYERS)), data(), dtype="float32") as found:
        return found.record.layers[0]


@pytest.mark.parametrize("gone", ["attention", "mlp"])
@pytest.mark.parametrize("name", [*ONE_STREAM, *(name for name in WRAPPER_CASES if name not in WANTS_IMAGES)])
def test_what_is_linear_in_what_remains_is_found(name, gone, tmp_path):
    case, layer = CASES.get(name) or WRAPPER_CASES[name], LAYERS_OF.get(name, 2)
    model = case.model()
    plain = Checkpoint.open(case.save(model, tmp_path / "plain"))
    family = plain.family
    sublayers = family.mixer(layer), family.mlp_of(layer)
    if None in sublayers:
        pytest.skip("nothing is left in a layer that loses its only sublayer")
    lost, kept = sublayers if gone == "attention" else reversed(sublayers)
    zeroed, moved = (output_names(plain, layer, sublayer) for sublayer in (lost, kept))
    teacher, student = pair(case, model, zeroed, moved, tmp_path)
    result = first_healed(student, DropMask(LAYERS, **{gone: (layer,)}), teacher)
    assert result.layer == layer
    assert_found(result, plain)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_last_projection_before_a_block_makes_up_for_it(name, tmp_path):
    case, layer = CASES[name], LAYERS_OF.get(name, 2)
    model = case.model()
    plain = Checkpoint.open(case.save(model, tmp_path / "plain"))
    family = plain.family
    block = {"attention": family.mixer(layer), "mlp": family.mlp_of(layer)}
    mask = DropMask(LAYERS, **{kind: (layer,) for kind, sublayer in block.items() if sublayer is not None})
    zeroed = [each for sublayer in block.values() if sublayer for each in output_names(plain, layer, sublayer)]
    moved = output_names(plain, layer - 1, family.mlp_of(layer - 1) or family.mixer(layer - 1))
    teacher, student = pair(case, model, zeroed, moved, tmp_path)
    result = first_healed(student, mask, teacher)
    assert (result.layer, result.target) == (layer - 1, layer)
    assert_found(result, plain)


def assert_found(result, plain):
    """What was off is right again."""
    left = result.error_after / result.error_before
    # Experts that few tokens see are stopped before they overfit, and so are two mixers that share what they mend.
    by_descent = 0.4 if plain.family.attention.also else 0.25 if plain.architecture in WRAPPERS else 0.2
    assert left < (1e-5 if result.ridge else by_descent), result
