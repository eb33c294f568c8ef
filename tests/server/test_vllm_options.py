"""What `llmdrop serve` hands to vLLM means what the same words mean to `vllm serve`, and the mask beside it."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmdrop_server.launch import DEFAULTS, main, parser, vllm_arguments
from llmdrop_server.vllm_options import _parsed, read
from llmdrop_vllm import InputError

MODEL = "org/name"
MASK = {"drop_attn_list": [1, 0], "drop_mlp_list": [], "llmdrop_windows": {}}
GROUPS = (
    ("--dtype", "float32"),
    ("--max-model-len=512",),
    ("--max_num_seqs", "4"),
    ("--hf-overrides.rope_theta", "20000"),
    ("--hf_overrides.text_config.layers=3",),
    ("--hf-overrides", '{"vocab_size": 7}'),
    ("--port", "8001"),
    ("--host=127.0.0.1",),
    ("-tp", "2"),
    ("--enforce-eager",),
    ("--served-model-name", MODEL),
    ("-O1",),
    ("--shutdown-timeout", "7"),
)


def handed_over(*words):
    ours, rest = parser().parse_known_args(words)
    theirs = read(rest)
    return vllm_arguments(ours, theirs, theirs.model)


def meant(words):
    found = vars(_parsed(words))
    return {name: value for name, value in found.items() if name not in ("model_tag", "model")} | {
        "model": found["model_tag"] or found["model"]
    }


def check(words, mask=("--drop-attention", "1,0")):
    """With a mask somewhere among the words."""
    expected = meant(words)
    place = len(words) // 2 if len(words) > 1 and not words[len(words) // 2 - 1].startswith("-") else len(words)
    command, *found = handed_over(*words[:place], *mask, *words[place:])
    assert command == "serve"
    found = meant(found)
    assert found.pop("hf_overrides") == (expected.pop("hf_overrides") or {}) | (MASK if mask else {})
    said = {each.partition("=")[0].replace("_", "-") for each in words}
    for name, value in DEFAULTS.items():
        key = name[2:].replace("-", "_")
        if name not in said:
            assert found.pop(key) == int(value)
            expected.pop(key)
    assert found == expected


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(GROUPS), unique_by=lambda group: group[0].partition("=")[0]), st.data())
def test_any_order_of_options(groups, data):
    place = data.draw(st.integers(0, len(groups)))
    named = data.draw(st.sampled_from([(MODEL,), ("--model", MODEL), (f"--model={MODEL}",)]))
    if named == (MODEL,) and place and len(groups[place - 1]) == 1 and "=" not in groups[place - 1][0]:
        place = 0  # to vLLM too it may be the value of what stands before it
    if place and named[0] == MODEL and any(group[0].startswith("--served") for group in groups):
        named, place = (MODEL,), 0  # which vLLM wants there beside a served name
    check([word for group in (*groups[:place], named, *groups[place:]) for word in group])


def test_options_before_the_model():
    words = handed_over("--dtype", "float32", MODEL, "--drop-attention", "1,0")
    assert words[:2] == ["serve", MODEL]
    assert words.count(MODEL) == 1


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(f"model: {MODEL}\nport: 8002\nhf-overrides: '{{\"vocab_size\": 9}}'\nshutdown-timeout: 3\n")
    return str(path)


def test_a_file_names_the_model_the_port_and_overrides(file):
    command, *found = handed_over("--config", file, "--drop-attention", "1,0")
    assert (command, found[0]) == ("serve", MODEL)
    found = _parsed(found)
    assert (found.model_tag, found.port, found.shutdown_timeout) == (MODEL, 8002, 3)
    assert found.hf_overrides == {"vocab_size": 9} | MASK
    assert read(["--config", file]).port == 8002


def test_the_command_line_goes_over_the_file(file):
    found = _parsed(handed_over("other/name", "--config", file, "--port", "8003", "--hf-overrides.a", "1")[1:])
    assert (found.model_tag, found.port, found.hf_overrides) == ("other/name", 8003, {"a": 1})


def test_without_a_mask_nothing_is_overridden_that_was_not():
    check([MODEL, "--hf-overrides.rope_theta", "20000"], mask=())
    assert "--hf-overrides" not in handed_over(MODEL, "--dtype", "float32")


@pytest.mark.parametrize("words", [[], ["--dtype=float32"], ["--enforce-eager", "--max-model-len=5"]])
def test_a_model_must_be_named(words):
    with pytest.raises(InputError, match="no model is named"):
        read(words)


@pytest.mark.parametrize("name", ["gpt2", "org/repo:Q4_K_M", "s3://bucket/model", "gs://bucket/model", "org/name"])
def test_names_that_are_vllms_to_find(name, monkeypatch):
    reached = []
    monkeypatch.setattr("llmdrop_server.launch._run_vllm", lambda words: reached.append(words) or 0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main([name, "--port", "0"]) == 0
    assert reached[0][1] == name


def test_the_other_front_end_has_no_routes_of_ours(monkeypatch, capsys):
    monkeypatch.setattr("llmdrop_server.launch._run_vllm", lambda _: 0)
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"VLLM_USE_RUST_FRONTEND": "1"})
    assert main([MODEL, "--port", "0"]) == 0
    assert "no page, no /v1/drop, no bounds" in capsys.readouterr().err
