"""What /v1/drop says, from an engine's config alone."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, MambaConfig

from llmdrop_server import COMPARISON_ENVIRONMENT, SCORES_ENVIRONMENT
from llmdrop_server.report import report
from llmdrop_server.schemas import Drop
from llmdrop_vllm import DropMask, InputError
from llmdrop_vllm.artifacts import COMPARISON_FILE, HEAL_FILE, write_record
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.checkpoints.configuration_nemotron_nas import NemotronNasConfig
from llmdrop_vllm.embedded import MODEL
from llmdrop_vllm.evaluation.inspection import inspect_checkpoint
from tests.architectures.cases import CASES
from tests.data.comparisons import comparison, form
from tests.healing.records import healing
from tests.quantized import FORMATS, quantize
from tests.selection.scores import make_scores

MASK = DropMask(12, attention=(11, 7, 8, 10), mlp=(3,))
BLOCK = 16


def engine_config(
    config, architecture, kv_tokens=4800, model=MODEL, cache_dtype="auto", max_model_len=1024, skipped=()
):
    """What the report reads of a VllmConfig."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=config,
            hf_text_config=config,
            architecture=architecture,
            dtype=torch.bfloat16,
            served_model_name=["served", "alias"],
            max_model_len=max_model_len,
            model=str(model),
        ),
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype,
            kv_cache_dtype_skip_layers=[*skipped],
            block_size=BLOCK,
            kv_cache_size_tokens=kv_tokens,
            kv_cache_max_concurrency=kv_tokens / max_model_len,
        ),
    )


def embedded(mask=MASK, **options):
    config = AutoConfig.from_pretrained(MODEL)
    for key, value in mask.to_config().items():
        setattr(config, key, value)
    return engine_config(config, "LlamaForCausalLM", **options)


def test_the_numbers_are_those_of_the_inspection(tmp_path):
    found = report(embedded())
    for path in MODEL.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((MODEL / "config.json").read_text()) | MASK.to_config())
    )
    inspected = inspect_checkpoint(Checkpoint.open(tmp_path), memory_bytes=1 << 30)
    for mine, its in ((found.full, inspected.full), (found.served, inspected.dropped)):
        assert (mine.parameters, mine.attention_layers) == (its.parameters, its.attention_layers)
        assert mine.kv_bytes_per_token == its.kv_bytes_per_token
    assert found.summary == MASK.summary()
    assert (found.mask.attention, found.mask.mlp) == (MASK.attention, MASK.mlp)
    assert (found.model, found.architecture, found.family) == ("served", "LlamaForCausalLM", "llama")


@pytest.mark.parametrize("form", FORMATS)
def test_of_a_quantized_model_the_numbers_are_those_of_the_plain_one(form, tmp_path):
    config = AutoConfig.from_pretrained(model := quantize(MODEL, tmp_path / "model", form))
    for key, value in MASK.to_config().items():
        setattr(config, key, value)
    assert report(engine_config(config, "LlamaForCausalLM", model=model)) == report(embedded())


def test_the_full_model_would_hold_fewer_tokens_in_whole_blocks():
    found = report(embedded(kv_tokens=4800))
    assert (found.served.kv_tokens, found.full.kv_tokens) == (4800, 3200)
    assert found.full.sequences / found.served.sequences == pytest.approx(8 / 12, abs=0.01)
    assert report(embedded(kv_tokens=4816)).full.kv_tokens == 3200


def test_without_a_mask_both_forms_are_one():
    found = report(embedded(mask=DropMask(12)))
    assert found.full == found.served


def test_the_explicit_architecture_is_told_by_its_plain_name():
    config = embedded()
    config.model_config.architecture = "DroppedLlamaForCausalLM"
    assert report(config) == report(embedded())


def test_an_fp8_cache_takes_half_the_bytes():
    found = report(embedded(cache_dtype="fp8_e4m3"))
    assert found.kv_dtype == "fp8"
    assert found.served.kv_bytes_per_token * 2 == report(embedded()).served.kv_bytes_per_token


def test_layers_that_are_left_out_of_an_fp8_cache_take_twice_as_much():
    plain = report(embedded()).served.kv_bytes_per_token  # of 8 layers
    for skipped, layers in (["0", "11"], 9), (["0", "1"], 10):  # 11 has no attention
        found = report(embedded(cache_dtype="fp8", skipped=skipped))
        assert found.served.kv_bytes_per_token * 16 == plain * layers


