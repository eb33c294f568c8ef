"""Stores of keys and values beside a mask: in both orders, on one root, with and without a store of its own."""

import json
from types import SimpleNamespace

import pytest

from llmdrop_vllm import DropMask, MaskError
from llmdrop_vllm.serving.kv_stores import check_stores
from tests.engines import engine, greedy
from tests.tiny import TINY_LLAMA, write_checkpoint

MASK = DropMask(8, attention=(2, 5))
PROMPT = [5 + 3 * place % 200 for place in range(140)]  # more than a block


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "full": write_checkpoint(root / "full", TINY_LLAMA),
        "masked": write_checkpoint(root / "masked", TINY_LLAMA | MASK.to_config()),
    }


def store(root, name="ExampleConnector", **extra):
    extra = {"shared_storage_path": str(root)} | extra
    return {"kv_transfer_config": {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}}


def answer(path, **options):
    with engine(path, enable_prefix_caching=False, **options) as llm:
        return greedy(llm, PROMPT, tokens=8, prompt_logprobs=None)[0]


def test_what_another_mask_has_stored_is_wrong_text(models, tmp_path):
    """Why it is refused: on a root that the full model has filled, and with the refusal put aside."""
    expected = answer(models["masked"])
    assert answer(models["full"], **store(tmp_path / "shared")) == answer(models["full"])
    assert answer(models["masked"], **store(tmp_path / "shared", llmdrop_own_store=True)) != expected
    assert answer(models["masked"], **store(tmp_path / "own", llmdrop_own_store=True)) == expected
    assert answer(models["masked"], **store(tmp_path / "own", llmdrop_own_store=True)) == expected


@pytest.mark.parametrize("filled", [False, True])
def test_a_mask_beside_a_store_that_knows_tokens_alone(filled, models, tmp_path):
    if filled:
        answer(models["full"], **store(tmp_path))
    for path, overrides in ((models["masked"], {}), (models["full"], MASK.to_config("runtime"))):
        with (
            pytest.raises(Exception, match="ExampleConnector tells what it stores apart by tokens alone"),
            engine(path, hf_overrides=overrides, **store(tmp_path)),
        ):
            pytest.fail("started")


@pytest.mark.parametrize(
    ("name", "extra", "refused"),
    [
        ("NixlConnector", {}, True),
        ("LMCacheConnectorV1", {}, True),
        ("LMCacheConnectorV1", {"llmdrop_own_store": True}, False),
        ("OffloadingConnector", {}, False),
        ("OffloadingConnector", {"spec_name": "TieringOffloadingSpec"}, True),
        ("SimpleCPUOffloadConnector", {}, False),
        ("MultiConnector", {"connectors": [{"kv_connector": "SimpleCPUOffloadConnector"}]}, False),
        ("MultiConnector", {"connectors": [{"kv_connector": "LMCacheConnectorV1"}]}, True),
    ],
)
def test_masks_given_at_run_time_beside_stores_that_know_a_models_name(name, extra, refused):
    transfer = SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)

    def config(overrides):
        return SimpleNamespace(kv_transfer_config=transfer, model_config=SimpleNamespace(hf_overrides=overrides))

    check_stores(config({}))
    check_stores(config({"rope_theta": 1e6}))
    for overrides in (MASK.to_config("runtime"), {"text_config": MASK.to_config()}, lambda each: each):
        if refused:
            with pytest.raises(MaskError, match="tells what it stores apart by the model's name") as found:
                check_stores(config(overrides))
            assert json.dumps({"llmdrop_own_store": True}) in str(found.value)
        else:
            check_stores(config(overrides))
