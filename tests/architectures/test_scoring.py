"""Every architecture with a tiny model and a mask: scores and diagnostics are those of hooks on Transformers' model."""

import json

import pytest
import torch

from llmdrop_vllm import DropMask, hf
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.data.calibration import load_calibration
from llmdrop_vllm.errors import CheckpointError
from llmdrop_vllm.healing.parents import check_plain
from llmdrop_vllm.masks.stretches import STRETCH
from llmdrop_vllm.scoring import scoring
from llmdrop_vllm.scoring.scoring import score
from tests.architectures.cases import CASES, LAYERS, model_of
from tests.architectures.reference import fitting, layers_of, skipping, windowed
from tests.architectures.wrapper_cases import WANTS_IMAGES, WRAPPER_CASES

IDS = (3 + 7 * torch.arange(2 * (2 * STRETCH + 20)) % 251).view(2, -1)  # with tokens that a window does not see
MASK = DropMask(LAYERS, attention=(3,), mlp=(1,))
ONE_STREAM = [name for name, case in CASES.items() if case.family.streams is None]


@pytest.mark.parametrize("architecture", ONE_STREAM)
def test_scores_and_diagnostics_of_a_model_with_a_mask(architecture, tmp_path, monkeypatch):
    monkeypatch.setitem(scoring.TOKENS_PER_CHUNK, "cpu", 1)  # each sequence goes through a layer alone
    model = model_of(architecture)
    checkpoint = Checkpoint.open(CASES[architecture].save(model, tmp_path / "full"))
    (tmp_path / "ids.json").write_text(json.dumps(IDS.tolist()))
    mask = windowed(architecture, fitting(architecture, MASK))
    scores = score(checkpoint, load_calibration(checkpoint, str(tmp_path / "ids.json")), mask=mask)
    check(scores, model, checkpoint.family, mask)


def test_several_residual_streams_are_not_scored(tmp_path):
    checkpoint = Checkpoint.open(CASES["Gemma3nForCausalLM"].write(tmp_path / "full"))
    (tmp_path / "ids.json").write_text(json.dumps(IDS.tolist()))
    with pytest.raises(CheckpointError, match=r"keeps several residual streams \(AltUp\), and importance"):
        score(checkpoint, load_calibration(checkpoint, str(tmp_path / "ids.json")))
    with pytest.raises(CheckpointError, match="several residual streams"):
        check_plain(checkpoint)


@pytest.mark.parametrize("wrapper", [name for name in WRAPPER_CASES if name not in WANTS_IMAGES])
def test_a_wrapper_is_scored_by_text_through_its_tower(wrapper, tmp_path):
    checkpoint = Checkpoint.open(WRAPPER_CASES[wrapper].write(tmp_path / "full"))
    (tmp_path / "ids.json").write_text(json.dumps(IDS.tolist()))
    scores = score(checkpoint, load_calibration(checkpoint, str(tmp_path / "ids.json")), mask=MASK)
    check(scores, WRAPPER_CASES[wrapper].load(tmp_path / "full"), checkpoint.family, MASK)


def check(scores, model, family, mask):
    for index in range(LAYERS):
        with hf.dropped(model, family, DropMask(LAYERS, windows=mask.windows)):
            found_by_hooks = steps(model, family, index)
        for kind, (before, after) in found_by_hooks.items():
            what = f"{kind} of layer {index}"
            found = getattr(scores.similarity, kind)[index]
            lacks = {"attention": family.mixer(index) is None, "mlp": family.mlp_of(index) is None}
            if index in getattr(MASK, kind, ()) or lacks.get(kind):
                assert found is None, what
                continue
            expected = torch.cosine_similarity(before, after, dim=-1).mean().item()
            assert found == pytest.approx(expected, abs=1e-5), what
            if kind != "block":
                diagnostics = getattr(scores.diagnostics, kind)
                ratio = ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()
                assert diagnostics.magnitude_ratio[index] == pytest.approx(ratio, rel=1e-3), what
                assert diagnostics.token_cosine_before[index] == pytest.approx(token_cosine(before), abs=1e-5), what
                assert diagnostics.token_cosine_after[index] == pytest.approx(token_cosine(after), abs=1e-5), what


def steps(model, family, index):
    """The residual stream before and after each sublayer and the block, [sequences, tokens, hidden]."""
    attention, mlp = (*MASK.attention, index), (*MASK.mlp, index)
    x = output(model, family, index, attention, mlp)
    with_attention = output(model, family, index, MASK.attention, mlp)
    with_mlp = output(model, family, index, attention, MASK.mlp)
    z = output(model, family, index, MASK.attention, MASK.mlp)
    return {
        "attention": (x, with_attention),
        "mlp": (x, with_mlp) if family.parallel else (with_attention, z),
        "block": (x, z),
    }


class Seen(Exception):
    """What a layer has; those behind it need not run."""


def output(model, family, index, attention, mlp):
    """What a layer has behind its sublayers without these."""

    def show(found):
        raise Seen(found[0] if isinstance(found, tuple) else found)

    layer = layers_of(model)[index]
    then = getattr(layer, family.then or "", None)
    hook = (
        layer.register_forward_hook(lambda _layer, _args, out: show(out))
        if then is None
        else then.register_forward_pre_hook(lambda _layer, args: show(args))
    )
    try:
        with torch.no_grad(), skipping(model, family, DropMask(LAYERS, tuple({*attention}), tuple({*mlp}))):
            model.get_decoder()(input_ids=IDS)
    except Seen as seen:
        return seen.args[0].double()
    finally:
        hook.remove()


def token_cosine(stream):
    """Mean cosine between two different tokens of a sequence."""
    units = torch.nn.functional.normalize(stream, dim=-1)
    tokens = stream.shape[1]
    return ((units @ units.transpose(1, 2)).sum((1, 2)) - tokens).div(tokens * (tokens - 1)).mean().item()