def test_padding_of_hybrid_models_is_counted():
    config = CASES["Gemma2ForCausalLM"].config()  # sliding, full, sliding, full, sliding
    for key, value in DropMask(5, attention=(0, 2, 4)).to_config().items():
        setattr(config, key, value)
    found = report(engine_config(config, "Gemma2ForCausalLM"))
    assert found.kv_layout == "KV cache stored as 2 layers, without padding"
    assert found.full.kv_bytes_per_token == 3 * found.served.kv_bytes_per_token  # 2 + 3 layers are stored as 3 + 3


def test_heads_that_share_keys_layer_by_layer_are_counted():
    """A Nemotron-NAS model says per layer how many heads share theirs, and not how many have some of their own."""
    config = NemotronNasConfig(
        num_hidden_layers=3,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=None,
        block_configs=[
            {"attention": {"no_op": shared is None, "n_heads_in_group": shared}, "ffn": {"no_op": False}}
            for shared in (8, None, 4)
        ],
    )
    found = report(engine_config(config, "DeciLMForCausalLM"))
    assert found.served.kv_bytes_per_token == 2 * 2 * 32 * (1 + 2)
    assert found.served.parameters is None


def test_an_architecture_unknown_to_the_table_has_no_mask():
    found = report(engine_config(AutoConfig.from_pretrained(MODEL), "SomethingForCausalLM"))
    assert found.family is None
    assert found.full == found.served


def test_what_cannot_be_counted_is_not_told():
    class OfTomorrow(MambaConfig):
        model_type = "of_tomorrow"

    found = report(engine_config(OfTomorrow(num_hidden_layers=2), "OfTomorrowForCausalLM")).served
    assert (found.parameters, found.kv_bytes_per_token, found.kv_tokens) == (None, None, 4800)


def test_scores_come_from_the_environment_or_the_checkpoint(monkeypatch, tmp_path):
    attention = [0.9 - layer / 100 for layer in range(12)]
    write_record(
        make_scores(attention=[None, *attention[1:]], dropped=DropMask(12, (0,))), tmp_path / "llmdrop_scores.json"
    )
    assert report(embedded()).scores is None
    beside = report(embedded(model=tmp_path)).scores
    assert beside.importance.attention[0] is None
    assert beside.importance.attention[5] == pytest.approx(1 - attention[5])
    assert beside.importance.block == (0.5,) * 12
    monkeypatch.setenv(SCORES_ENVIRONMENT, str(tmp_path / "llmdrop_scores.json"))
    assert report(embedded()).scores == beside


def test_how_the_model_was_healed_comes_from_the_checkpoint(tmp_path):
    assert report(embedded(model=tmp_path)).healing is None
    write_record(healing(), tmp_path / HEAL_FILE)
    assert report(embedded(model=tmp_path)).healing == healing().summary()


def test_recorded_answers_come_from_the_environment_or_the_checkpoint(monkeypatch, tmp_path):
    assert report(embedded(model=tmp_path)).comparison is None
    write_record(comparison(), tmp_path / COMPARISON_FILE)
    assert report(embedded(model=tmp_path)).comparison == comparison()
    monkeypatch.setenv(COMPARISON_ENVIRONMENT, str(tmp_path / COMPARISON_FILE))
    assert report(embedded()).comparison == comparison()


@pytest.mark.parametrize(
    ("environment", "record"),
    [
        (SCORES_ENVIRONMENT, make_scores(attention=[0.5] * 4)),
        (COMPARISON_ENVIRONMENT, comparison(forms=tuple(form(name, mask=DropMask(4)) for name in ("full", "dropped")))),
    ],
)
def test_what_is_of_another_depth_is_refused(monkeypatch, tmp_path, environment, record):
    write_record(record, tmp_path / "file.json")
    monkeypatch.setenv(environment, str(tmp_path / "file.json"))
    with pytest.raises(InputError, match="is of 4 layers; the model has 12"):
        report(embedded())


def test_the_example_in_the_schema_is_one():
    example = Drop.model_config["json_schema_extra"]["examples"][0]
    assert Drop.model_validate_json(json.dumps(example)).model_dump(mode="json") == example


def test_windows_leave_room_for_more_of_the_longest_requests():
    windows = DropMask(12, windows=[(layer, 64) for layer in range(0, 12, 2)])
    config = embedded(mask=windows, kv_tokens=102_400)
    config.max_in_flight_tokens = 128
    found = report(config)
    assert (found.served.kv_tokens, found.served.sequences) == (102_400, 100)
    # Six layers keep 1,024 tokens, and six a stretch, a window of two and a chunk, in blocks that begin anywhere.
    blocks = 6 * 1024 // BLOCK + 6 * ((128 + 256 + 128) // BLOCK + 1)
    assert found.full.kv_tokens == 102_400 * blocks // (12 * 1024 // BLOCK) // BLOCK * BLOCK
    assert found.summary.endswith("windows of 64 tokens in 6 [0,2,4,6,8,10]")
